"""A tiny corpus and the real command line, in real processes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml


def tiny_run(corpus: Path, output: Path) -> dict[str, Any]:
    """A config that takes its corpus twice and a little more."""
    return {
        "output": str(output),
        "data": {
            "train": str(corpus / "train" / "manifest.json"),
            "heldout": str(corpus / "heldout" / "manifest.json"),
            "tokenizer": str(corpus / "tokenizer.model"),
            "workers": 0,
        },
        "model": {
            "size": "tiny",
            "image": {"size": 32, "width": 32, "depth": 1, "heads": 2},
            "text": {"length": 20, "width": 32, "depth": 1, "heads": 2},
            "fusion": {"depth": 1, "heads": 2},
            "embed": 16,
        },
        "training": {"steps": 30, "global_batch": 64, "log_every": 1, "evaluate_every": 100},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 5},
        "checkpoint": {"every": 4},
    }


@pytest.fixture
def config(corpus, tmp_path) -> SimpleNamespace:
    """A config file of a tiny run, its output folder, and its tree of values."""
    return write_config(tiny_run(corpus, tmp_path / "run"), tmp_path / "run.yaml")


def write_config(tree: dict[str, Any], path: Path) -> SimpleNamespace:
    path.write_text(yaml.safe_dump(tree))
    return SimpleNamespace(path=path, output=Path(tree["output"]), tree=tree)


def processes(mark: str) -> list[int]:
    """Live processes that inherited `E2E_MARK=mark`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"E2E_MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def survivors(mark: str) -> list[str]:
    """Their command lines."""
    found = []
    for pid in processes(mark):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return found


def start(*arguments: object, mark: str = "", **options: Any) -> subprocess.Popen[str]:
    """`python -m ...` in a process group of its own, as a shell starts a job. See `survivors` for `mark`."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "E2E_MARK": mark}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **options,
    )


def run(*arguments: object, **options: Any) -> SimpleNamespace:
    """`python -m ...` to its end."""
    process = start(*arguments, **options)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def metrics(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            variables = (Path("/proc") / child / "environ").read_bytes().split(b"\0")
            found |= {int(text[5:]): int(child) for text in variables if text.startswith(b"RANK=")}
    return found


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    """Returns when the run has written `step`."""
    for _ in range(1200):
        steps = metrics(output)
        if steps and steps[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in a minute")
