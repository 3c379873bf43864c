"""What is added is one new file and a line in a table; leaving one of them out ends in a sentence.

The packages are copied, so that lines can be added to their tables.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A model that learns how long captions are, and reports how bright images are.
MODEL = '''
"""Two towers that are contrasted, and a head that tells a caption's length."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models.heads import contrast, objectives_of, reports
from pretrain.models.layer import Architecture, Layer
from pretrain.models.towers import image_tower, text_tower


class LengthHead(nn.Module):
    def __init__(self, width, pad):
        super().__init__()
        self.pad, self.classify = pad, nn.Linear(width, 8)

    def forward(self, tokens, ids):
        logits, lengths = self.classify(tokens[:, 0]).float(), (ids != self.pad).sum(dim=1) % 8
        right = (logits.argmax(dim=1) == lengths).sum()
        return F.cross_entropy(logits, lengths), torch.stack([right, torch.full_like(right, len(ids))])


class Brightness(nn.Module):
    def forward(self, images):
        return images.float().mean()


def architecture(config, vocabulary, groups):
    model = config.model
    layers = [
        *image_tower(model.image),
        *text_tower(model.text, vocabulary, "text", stack=model.text.depth),
        *contrast(config, "text_tokens", groups.samples),
        Layer("length_head", partial(LengthHead, model.text.width, vocabulary.pad), ("text_tokens", "text"), REPORTS),
        Layer("brightness", Brightness, ("images",), ("metric/brightness",)),
    ]
    return Architecture(layers, objectives_of(config.objectives))


REPORTS = reports("length")
'''
CHOICE = """    "lengths": Choice(
        "pretrain.models.lengths", ("contrastive", "length"), lambda size: {"text": {"depth": size.depth}}
    ),
}


class ModelConfig("""
SECTION = """    captioning: CaptioningConfig | None = None
    length: MaskedLMConfig | None = None
"""
STEP = """
import torch
from pretrain.config import parse_config
from pretrain.models.towers import Vocabulary
from pretrain.errors import ConfigError
from pretrain.parallel.build import build_engine
from pretrain.parallel.mesh import Mesh
from pretrain.synthetic import made_up_batch

tower = {"width": 32, "depth": 1, "heads": 2}
tree = {
    "output": "unused",
    "data": {"train": "unused", "tokenizer": "unused", "grain": 4},
    "model": {
        "architecture": "lengths",
        "size": "tiny",
        "image": {"size": 16, "patch": 8} | tower,
        "text": {"length": 12} | tower,
    },
    "engine": {"precision": "fp32", "zero_stage": 0},
    "optimizer": {"warmup_steps": 1},
    "training": {"steps": 20, "global_batch": 8},
}
try:
    config, vocabulary = parse_config(tree, "tiny"), Vocabulary(61)
    engine = build_engine(config, Mesh(torch.device("cpu")), vocabulary=vocabulary, micro_batch_per_rank=8)
    result = engine.step([made_up_batch(config, vocabulary, torch.arange(8))], 1e-3)
    print(sorted(result.losses), sorted(result.counts), sorted(result.metrics))
except ConfigError as error:
    print(error)
"""

# A command that says what it was given.
COMMAND = '''
"""Says WORD."""

HELP = "say a word"
EXAMPLES = ("hello",)


def add_arguments(parser):
    parser.add_argument("word")


def run(options):
    print(f"{options.word} said")
    return 3
'''


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for name in ("pretrain", "data_pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pretrain/models/lengths.py").write_text(MODEL)
    replace(tmp_path / "pretrain/model_config.py", "}\n\n\nclass ModelConfig(", CHOICE)
    replace(tmp_path / "pretrain/config.py", SECTION.splitlines(keepends=True)[0], SECTION)
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def step(folder: Path) -> str:
    """What a training step of the new model says."""
    command = [sys.executable, "-c", STEP]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=100)
    return ran.stdout


def test_an_architecture_with_an_objective_and_a_metric_is_one_file_and_its_lines(packages: Path):
    assert step(packages) == "['contrastive', 'length'] ['contrastive', 'length'] ['brightness']\n"


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("model_config.py", CHOICE, "}\n\n\nclass ModelConfig(", "'lengths' is none of albef, clip, "),
        ("config.py", SECTION.splitlines(keepends=True)[1], "", "length"),
        (
            "models/lengths.py",
            '        Layer("length_head"',
            '        # Layer("length_head"',
            "no layer writes loss/length",
        ),
        (
            "models/lengths.py",
            'REPORTS = reports("length")',
            'REPORTS = ("how_long", "right")',
            "no layer writes loss/",
        ),
        ("models/lengths.py", '("metric/brightness",)', '("brightness",)', "layer brightness leads to no loss"),
        (
            "models/lengths.py",
            '("text_tokens", "text")',
            '("text_token", "text")',
            "nearest name that there is is text_t",
        ),
    ],
)
def test_what_is_left_out_is_told(packages: Path, file: str, old: str, new: str, sentence: str):
    replace(packages / "pretrain" / file, old, new)
    assert sentence in step(packages)


@pytest.fixture
def data_pipelines(tmp_path: Path) -> Path:
    package = tmp_path / "data_pipelines"
    shutil.copytree(ROOT / package.name, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "commands/say.py").write_text(COMMAND)
    replace(package / "commands/__init__.py", '"coverage"', '"coverage", "say"')
    return package


def say(package: Path, word: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", package.name, "say", word]
    return subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False, timeout=100)


def test_a_command_is_one_file_and_its_line(data_pipelines: Path):
    ran = say(data_pipelines, "hello")
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "hello said\n", "")
    assert "Says WORD." in say(data_pipelines, "--help").stdout
    assert "python -m data_pipelines say hello" in say(data_pipelines, "--help").stdout


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("__init__.py", ', "say"', "", "invalid choice: 'say' (choose from "),
        ("__init__.py", '"say"', '"tell"', "lists the command tell, and there is no data_pipelines/commands/tell.py."),
        ("say.py", '"""Says WORD."""', "", "The command say lacks __doc__: add it to data_pipelines/commands/say.py."),
        *(
            ("say.py", name, f"other_{name}", f"The command say lacks {name}: add it to ")
            for name in ("HELP", "EXAMPLES", "add_arguments", "run")
        ),
    ],
)
def test_what_a_command_leaves_out_is_told(data_pipelines: Path, file: str, old: str, new: str, sentence: str):
    replace(data_pipelines / "commands" / file, old, new)
    ran = say(data_pipelines, "hello")
    assert ran.returncode
    assert sentence in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
