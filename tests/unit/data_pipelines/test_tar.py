"""The header parser agrees with the standard library and webdataset, and refuses what is broken."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset.tariterators
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import tar
from data_pipelines.tar import TarError, iter_members, iter_samples, split_name


def pack(files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def members(data: bytes, *, whole: bool = True):
    return list(iter_members(lambda at, size: data[at : at + size], len(data), whole=whole))


def read_all(data: bytes) -> list[tuple[str, bytes]]:
    return [(member.name, data[member.start : member.start + member.size]) for member in members(data)]


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


def test_folders_and_links_are_passed_over():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "l.jpg"), (tarfile.LNKTYPE, "h.jpg")):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
        info = tarfile.TarInfo("d/a.jpg")
        archive.addfile(info)
    assert [name for name, _ in read_all(out.getvalue())] == ["d/a.jpg"]


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
