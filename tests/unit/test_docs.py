"""The pages in docs/ say what is so: settings, links, commands, and figures that can be computed."""

import re
import runpy
from pathlib import Path

import pytest

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
    sections = {key.split(".")[0] for key in keys}
    for word in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*|: [^`]*)?`", page.read_text()):
        assert (
            word.split(".")[0] not in sections
            or word in keys
            or f"{word}." in {f"{key.rpartition('.')[0]}." for key in keys}
        ), word


def test_the_steps_of_clip_are_the_epochs_of_cc12m_that_its_page_says():
    page, training = (ROOT / "docs/cc12m.md").read_text(), load_config(ROOT / "configs/clip.yaml").training
    pairs = float(re.search(r"([\d.]+) million pairs", page)[1]) * 1e6
    epochs = training.steps * training.global_batch / pairs
    assert f"{training.steps:,} steps of {training.global_batch:,} are {epochs:.0f} epochs" in page
