"""What the README says can be done: its commands exist, with their options, and its paths and links are there."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.endings import MEANINGS, explain
from pretrain.config import load_config, parse_config

README = Path("README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
INLINE = re.findall(r"`([^`\n]+)`", README)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_with_its_options(command):
    program, *arguments = shlex.split(command)
    match program:
        case "make":
            subprocess.run(["make", "--dry-run", *arguments], check=True, capture_output=True)
        case "python3":
            assert arguments[:2] == ["-m", "venv"]
        case "pip":
            usage = subprocess.run([sys.executable, "-m", "pip", "install", "--help"], check=True, capture_output=True)
            assert arguments[0] == "install"
            for option in (word for word in arguments if word.startswith("--")):
                assert option in usage.stdout.decode()
        case "python" if arguments[1:3] == ["launch", "plan"]:
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        case "python" if arguments[1] == "launch":
            subprocess.run([sys.executable, *arguments, "--dry-run"], check=True, capture_output=True)
        case "python":
            module, subcommand, *rest = arguments[1:]
            usage = subprocess.run(
                [sys.executable, "-m", module, subcommand, "--help"], check=True, capture_output=True, text=True
            ).stdout
            for option in (word for word in rest if word.startswith("-")):
                assert re.search(rf"(^|[\s,\[]){re.escape(option)}\b", usage), option
        case "sbatch":
            script, config = [argument for argument in arguments if not argument.startswith("--")]
            subprocess.run(["bash", "-n", script], check=True)
            load_config(Path(config))
        case "torchrun":
            module, subcommand = arguments[arguments.index("-m") + 1 :][:2]
            assert module == "pretrain"
            assert subcommand in ("train", "doctor")
            load_config(Path(arguments[-1]))
        case "tensorboard":
            assert arguments == ["--logdir", "runs"]
            assert {load_config(path).output.parent for path in Path("configs").glob("*.yaml")} == {Path("runs")}
        case _:
            raise AssertionError(f"nothing here checks {program}")


def test_what_it_shows_of_a_config_is_accepted_as_one():
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        tree = yaml.safe_load(Path("configs/base.yaml").read_text())
        for section, values in yaml.safe_load(block).items():
            tree[section] |= values
        parse_config(tree, "README.md")


def test_every_link_and_path_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("https://")]
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings
    paths = [
        word for word in INLINE if re.fullmatch(r"(pretrain|data_pipelines|launch|configs|tests|slurm)/[\w./]*", word)
    ]
    assert len(links) >= 15
    for path in [*links, *paths]:
        assert Path(path).exists(), path


def test_every_recipe_is_in_the_table_with_its_own_size():
    table = dict(re.findall(r"^\| `(configs/[^`]+)` \| ([^|]+) \|", README, flags=re.MULTILINE))
    assert set(table) == {str(path) for path in Path("configs").glob("*.yaml")}
    for path, model in table.items():
        config = load_config(Path(path)).model
        assert model.lower().startswith(config.architecture)
        assert all(size == config.size for size in re.findall(r"\w+/16", model))


def test_the_demos_scores_are_those_of_its_config():
    scores = dict(re.findall(r"^│ ([^│]*?) +│ ([\d.]+) │", README, flags=re.MULTILINE))
    header = Path("configs/demo.yaml").read_text()
    for name, said in (
        ("text-to-image R@1", "text-to-image R@1 {} of 512"),
        ("matching accuracy, random negatives", "matching accuracy {}"),
        ("masked-LM accuracy", "masked-LM accuracy {}"),
    ):
        assert said.format(f"{float(scores[name]):.2f}") in header


def test_every_exit_code_in_the_table_is_one_of_ours():
    from data_pipelines.errors import UserError
    from pretrain import errors

    ours = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, UserError)}
    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", README, flags=re.MULTILINE))
    assert ours <= set(MEANINGS)
    assert set(map(int, table)) == set(MEANINGS) | {0, 128 + signal.SIGKILL, 128 + signal.SIGTERM}
    for code in (3, 137, 143):  # the launcher's words are the README's
        assert table[str(code)].rpartition(": ")[2].partition(", if")[0] in explain(code)
