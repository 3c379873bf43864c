"""The toolkit as a wheel: what it needs beside its packages travels with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of packages into which the wheel was installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = shutil.ignore_patterns(".*", "runs", "data", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(REPOSITORY, source, ignore=left_out)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--ignore-installed"]
    subprocess.run([*pip, "--prefix", str(folder / "prefix"), *map(str, folder.glob("*.whl"))], check=True)
    return next((folder / "prefix").glob("lib/python*/site-packages"))


def test_a_recipe_that_is_not_here_is_found_where_it_was_installed(installed, tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    missing = run("launch", "plan", "configs/small.yaml")
    recipe = installed.parents[2] / "share/vlm-pretraining-toolkit/configs/small.yaml"
    assert missing.returncode == 4
    assert missing.stderr == (
        f"No config at configs/small.yaml: give the path of a YAML file; the recipe small.yaml is {recipe}.\n"
    )
    assert run("launch", "plan", str(recipe), "--gpus-per-node", "1").returncode == 0
    assert (installed.parents[2] / "share/vlm-pretraining-toolkit/slurm/train.sbatch").is_file()
