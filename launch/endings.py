"""How a run ends: its exit codes, and which of them explains the others. Imports no torch."""

import signal
from collections.abc import Mapping
from pathlib import Path

STOPPED, HUNG = 85, 6
MEANINGS = {
    3: "no valid checkpoint, or one of another run",
    4: "the config, the data or the disk needs mending, see the message above",
    5: "too many bad steps",
    HUNG: "no progress, see the message above",
    7: "the layout does not take the steps of one process",
    8: "another job owns the run's folder now",
    STOPPED: "saved what there was; the same command goes on from there",
}
FINAL = {2, *MEANINGS} - {HUNG}  # nothing gets better by starting the ranks again; 2: words that pretrain does not know


def read_exit_code(path: Path) -> int | None:
    """Read the code that a rank left, if it is one of ours."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() and int(text) in MEANINGS else None


def root_cause(exit_codes: Mapping[int, int]) -> int:
    """Pick the exit code, negative for a signal, that explains the others, as a shell would give it.

    When one rank dies the others lose their connection and end with 1, or are stopped with SIGTERM.
    """
    uninteresting = (1, -signal.SIGTERM)
    first = sorted(exit_codes.values(), key=lambda code: code in uninteresting)[0]
    return 128 - first if first < 0 else first


def describe(exit_codes: Mapping[int, int]) -> str:
    """Say in one line which ranks ended how, leaving out those that were stopped because another failed."""
    causes = {rank: code for rank, code in exit_codes.items() if code != -signal.SIGTERM} or exit_codes
    ranks: dict[int, list[str]] = {}
    for rank, code in sorted(causes.items()):
        ranks.setdefault(code, []).append(str(rank))
    ends = []
    for code, which in ranks.items():
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        ends.append(f"{'ranks' if len(which) > 1 else 'rank'} {', '.join(which)} {end}")
    return "; ".join(ends)


def explain(code: int) -> str:
    """Say what the user can do about it."""
    if code == 128 + signal.SIGKILL:
        return " (out of memory is the usual reason)"
    if code == 128 + signal.SIGTERM:
        return " (stopped before it could save; the newest checkpoint, if there is one, stays)"
    return f" ({MEANINGS[code]})" if code in MEANINGS else ""
