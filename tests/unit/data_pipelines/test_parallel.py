"""Parallel jobs: every result with its number, the first error at once, and no process left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.parallel import each_done

ROOT = Path(__file__).parents[3]


def square(number: int) -> int:
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise DataError("three is no good")
    time.sleep(0.01 if number < 3 else 60)
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("processes", [1, 2])
def test_every_result_comes_with_the_number_of_its_item(processes: int):
    assert dict(each_done(square, range(30), processes)) == {number: number * number for number in range(30)}


def test_nothing_to_do_is_nothing_done():
    assert list(each_done(square, [])) == []


def test_the_first_error_ends_the_others_at_once():
    start = time.monotonic()
    with pytest.raises(DataError, match="three is no good"):
        list(each_done(fail_at_three, range(9), 2))
    assert time.monotonic() - start < 30  # the others sleep for a minute


def test_a_process_that_dies_is_one_sentence_with_the_fix():
    with pytest.raises(DataError, match=r"^One of 2 processes died, most often because memory ran out: use fewer"):
        list(each_done(die, range(4), 2))


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_whatever_ends_the_command_no_process_is_left_and_ctrl_c_prints_no_traceback(
    sign: signal.Signals, code: int, tmp_path: Path
):
    # One is busy and one idle. A terminal sends SIGINT to the whole group; here its processes get it one by one.
    (tmp_path / "job.py").write_text(
        textwrap.dedent(
            """
            import os, time
            from pathlib import Path

            def job(number):
                Path(f"{os.getpid()}.pid").touch()
                time.sleep(120 if number else 1)
                Path("idle").touch()
            """
        )
    )
    script = textwrap.dedent(
        """
        import sys
        from data_pipelines import __main__ as command
        from data_pipelines.commands import demo
        from data_pipelines.parallel import each_done
        from job import job

        demo.run = lambda options: list(each_done(job, range(2), 2))
        if __name__ == "__main__":
            sys.exit(command.main(["demo", "x"]))
        """
    )
    (tmp_path / "run.py").write_text(script)
    run = subprocess.Popen(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while not (len(workers) == 2 and (tmp_path / "idle").exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
        workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    if sign == signal.SIGINT:
        for worker in workers:
            os.kill(worker, sign)
        time.sleep(0.3)
    run.send_signal(sign)
    _, error = run.communicate(timeout=30)
    assert run.returncode == code
    if sign == signal.SIGINT:
        assert error == "Interrupted.\n"
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_ctrl_c_that_is_ignored_at_the_start_stays_ignored():
    """As in a job that a script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = []
        for number, result in each_done(square, range(3), 2):
            os.kill(os.getpid(), signal.SIGINT)
            found.append((number, result))
    finally:
        signal.signal(signal.SIGINT, before)
    assert dict(found) == {0: 0, 1: 1, 2: 4}
