"""The benchmarks run, and say what they are asked to measure. No figure is held to a bound: machines differ."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NUMBER = r"[\d,.]+"


def test_the_benchmark_of_the_data_pipelines_fills_its_tables():
    command = [sys.executable, "-m", "benchmarks.data", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    rates = rf"\| 256 x 256, {NUMBER} bits a pixel \| 0.\d-1.0 (\| {NUMBER} ){{4}}\| \d+% \|"
    assert len(re.findall(rates, run.stdout)) == 2
    assert len(re.findall(rf"\| \w.* \| {NUMBER} \| [+-]{NUMBER} \|", run.stdout)) == 5
    assert re.search(rf"A worker process: {NUMBER} MiB at its peak", run.stdout)
    assert len(re.findall(rf"\| (0|10|10,000) \| {NUMBER} \| {NUMBER} \|", run.stdout)) == 3
    assert re.search(rf"both take {NUMBER} MiB", run.stdout)


def test_the_benchmark_of_checkpoints_fills_its_tables():
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--mib", "6", "--saves", "1", "--ranks", "128"]
    run = subprocess.run(
        [*command, "--parameters", "10"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(re.findall(rf"\| a?synchronous \| {NUMBER} \| {NUMBER} \|", run.stdout)) == 2
    assert re.search(rf"6 MiB: the stall is {NUMBER}% of a synchronous save's", run.stdout)
    assert re.search(rf"\| 128 \| 1,280 (\| {NUMBER} ){{5}}\|", run.stdout)
    assert not list(ROOT.glob("bench-checkpoint-*"))
