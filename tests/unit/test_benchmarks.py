"""The benchmarks run, and say what they are asked to measure. No figure is held to a bound: machines differ."""

import re
import subprocess
import sys
from pathlib import Path


def test_the_benchmark_of_the_data_pipelines_fills_its_tables():
    command = [sys.executable, "-m", "benchmarks.data", "--quick"]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr
    number = r"[\d,.]+"
    rates = rf"\| 256 x 256, {number} bits a pixel \| 0.\d-1.0 (\| {number} ){{4}}\| \d+% \|"
    assert len(re.findall(rates, run.stdout)) == 2
    assert len(re.findall(rf"\| \w.* \| {number} \| [+-]{number} \|", run.stdout)) == 5
    assert re.search(rf"A worker process: {number} MiB at its peak", run.stdout)
    assert len(re.findall(rf"\| (0|10|10,000) \| {number} \| {number} \|", run.stdout)) == 3
    assert re.search(rf"both take {number} MiB", run.stdout)
