"""The header parser agrees with the standard library and webdataset, and refuses what is broken."""

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset.tariterators
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.shards import tar
from data_pipelines.shards.tar import TarError, TrailingBytesError, iter_members, iter_samples, split_name

tar_program = shutil.which("tar")


def pack(files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def reader(data: bytes):
    return lambda at, size: data[at : at + size]


def members(data: bytes, *, whole: bool = True):
    return list(iter_members(reader(data), len(data), whole=whole))


def read_all(data: bytes) -> list[tuple[str, bytes]]:
    return [(m.name, data[m.start : m.start + m.size]) for m in members(data) if not m.is_link]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=150)


@given(st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5), st.sampled_from(["pax", "gnu"]))
def test_any_tar_reads_as_the_standard_library_reads_it(files: list[tuple[str, bytes]], form: str):
    data = pack(files, tarfile.PAX_FORMAT if form == "pax" else tarfile.GNU_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, archive.extractfile(info).read()) for info in archive]  # pyright: ignore
    assert [content for _, content in read_all(data)] == [content for _, content in expected]
    assert [name for name, _ in read_all(data)] == [name for name, _ in expected]


def test_a_path_split_into_prefix_and_name_is_joined():
    name = "f" * 90 + "/" + "k" * 80 + ".jpg"
    assert read_all(pack([(name, b"x")])) == [(name, b"x")]


def test_a_size_in_base_256_is_read():
    data = bytearray(pack([("a.txt", b"12345")]))
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert read_all(bytes(data)) == [("a.txt", b"12345")]


def test_a_size_in_a_pax_header_is_read():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        info.pax_headers = {"size": "3", "path": "b.txt"}
        archive.addfile(info, io.BytesIO(b"abc"))
    assert read_all(out.getvalue()) == [("b.txt", b"abc")]


def test_folders_are_passed_over_and_links_are_told_from_files():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "l.jpg"), (tarfile.LNKTYPE, "h.jpg")):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
        info = tarfile.TarInfo("d/a.jpg")
        archive.addfile(info)
    found = [(member.name, member.is_link) for member in members(out.getvalue())]
    assert found == [("l.jpg", True), ("h.jpg", True), ("d/a.jpg", False)]


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 1100, 1536, 2000])
def test_a_tar_cut_anywhere_is_refused(cut: int):
    data = pack([("a.jpg", b"x" * 400), ("a.txt", b"y" * 400)])[: 4 * 512]
    with pytest.raises(TarError):
        members(data[:cut])


def test_a_tar_cut_between_two_members_is_refused_for_want_of_its_end_mark():
    data = pack([("a.jpg", b"x"), ("a.txt", b"y")])
    with pytest.raises(TarError, match="stops without its end mark at byte 2048"):
        members(data[:2048])
    assert len(members(data[:2048], whole=False)) == 2


def test_a_flipped_byte_in_a_header_is_refused():
    data = bytearray(pack([("a.jpg", b"x")]))
    data[3] ^= 1
    with pytest.raises(TarError, match="no valid tar header at byte 0"):
        members(bytes(data))


def test_a_header_or_member_beyond_its_bound_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(TarError, match="a member of 101 bytes"):
        members(pack([("a.jpg", bytes(101))]))
    monkeypatch.setattr(tar, "MAX_HEADER_BYTES", 100)
    with pytest.raises(TarError, match="a header of"):
        members(pack([("n" * 200 + ".jpg", b"")], tarfile.GNU_FORMAT))


def test_a_global_header_that_renames_members_is_refused():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x"}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(TarError, match="global header"):
        members(out.getvalue())


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path: Path):
    files = [(name, name.encode()) for name in (
        *("d.x/a.jpg", "d.x/a.txt", "d.x/a.seg.PNG", "d.x/b.jpg", "README", "d.x/b.txt", ".hidden", "c/a.jpg"),
        *("__meta.x__", "__side__/a.jpg", "c/a.txt", "c/__x.y__", "c/" + "long" * 50 + ".jpg"),
    )]  # fmt: skip
    path = tmp_path / "a.tar"
    path.write_bytes(pack(files, tarfile.GNU_FORMAT))
    with path.open("rb") as stream:
        source = [{"url": str(path), "stream": stream}]
        expanded = webdataset.tariterators.tar_file_expander(source)
        groups = [dict(group) for group in webdataset.tariterators.group_by_keys(expanded)]
    theirs = [(g["__key__"], {k: v for k, v in g.items() if not k.startswith("__")}) for g in groups]
    data = path.read_bytes()
    ours = [
        (s.key, {name: data[m.start : m.start + m.size] for name, m in s.members.items()})
        for s in iter_samples(members(data))
    ]
    assert ours == theirs
    assert len(ours) == 5


def test_a_sample_is_one_run_of_bytes_that_reads_on_its_own():
    data = pack([("a.jpg", b"1"), ("n" * 120 + ".jpg", b"2"), ("n" * 120 + ".txt", b"3")], tarfile.GNU_FORMAT)
    _, second = iter_samples(members(data))
    part = data[second.start : second.stop]
    assert [m.name[-4:] for m in members(part, whole=False)] == [".jpg", ".txt"]


def test_an_extension_twice_in_a_sample_is_told():
    (sample,) = iter_samples(members(pack([("a.jpg", b"1"), ("a.JPG", b"2")])))
    assert sample.repeated == "jpg"


def test_the_key_ends_at_the_first_dot_of_the_name():
    assert split_name("x.y/a.b.Jpg") == ("x.y/a", "b.jpg")
    assert split_name("x/._a.jpg") == split_name("noextension") == ("", "")


# What follows an end mark ------------------------------------------------------------------------------------

ONE, TWO, EMPTY = pack([("a.jpg", b"1"), ("a.txt", b"2")]), pack([("b.jpg", b"3"), ("b.txt", b"4")]), pack([])
BARE = ONE[:2048]  # without its end mark


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (ONE + TWO, "aabb"),
        (ONE + EMPTY + TWO, "aabb"),
        (EMPTY + ONE, "aa"),
        (ONE + TWO + ONE, "aabbaa"),
        (ONE + bytes(3_000_320) + TWO, "aabb"),
        (BARE + bytes(512) + TWO, "aabb"),  # a lone block of zeros
        (bytes(1024) + ONE, "aa"),
        (ONE + bytes(100), "aa"),
        (EMPTY, ""),
    ],
    ids=["two", "an empty one between", "an empty one before", "three", "zeros between", "one block", "zeros before",
         "padding that is no block", "empty"],
)  # fmt: skip
def test_tars_that_were_joined_are_read_one_after_the_other(data: bytes, names: str):
    assert "".join(member.name[0] for member in members(data)) == names


@pytest.mark.parametrize("rest", [b"x", b"x" * 5000, b"\x1f\x8b" + bytes(600), TWO[1:], bytes(700) + b"x" * 600])
def test_bytes_behind_the_end_that_are_no_tar_are_an_error_that_takes_no_sample_with_it(rest: bytes):
    found = iter_samples(members_until_error := iter_members(reader(ONE + rest), len(ONE + rest), whole=True))
    assert next(found).key == "a"
    with pytest.raises(TrailingBytesError, match=r"^bytes that are no tar follow the end mark at byte \d+$"):
        next(found)
    assert not list(members_until_error)


def test_the_end_of_a_tar_ends_its_sample_even_where_the_next_begins_with_the_same_key():
    # The image of the first and the caption of the second would be a pair that nobody made.
    data = pack([("a.jpg", b"1")]) + pack([("a.txt", b"2")])
    assert [list(sample.members) for sample in iter_samples(members(data))] == [["jpg"], ["txt"]]


def test_a_joined_tar_that_is_cut_is_refused_like_any_other():
    with pytest.raises(TarError, match="stops without its end mark"):
        members(ONE + TWO[:2048])


# Headers that GNU tar accepts --------------------------------------------------------------------------------


def with_checksum(field: bytes, name: str = "a.txt") -> bytes:
    data = bytearray(pack([(name, b"12345")], tarfile.GNU_FORMAT))
    data[148:156] = field
    return bytes(data)


def sums(name: str) -> tuple[int, int]:
    """Of a header's bytes, and of the same as signed ones."""
    header = bytearray(with_checksum(b" " * 8, name)[:512])
    return sum(header), sum(byte - 256 if byte > 127 else byte for byte in header)


@pytest.mark.parametrize("name", ["a.txt", "\u00e9\u00e9.txt", "\U0001f600.txt"])
@pytest.mark.parametrize("form", ["%06o\0 ", "%07o\0", "%06o  ", "%6o\0 ", " %06o ", "\0%06o ", "%08o", "%05o\0 x"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_checksum_in_any_form_that_gnu_tar_reads_is_read(name: str, form: str, signed: bool):
    data = with_checksum((form % sums(name)[signed]).encode(), name)
    assert read_all(data) == [(name, b"12345")]
    if tar_program:
        listed = subprocess.run([tar_program, "-tf", "-"], input=data, capture_output=True, check=False)
        assert listed.returncode == 0, listed.stderr


@pytest.mark.parametrize(
    "field", [b"%06o\0 " % (sums("a.txt")[0] + 1), b"        ", b"0x\0     ", b"00_7\0   ", b"-1\0     "]
)
def test_a_checksum_that_does_not_hold_is_refused(field: bytes):
    with pytest.raises(TarError, match="no valid tar header at byte 0"):
        members(with_checksum(field))


# Members whose bytes are not there ---------------------------------------------------------------------------


@pytest.mark.skipif(not tar_program, reason="there is no tar program")
@pytest.mark.parametrize("holes", [1, 3, 40])  # 40 need several blocks of a map in the old form
@pytest.mark.parametrize("form", ["gnu", "posix 0.0", "posix 0.1", "posix 1.0"])
def test_a_sparse_member_of_any_form_costs_its_sample_and_no_other(form: str, holes: int, tmp_path: Path):
    name, _, version = form.partition(" ")
    for key in "abc":
        (tmp_path / f"{key}.jpg").write_bytes(key.encode() * 700)
        (tmp_path / f"{key}.txt").write_bytes(b"words")
    with (tmp_path / "b.npy").open("wb") as file:
        for hole in range(1, holes + 1):
            file.seek(hole * 100_000)
            file.write(b"x" * 5000)
    options = [f"--format={name}", *([f"--sparse-version={version}"] if version else [])]
    command = [str(tar_program), "-cSf", "s.tar", *options, "--sort=name", "."]
    subprocess.run(command, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    data = (tmp_path / "s.tar").read_bytes()
    found = list(iter_samples(members(data)))
    assert [(sample.key, sample.has_sparse) for sample in found] == [("./a", False), ("./b", True), ("./c", False)]
    image = found[2].members["jpg"]
    assert data[image.start : image.start + image.size] == b"c" * 700


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_long_name_of_a_link_names_the_link_alone(form: int):
    out, long = io.BytesIO(), "d" * 90 + "/" + "k" * 60
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, kind in (
            (f"{long}.jpg", tarfile.LNKTYPE),
            (f"{long}.txt", tarfile.REGTYPE),
            ("a.jpg", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "t" * (99 if form == tarfile.USTAR_FORMAT else 150)
            archive.addfile(info)
    first, second = iter_samples(members(out.getvalue()))
    assert (first.key, first.has_link, list(first.members)) == (long, True, ["txt"])
    assert (second.key, second.has_link) == ("a", False)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(ONE), "compressed with gzip: unpack it"),
        (bz2.compress(ONE), "compressed with bzip2: unpack it"),
        (lzma.compress(ONE), "compressed with xz: unpack it"),
        (lzma.compress(ONE, lzma.FORMAT_ALONE), "compressed with lzma: unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "compressed with zstd: unpack it"),
        (b"\x04\x22\x4d\x18" + bytes(900), "compressed with lz4: unpack it"),
        (b"PK\3\4" + bytes(900), "a zip archive"),
        (b"Rar!\x1a\7\1\0" + bytes(900), "a rar archive"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(900), "a 7z archive"),
        (b"<!doctype html>" * 90, "a web page or XML"),
        (b'{"error": "not found"}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        (b"PAR1" + bytes(900), "a parquet file"),
        (b"", "the file is empty at byte 0"),
        (b"junk" * 500, "no valid tar header at byte 0"),
        (ONE[:100], "the file ends inside a header at byte 0"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_a_file_that_is_no_tar_is_said_to_be_what_it_is(data: bytes, words: str):
    with pytest.raises(TarError, match=f"^{words}"):
        members(data)


@pytest.mark.parametrize("name", ["BZh.jpg", "PK\3\4.jpg", "{a}.jpg", "<a>.jpg", "7z\u00bc.jpg"])
def test_a_tar_whose_first_name_begins_like_another_file_is_a_tar(name: str):
    assert read_all(pack([(name, b"x")], tarfile.GNU_FORMAT)) == [(name, b"x")]
