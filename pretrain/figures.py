"""The figures of an evaluation, by forward passes of an engine; the same on any layout, since each pair counts once.

Shapes: N pairs, L text length, P patches, D width, E embedding width, R pairs to match.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.batch import Record
from data_pipelines.stream.heldout import HeldoutData
from pretrain.captioning import look, same_captions, write_captions
from pretrain.models.layer import COUNTS, Architecture, Flow
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import ALONE, Mesh
from pretrain.retrieval import Gallery, Recall, Reranker
from pretrain.scores import Score
from pretrain.zero_shot import Prompts, zero_shot_accuracy

BATCH = 64  # pairs in one forward pass of the towers
BEAMS = {"greedy": 1, "3 beams": 3}  # ways to write a caption
EMBEDDINGS = ("image_embeddings", "text_embeddings")
PAIR = "pairs/"  # pairs/x is x of each pair's caption


@dataclass(frozen=True)
class Encoded:
    """The split after what runs once per pair, on the CPU of every rank, in the order of the split."""

    tensors: Flow
    """By name, (N, ...): embeddings and ids and, if there is a matching head, what pairs are made of."""
    counts: dict[str, tuple[int, int]]
    """Right answers and questions of the objectives that ask about each caption's pieces."""
    records: list[Record]

    def gallery(self) -> Gallery:
        names = (*EMBEDDINGS, "image_ids", "caption_ids")
        return Gallery.of(*(self.tensors[name] for name in names))


def encode(engine: Engine, mesh: Mesh, data: HeldoutData) -> Encoded:
    """Runs over the split once. All ranks call it together."""
    architecture = engine.architecture
    written = _written(architecture)
    sides = _sides(architecture)
    want = [name for name in (*EMBEDDINGS, "image_tokens", *sides) if name in written]
    asked = [name for name in ("masked_lm", "captioning") if COUNTS + name in written]
    # With a matching head every rank has to have every pair's tokens, and makes them itself; else ranks share the work.
    axis = ALONE if sides else mesh.dp
    columns: list[Flow] = []
    records: list[Record] = []
    counts = torch.zeros(len(asked), 2, dtype=torch.int64)
    for number, batch in enumerate(data.batches(BATCH, dp_rank=axis.rank, dp_size=axis.size, records=True)):
        rows = max(0, len(data) - BATCH * (axis.rank + number * axis.size))  # those behind wrap around
        have = {name: tensor[: max(rows, 1)] for name, tensor in batch.to(mesh.device).tensors.items()}
        (made,) = engine.run(want, [have])
        if asked:
            images = {"image_tokens": made["image_tokens"], "seen": made["image_tokens"]}
            (told,) = engine.run([COUNTS + name for name in asked], [have | images])
            counts += (rows > 0) * torch.stack([told[COUNTS + name] for name in asked]).cpu()
        if rows:
            kept = {name: (have | made)[name] for name in ("positions", "image_ids", "caption_ids", *sides)} | made
            if not sides:
                kept.pop("image_tokens", None)
            columns.append({name: tensor.cpu() for name, tensor in kept.items()})
            records += batch.records[:rows]
    whole = {name: torch.cat([part[name] for part in columns]) for name in columns[0]} if columns else {}
    gathered = axis.gather_objects((whole, records))
    flows = [flow for flow, _ in gathered if flow]
    tensors = {name: torch.cat([flow[name] for flow in flows]) for name in flows[0]}
    order = tensors["positions"].argsort()
    everyone = [record for _, part in gathered for record in part]
    totals = axis.sum(counts.to(mesh.device)).tolist()
    return Encoded(
        {name: tensor[order] for name, tensor in tensors.items()},
        {name: (right, questions) for name, (right, questions) in zip(asked, totals, strict=True)},
        [everyone[place] for place in order.tolist()],
    )


def all_scores(engine: Engine, mesh: Mesh, data: HeldoutData, split: Encoded, rerank: int) -> list[Score]:
    """Every figure that the architecture allows. All ranks call it together.

    Args:
        engine: the model.
        mesh: the ranks.
        data: the pairs.
        split: what `encode` made of them.
        rerank: candidates of each query that the matching head ranks again; 0 for none.
    """
    scores: list[Score] = []
    written = _written(engine.architecture)
    matches = "match_logits" in written
    if "text_embeddings" in written:
        gallery = split.gallery()
        scores += _recalls("text-to-image", "", gallery.text_to_image())
        scores += _recalls("image-to-text", "", gallery.image_to_text())
        if matches and rerank:
            by_text, by_image = rerankers(engine, mesh, split, gallery)
            scores += _recalls("text-to-image", ", re-ranked", gallery.text_to_image(rerank, by_text))
            scores += _recalls("image-to-text", ", re-ranked", gallery.image_to_text(rerank, by_image))
    if matches:
        scores.append(Score("matching accuracy, random negatives", matching_accuracy(engine, mesh, split), 0.5))
    titles = {"masked_lm": "masked-LM accuracy", "captioning": "captioning accuracy, each piece given those before"}
    for name, (right, asked) in split.counts.items():
        scores.append(Score(titles[name], right / max(asked, 1), 1 / data.tokenizer.vocab_size))
    if "caption_logits" in written:
        scores += written_captions(engine, mesh, data)
    return scores


def written_captions(engine: Engine, mesh: Mesh, data: HeldoutData) -> list[Score]:
    """Share of the captions that the model writes to the letter; the ranks share the work."""
    tokenizer, right = data.tokenizer, torch.zeros(len(BEAMS), dtype=torch.int64, device=mesh.device)

    def run(want: Collection[str], have: Flow) -> Flow:
        return engine.run(want, [have])[0]

    marks = {"cls": tokenizer.cls_id, "sep": tokenizer.sep_id, "pad": tokenizer.pad_id}
    for number, batch in enumerate(data.batches(BATCH, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size)):
        columns = batch.to(mesh.device).tensors
        images, text = columns["images"], columns["text"]
        rows = max(0, len(data) - BATCH * (mesh.dp.rank + number * mesh.dp.size))  # those behind wrap around
        seen = look(run, engine.architecture, images)
        for way, beams in enumerate(BEAMS.values()):
            written = write_captions(
                run,
                seen,
                vocabulary=tokenizer.vocab_size,
                **marks,
                length=text.shape[1],
                beams=beams,
                group=mesh.tp.group,
            )
            right[way] += same_captions(written, text)[:rows].sum()
    shares = (mesh.dp.sum(right) / len(data)).tolist()
    return [Score(f"captions to the letter, {way}", share, 0.0) for way, share in zip(BEAMS, shares, strict=True)]


def rerankers(engine: Engine, mesh: Mesh, split: Encoded, gallery: Gallery) -> tuple[Reranker, Reranker]:
    """What the matching head makes of each query's candidates: for captions that look for images, and for images."""

    def by_text(texts: Tensor, images: Tensor) -> Tensor:  # (Q,), (Q, top)
        pairs = gallery.first_pair[images].flatten()
        return match_margins(engine, mesh, split, pairs, texts.repeat_interleave(images.shape[1])).view_as(images)

    def by_image(images: Tensor, texts: Tensor) -> Tensor:
        pairs = gallery.first_pair[images].repeat_interleave(texts.shape[1])
        return match_margins(engine, mesh, split, pairs, texts.flatten()).view_as(texts)

    return by_text, by_image


def match_margins(engine: Engine, mesh: Mesh, split: Encoded, images: Tensor, texts: Tensor) -> Tensor:
    """How much more the matching head says "together" than "apart" of each pair; the ranks share the work.

    Args:
        images, texts: (R,) numbers of the pairs that lend the image and the caption.

    Returns:
        (R,) float32, the same on every rank.
    """
    parts = torch.arange(len(images)).split(4 * BATCH)
    rounds = range(-(-len(parts) // mesh.dp.size))
    margins: list[Tensor] = []
    for number in rounds:  # a rank that has nothing left runs along: under ZeRO-3 the others wait for it
        rows = parts[(number * mesh.dp.size + mesh.dp.rank) % len(parts)]
        shown, image_of = images[rows].unique(return_inverse=True)
        have = {"seen": split.tensors["image_tokens"][shown], f"{PAIR}image": image_of}
        have |= {PAIR + name: split.tensors[name][texts[rows]] for name in _sides(engine.architecture)}
        (found,) = engine.run(["match_logits"], [{name: tensor.to(mesh.device) for name, tensor in have.items()}])
        logits = found["match_logits"].float().cpu()
        margins.append(logits[:, 1] - logits[:, 0])
    everyone = mesh.dp.gather_objects(margins)
    return torch.cat([rank[number] for number in rounds for rank in everyone][: len(parts)])


def matching_accuracy(engine: Engine, mesh: Mesh, split: Encoded) -> float:
    """Balanced: each pair once as it is, and its image once with the caption of a random other."""
    ids = (split.tensors["image_ids"], split.tensors["caption_ids"])
    nothing = torch.zeros(len(ids[0]), 1)
    pairs, partners = Gallery.of(nothing, nothing, *ids).random_negatives(torch.Generator().manual_seed(0))
    matched = match_margins(engine, mesh, split, pairs, pairs) > 0
    mismatched = match_margins(engine, mesh, split, pairs, partners) <= 0
    return float(torch.cat([matched, mismatched]).float().mean())


def zero_shot(engine: Engine, mesh: Mesh, data: HeldoutData, split: Encoded, prompts: Prompts) -> Score:
    """See `zero_shot_accuracy`. All ranks call it together."""

    def embed(captions: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(captions), BATCH):
            ids = torch.stack([torch.from_numpy(data.encode(text)) for text in captions[start : start + BATCH]])
            (found,) = engine.run(["text_embeddings"], [{"text": ids.to(mesh.device)}])
            parts.append(found["text_embeddings"].cpu())
        return torch.cat(parts)

    gallery = split.gallery()
    metadata = [split.records[pair].metadata for pair in gallery.first_pair.tolist()]
    return zero_shot_accuracy(gallery.images, metadata, prompts, embed)


def _written(architecture: Architecture) -> set[str]:
    return {name for layer in architecture.layers for name in layer.writes}


def _sides(architecture: Architecture) -> list[str]:
    """Of which tensors per caption pairs are made; none without a matching head."""
    made = (name.removeprefix(PAIR) for name in _written(architecture) if name.startswith(PAIR))
    return sorted(set(made) - {"image", "label", "valid"})


def _recalls(direction: str, suffix: str, recalls: dict[int, Recall]) -> Iterator[Score]:
    for k, (value, chance) in recalls.items():
        yield Score(f"{direction} R@{k}{suffix}", value, chance)
