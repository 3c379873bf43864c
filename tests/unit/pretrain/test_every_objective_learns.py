"""Each architecture learns each of its objectives: on samples it has not seen, it answers far better than chance.

A picture is two halves of one colour each, and noise; its caption names the left colour and the right one.
Shapes: B samples.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from data_pipelines.batch import IGNORE
from distributed.tiny import build, run_each, tiny_config
from pretrain.models.layer import Flow
from pretrain.models.model import Model
from pretrain.models.towers import Vocabulary
from pretrain.parallel.first_pass import prepare
from pretrain.parallel.mesh import ALONE

COLOURS = torch.tensor([[250, 20, 20], [20, 250, 20], [20, 20, 250], [250, 250, 20]])
CLS, SEP, MASK, FIRST = 2, 3, 4, 5  # ids; FIRST is that of the first colour's word
VOCABULARY = Vocabulary(FIRST + len(COLOURS))
BATCH, STEPS = 32, 150


def pictures_with_captions(positions: Tensor) -> Flow:
    """Samples of these positions, (B,) int64. One word of each caption is hidden."""
    B = len(positions)
    generator = torch.Generator().manual_seed(int(positions[0]))
    halves = torch.randint(len(COLOURS), (B, 2), generator=generator)
    pixels = COLOURS[halves].permute(0, 2, 1)[:, :, None].repeat_interleave(16, 2).repeat_interleave(8, 3)
    noise = torch.randint(-60, 60, pixels.shape, generator=generator)
    words = torch.full((B, 1), FIRST) + halves
    text = torch.cat([torch.full((B, 1), CLS), words, torch.full((B, 1), SEP), torch.zeros(B, 8).long()], dim=1)
    hidden = 1 + torch.randint(2, (B, 1), generator=generator)
    kind = len(COLOURS) * halves[:, 0] + halves[:, 1]
    return {
        "images": (pixels + noise).clamp(0, 255).to(torch.uint8),
        "text": text,
        "masked_text": text.scatter(1, hidden, MASK),
        "masked_positions": torch.cat([hidden, 0 * hidden], dim=1),
        "masked_targets": torch.cat([text.gather(1, hidden), torch.full_like(hidden, IGNORE)], dim=1),
        "positions": positions,
        "image_ids": kind,
        "caption_ids": kind,
    }


def accuracies(model: Model, batch: Flow) -> dict[str, float]:
    """Share of right answers by objective."""
    with torch.no_grad():
        ((have, _),) = prepare(model, [batch], ALONE, partial(run_each, model))
        counts = model(have).counts.tolist()
    names = [objective.name for objective in model.architecture.objectives]
    return {name: right / asked for name, (right, asked) in zip(names, counts, strict=True)}


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small, more threads take more time, and many times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WIDE = {"model__image__width": 64, "model__text__width": 64}


@pytest.mark.parametrize("architecture", ["albef", "blip", "clip", "coca", "vilt"])
def test_an_architecture_learns_each_of_its_objectives(architecture):
    changes = {"model__embed": None} if architecture == "vilt" else {}
    config = tiny_config(model__architecture=architecture, **WIDE, **changes)
    model = build(config, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    unseen = pictures_with_captions(1_000_000 + torch.arange(256))
    at_first = accuracies(model, unseen)
    for step in range(STEPS):
        batch = pictures_with_captions(BATCH * step + torch.arange(BATCH))
        ((have, stand_ins),) = prepare(model, [batch], ALONE, partial(run_each, model))
        optimizer.zero_grad()
        model(have, stand_ins).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert max(at_first.values()) < 0.6
    assert min(accuracies(model, unseen).values()) > 0.9
