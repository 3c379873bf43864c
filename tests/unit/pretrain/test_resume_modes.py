"""`checkpoint.resume`, as the table of docs/resume.md has it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed.tiny import tiny_config
from pretrain.checkpoint.store import CheckpointStore
from pretrain.errors import CheckpointError
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import whole
from pretrain.trainer import Trainer

PAGE = (Path(__file__).parents[3] / "docs" / "resume.md").read_text()
CONTENTS = ("valid", "none", "invalid")  # the table's columns
TABLE = [
    (mode, content, cell.strip())
    for mode, cells in re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, flags=re.MULTILINE)
    for content, cell in zip(CONTENTS, cells.split("|"), strict=False)
    if mode in ("auto", "must", "never")
]


@pytest.mark.parametrize(("mode", "content", "expected"), TABLE)
def test_a_start_does_what_the_table_says(tmp_path, mode, content, expected):
    assert len(TABLE) == 9
    store = CheckpointStore(tmp_path / "checkpoints", ALONE)
    if content != "none":
        weights = {kind: torch.zeros(4) for kind in ("master", "exp_avg", "exp_avg_sq")}
        store.save(5, [Fragment("layer.weight", whole(weights["master"]), 0, weights)], {})
        store.settle(wait=True)
    if content == "invalid":
        (store.folder / "step-000000005" / "COMMIT").unlink()
    restored: list[Path] = []
    config = tiny_config(checkpoint__resume=mode)

    def restore(checkpoint: Path) -> dict[str, Any]:
        restored.append(checkpoint)
        return {"layout": {}, "config": config.model_dump(mode="json")}

    trainer = SimpleNamespace(
        config=config,
        store=store,
        saving=SimpleNamespace(fetch=lambda: None),
        journal=SimpleNamespace(say=print),
        step=5,
        origin=None,
        _restore=restore,
    )
    if expected.startswith("an error"):
        with pytest.raises(CheckpointError) as error:
            Trainer.resume(trainer)  # pyright: ignore[reportArgumentType]
        assert f"exit code {error.value.exit_code}" in expected
        words = {"none": f"checkpoint.resume is {mode}", "valid": f"checkpoint.resume is {mode}", "invalid": "is valid"}
        assert words[content] in str(error.value)
        assert restored == []
    else:
        Trainer.resume(trainer)  # pyright: ignore[reportArgumentType]
        assert [path.name for path in restored] == ["step-000000005"] * (expected == "goes on from it")
