"""What holds for any storage: local paths, patterns of names, and file systems known to fsspec alone."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipelines.errors import DataError, MissingError
from data_pipelines.storage import filesystems
from data_pipelines.storage.addresses import is_remote, shown
from data_pipelines.storage.files import describe, expand, open_bytes

CONTENT = np.random.default_rng(0).bytes(1000)


@pytest.mark.parametrize(
    ("location", "remote"),
    [("/a/b.tar", False), ("b.tar", False), ("c:b.tar", False), ("https://host/b.tar", True), ("s3://b/b.tar", True)],
)
def test_urls_are_remote_and_paths_are_not(location: str, remote: bool):
    assert is_remote(location) == remote


def test_local_names_are_shown_as_they_are_and_urls_without_secrets():
    assert shown("/data/a?b//c@d.tar") == "/data/a?b//c@d.tar"
    assert shown("https://me:se@cret@host/a@b.tar?key=secret#x") == "https://host/a@b.tar?..."
    assert shown("s3://bucket/a.tar") == "s3://bucket/a.tar"


def test_a_local_file_is_read_by_its_bytes_and_has_no_version(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    assert describe(str(path)) == (1000, "")
    source = open_bytes(str(path), patience_s=1, size=1000)
    assert source.read(990, 20) == CONTENT[990:]
    assert source.read(5, 10) == CONTENT[5:15]
    source.close()
    source.close()


def test_a_local_file_stays_in_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    opened: list[int] = []
    really_open = os.open
    monkeypatch.setattr("os.open", lambda *arguments: opened.append(really_open(*arguments)) or opened[-1])
    source = open_bytes(str(tmp_path / "a.tar"), patience_s=1)
    assert not os.get_inheritable(opened[0])
    source.close()


def test_local_files_that_cannot_be_read_are_named_with_the_fix(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with pytest.raises(DataError, match=r"^Shard .*none\.tar cannot be found: put it back"):
        open_bytes(str(tmp_path / "none.tar"), patience_s=1)
    with pytest.raises(DataError, match=r"cannot be opened \(Is a directory\): name a file, not a folder"):
        open_bytes(str(tmp_path), patience_s=1)
    with pytest.raises(DataError, match=r"has changed: it has 1,000 bytes but had 999 bytes when it was indexed"):
        open_bytes(str(tmp_path / "a.tar"), patience_s=1, size=999)


def test_a_disk_that_fails_is_named_with_the_byte(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    source = open_bytes(str(tmp_path / "a.tar"), patience_s=1)
    with pytest.raises(DataError, match=r"a\.tar cannot be read at byte -1 \(Invalid argument\): see that its disk"):
        source.read(-1, 5)  # what the kernel refuses, like a bad sector


def test_a_read_that_the_kernel_cuts_short_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Linux reads at most 2 GiB at once, which no test should write.
    (tmp_path / "a.tar").write_bytes(CONTENT)
    pread = os.pread
    monkeypatch.setattr("os.pread", lambda descriptor, size, offset: pread(descriptor, min(size, 300), offset))
    assert open_bytes(str(tmp_path / "a.tar"), patience_s=1).read(10, 2000) == CONTENT[10:]


def test_an_error_leaves_no_file_open(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    for location, size in ((tmp_path, None), (tmp_path / "a.tar", 999)):
        with pytest.raises(DataError):
            open_bytes(str(location), patience_s=1, size=size)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("0.tar", "1.tar", "2.tar", "notes.txt", "deep/3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_patterns_are_files_folders_globs_and_braces(folder: Path):
    three = [f"{folder}/{number}.tar" for number in range(3)]
    assert expand([str(folder)]) == three
    assert expand([f"{folder}/{{0..2}}.tar"]) == three
    assert expand([f"{folder}/*.tar", f"{folder}/1.tar", f"{folder}/deep/../1.tar"]) == three
    assert expand([f"{folder}/**/3.tar"]) == [f"{folder}/deep/3.tar"]
    assert expand([f"{folder}/2.tar", "https://host/b.tar"]) == [three[2], "https://host/b.tar"]


def test_relative_patterns_become_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert expand(["./deep/../0.tar"]) == [f"{folder}/0.tar"]


@pytest.mark.parametrize("pattern", ["9.tar", "deep/deeper", "*.zip", "{7..9}.tar", "0.tar{", "a}b{c"])
def test_a_pattern_that_matches_nothing_is_named(pattern: str, folder: Path):
    with pytest.raises(DataError, match=r"^No shards at .*: give tar files, a folder of them, or a pattern like"):
        expand([f"{folder}/{pattern}"])


@pytest.mark.parametrize(
    "name",
    ["a[1].tar", "a?.tar", "a*.tar", "{a,b}.tar", "a{1..3}.tar", "a\\{1,b}.tar", "**", "a{.tar", "{a1.tar}", "~.tar"],
)
def test_a_file_whose_name_looks_like_a_pattern_is_that_file(name: str, folder: Path):
    for other in (name, "a1.tar", "a.tar", "b.tar", "a2.tar", "a3.tar"):
        (folder / other).touch()
    assert expand([f"{folder}/{name}"]) == [f"{folder}/{name}"]


@pytest.mark.parametrize("name", ["{a,b}", "x[1]", "all*"])
def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(name: str, folder: Path):
    for other in (name, "a", "x1", "all", "allx"):
        (folder / other).mkdir()
        (folder / other / "0.tar").touch()
    assert expand([f"{folder}/{name}"]) == [f"{folder}/{name}/0.tar"]
    for shards in ("0.tar", "*.tar", "{0..0}.tar", "{0,[0]}.tar", "?.tar"):
        assert expand([f"{folder}/{name}/{shards}"]) == [f"{folder}/{name}/0.tar"]


def test_a_backslash_in_a_name_without_braces_stays(folder: Path):
    (folder / "a\\b.tar").touch()
    assert expand([f"{folder}/a\\b.tar"]) == [f"{folder}/a\\b.tar"]


def test_all_gaps_in_a_brace_pattern_are_told_at_once(folder: Path):
    (folder / "1.tar").unlink()
    with pytest.raises(MissingError) as caught:
        expand([f"{folder}/{{0..4}}.tar"])
    gaps = ", ".join(f"{folder}/{number}.tar" for number in (1, 3, 4))
    assert str(caught.value) == f"3 of 5 shards cannot be found: {gaps}. Put them back, or name the others alone."
    with pytest.raises(MissingError, match=r"^98 of 99 shards cannot be found: .*/22\.tar and 78 others\. Put"):
        expand([f"{folder}/{{2..100}}.tar"])


class Unreliable(MemoryFileSystem):
    """Files in memory behind calls that fail."""

    protocol = "unreliable"
    answers: ClassVar[deque[Exception | bytes]] = deque()  # instead of the right ones

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("unreliable://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        answer = self.answers.popleft() if self.answers else super().cat_file(path, start, end, **options)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def info(self, path: str, **options: object) -> dict[str, Any]:
        if path not in self.dircache:
            self.dircache[path] = super().info(path, **options)
        return self.dircache[path]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()


@pytest.fixture
def unreliable() -> Iterator[type[Unreliable]]:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    Unreliable.store.clear()
    Unreliable.answers.clear()
    Unreliable().pipe_file("/a.tar", CONTENT)
    Unreliable().pipe_file("/b.tar", CONTENT)
    yield Unreliable
    filesystems._filesystems.clear()


def test_any_file_system_of_fsspec_is_read_with_patience(unreliable: type[Unreliable]):
    assert expand(["unreliable:///*.tar"]) == ["unreliable:///a.tar", "unreliable:///b.tar"]
    size, version = describe("unreliable:///a.tar")
    source = open_bytes("unreliable:///a.tar", patience_s=2, size=size, version=version)
    unreliable.answers.extend([TimeoutError("slow"), RuntimeError("a library's own"), b"", bytes(51)])
    assert source.read(100, 50) == CONTENT[100:150]
    assert source.read(990, 50) == CONTENT[990:]
    assert not unreliable.answers


def test_a_file_system_that_keeps_failing_ends_the_patience(unreliable: type[Unreliable]):
    source = open_bytes("unreliable:///a.tar", patience_s=0.3)
    unreliable.answers.extend([RuntimeError("a library's own")] * 100)
    with pytest.raises(DataError, match=r"a\.tar cannot be read at byte 7: \d attempts .* RuntimeError \(a library's"):
        source.read(7, 5)


def test_a_file_that_any_file_system_misses_or_refuses_is_said_at_once(unreliable: type[Unreliable]):
    with pytest.raises(DataError, match=r"none\.tar cannot be found: put it back"):
        open_bytes("unreliable:///none.tar", patience_s=2)
    source = open_bytes("unreliable:///a.tar", patience_s=2)
    unreliable.answers.append(PermissionError("not you"))
    with pytest.raises(DataError, match=r"may not be read \(.* not you\)"):
        source.read(0, 5)


def test_a_change_in_any_file_system_is_met_on_opening(unreliable: type[Unreliable]):
    size, version = describe("unreliable:///a.tar")
    unreliable().pipe_file("/a.tar", CONTENT[::-1])
    with pytest.raises(
        DataError, match=rf"has 1,000 bytes \(version .*\) but had 1,000 bytes \(version {version[:10]}"
    ):
        open_bytes("unreliable:///a.tar", patience_s=2, size=size, version=version)
    unreliable().pipe_file("/a.tar", CONTENT[:9])
    with pytest.raises(DataError, match=r"has 9 bytes .* but had 1,000 bytes"):
        open_bytes("unreliable:///a.tar", patience_s=2, size=size)
