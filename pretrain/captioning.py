"""Writes captions of images, greedily or by beam search, as a model that was trained by captioning does.

Any model will do whose layers make `decoded` of `text` and images, and `caption_logits` of `decoded`. All ranks of a
layout call these functions together, with batches of equal shapes: the number of passes follows from the shapes.
Shapes: B images, W beams, R = B W captions, L text length, V vocabulary.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pretrain.collectives import Group
from pretrain.models.layer import Architecture, Flow, leading_to
from pretrain.objectives.cross_entropy import cross_entropy, likeliest

Run = Callable[[Collection[str], Flow], Flow]  # what is wanted of one batch, on any layout


def look(run: Run, architecture: Architecture, images: Tensor) -> Flow:
    """All that a decoder reads of images, so that the image tower runs once for all tokens of a caption."""
    made = {"images", "seen"}  # `seen`: what rows of several kinds look at; captions to write look at their own image
    for layer in architecture.layers:
        if layer.reads and made.issuperset(layer.reads):
            made |= set(layer.writes)
    read = {name for call in leading_to(architecture.layers, ["decoded"], made) for name in call.reads & made}
    found = run({"image_tokens" if name == "seen" else name for name in read}, {"images": images})
    return {name: found["image_tokens" if name == "seen" else name] for name in read}


@torch.no_grad()
def write_captions(
    run: Run,
    seen: Flow,
    *,
    vocabulary: int,
    cls: int,
    sep: int,
    pad: int,
    length: int,
    beams: int = 1,
    group: Group = None,
) -> Tensor:
    """The likeliest caption of each image that a beam search finds; with one beam, the greedy choice.

    Args:
        run: forward passes without gradient.
        seen: what `look` gave.
        vocabulary: V.
        cls: the token that begins a caption.
        sep: the one that ends it.
        pad: the one behind its end.
        length: L, both ends included. Captions that would be longer end there, as those of the data do.
        beams: W, captions that are pursued for each image, those that have ended among them.
        group: the ranks that V is cut over.

    Returns:
        (B, L) int64, as a tokenizer encodes captions.
    """
    first = next(iter(seen.values()))
    B, device = len(first), first.device
    seen = {name: rows.repeat_interleave(beams, dim=0) for name, rows in seen.items()}
    positions = torch.arange(B * beams, device=device)
    ids = positions.new_full((B * beams, 1), cls)
    scores = torch.zeros(B, beams, device=device)
    scores[:, 1:] = float("-inf")  # all beams begin alike: one of them is enough
    nothing = torch.full((beams,), float("-inf"), device=device)
    nothing[0] = 0.0
    for place in range(1, length):
        decoded = run(["decoded"], {**seen, "text": ids, "positions": positions})["decoded"]
        logits = run(["caption_logits"], {"decoded": decoded[:, -1:]})["caption_logits"][:, 0]
        if place < length - 1:
            likely, following = likeliest(logits, beams, vocabulary, group)  # (R, W)
        else:
            following = torch.full_like(ids[:, :1], sep)
            likely = -cross_entropy(logits, following[:, 0], vocabulary, group)[0][:, None]
        ended = (ids == sep).any(dim=1, keepdim=True)
        likely = torch.where(ended, nothing[: likely.shape[1]], likely)
        following = torch.where(ended, pad, following)
        scores, chosen = (scores.view(-1, 1) + likely).view(B, -1).topk(beams)  # (B, W)
        rows = (chosen // likely.shape[1] + beams * torch.arange(B, device=device)[:, None]).flatten()
        ids = torch.cat([ids[rows], following.view(B, -1).gather(1, chosen).view(-1, 1)], dim=1)
    return ids.view(B, beams, length)[:, 0]


def same_captions(written: Tensor, text: Tensor) -> Tensor:
    """(B,) bool: which captions were written to the letter. (B, L) ids of both."""
    return (written == text).all(dim=1)
