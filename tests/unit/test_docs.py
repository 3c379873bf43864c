"""The pages in docs/ say what is so: settings, links, commands, and figures that can be computed."""

import math
import re
import runpy
import shlex
from pathlib import Path

import pytest

from data_pipelines import __main__ as data_pipelines
from launch import __main__ as launch
from launch.hardware import GPUS
from launch.plan import Cluster, Costs, make_plan
from pretrain import __main__ as pretrain
from pretrain.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_settings_is_what_the_models_say():
    made = runpy.run_path(str(ROOT / "docs/settings.py"))["page"]()
    assert (ROOT / "docs/settings.md").read_text() == made, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_is_one(page):
    keys = set(re.findall(r"^\| `([\w.]+)`", (ROOT / "docs/settings.md").read_text(), flags=re.MULTILINE))
    for word in re.findall(r"`([a-z_]+\.[a-z_]+(?:\.[a-z_]+)*)(?:=[^`]*|: [^`]*)?`", page.read_text()):
        word = re.sub(r"^data\.train\.(?!NAME)\w+", "data.train.NAME", word)  # a mixture's names are its own
        assert word.endswith(".py") or word.partition(".")[0] not in keys or word in keys, word


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_the_commands_of_a_page_have_the_options_that_they_use(page):
    parsers = {"data_pipelines": data_pipelines.parser, "launch": launch.parser, "pretrain": pretrain.parser}
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.splitlines():
            _, _, module, *words = shlex.split(line)
            parsed, late = parsers[module]().parse_known_args(words)
            assert not [word for word in late if word.startswith("-")]
            if module == "launch":
                load_config(parsed.config, [*parsed.overrides, *late])


def test_the_figures_of_cc12m_are_those_of_the_config_and_the_plan():
    page, config = (ROOT / "docs/cc12m.md").read_text(), load_config(ROOT / "configs/clip.yaml")
    steps, batch = config.training.steps, config.training.global_batch
    pairs = float(re.findall(r"of ([\d.]+) million pairs", page)[0]) * 1e6
    assert f"{steps:,} steps of {batch:,} are {steps * batch / pairs:.0f} epochs" in page
    assert f"32 epochs are customary, and {32 * pairs / batch / 1000:.0f},000 steps" in page
    assert f"the first epoch, {pairs / batch:,.0f} steps" in page
    assert f"ln {batch} = {math.log(batch):.2f}" in page
    costs = Costs(config, 30_000)
    plan = make_plan(config, Cluster(1, 8, GPUS["h100"]), costs)
    assert f"{plan.hours * 0.43:.0f} hours of computing for 43,000 steps, {plan.hours:.0f} for 100,000" in page
    assert f"about {plan.samples_per_s / 1000:.0f},000 samples/s" in page
    needed = f"559 images/s ([measurements](measurements.md)), so that the node\nneeds {plan.decoding_cores:.0f} cores"
    assert needed in page
    assert f"it decodes 2,092, and {plan.samples_per_s / 2092:.0f} do" in page
    slower = make_plan(config, Cluster(1, 8, GPUS["a100"]), costs).hours / plan.hours
    assert round(slower) == 3
