"""How a run ended, told from how its ranks did."""

from pathlib import Path

import pytest

from launch.torchrun import describe, read_exit_code, root_cause


@pytest.mark.parametrize(
    ("exit_codes", "code", "words"),
    [
        ({0: 1, 1: -9, 2: 1}, 137, "ranks 0, 2 ended with 1; rank 1 killed by SIGKILL"),
        ({0: -15, 1: 5}, 5, "rank 1 ended with 5"),
        ({0: 1, 1: -11}, 139, "rank 0 ended with 1; rank 1 killed by SIGSEGV"),
        ({0: 1, 1: 1}, 1, "ranks 0, 1 ended with 1"),
        ({0: -15, 1: -15}, 143, "ranks 0, 1 killed by SIGTERM"),
    ],
)
def test_the_rank_that_failed_first_is_told_from_those_that_fell_with_it(
    exit_codes: dict[int, int], code: int, words: str
):
    assert root_cause(exit_codes) == code
    assert describe(exit_codes) == words


@pytest.mark.parametrize(("text", "code"), [("85\n", 85), ("4", 4), ("", None), ("0", None), ("1", None), ("x", None)])
def test_only_the_codes_of_a_run_count_in_the_exit_code_file(tmp_path: Path, text: str, code: int | None):
    path = tmp_path / "exit-code"
    path.write_text(text)
    assert read_exit_code(path) == code


def test_a_run_that_left_no_exit_code_file_has_no_code_of_its_own(tmp_path: Path):
    assert read_exit_code(tmp_path / "exit-code") is None
