"""Evaluation of a run on held-out pairs: retrieval, zero-shot classification, matching, masked language modelling.

One process, no engine: any checkpoint loads into a plain model.
Shapes: N samples, L text length, P patches, D width, E embedding width, K masked slots.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from data_pipelines.batch import Record
from data_pipelines.errors import DataError
from data_pipelines.heldout import HeldoutData
from data_pipelines.text import decode_text, to_json
from pretrain.checkpoint.fragments import read_fragments
from pretrain.checkpoint.store import CheckpointStore, read_run
from pretrain.config import Config, parse_config
from pretrain.errors import CheckpointError
from pretrain.models.align import Align
from pretrain.models.architectures import layer_specs
from pretrain.models.flow import Flow, start_flow
from pretrain.models.fusion import FusionBlock, MaskedLMHead, MatchingHead
from pretrain.models.model import VisionLanguageModel, build_model
from pretrain.models.towers import TextBlock, TextEmbed
from pretrain.objectives.masked_lm import UNUSED
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE, training_dtype
from pretrain.parallel.tensor import whole
from pretrain.retrieval import chance_recall, recall

LayerT = TypeVar("LayerT", bound=nn.Module)
BATCH = 64  # samples, or pairs, in one forward pass


@dataclass(frozen=True)
class Score:
    """One figure, and what guessing would score."""

    name: str
    value: float
    chance: float


@torch.no_grad()
def main(run_folder: Path, split: str, rerank: int) -> None:
    """Evaluates the newest valid checkpoint of a run; prints a table and writes it as JSON beside the run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = CheckpointStore(run_folder / "checkpoints", ALONE, keep=2)
    checkpoint = store.newest_valid(quarantine=False)
    if checkpoint is None:
        raise CheckpointError(f"No checkpoint in {store.folder}: give the output folder of a run that has saved one.")
    run = read_run(checkpoint)
    config = parse_config(run["config"], source=str(checkpoint))
    data = open_split(config, split, run["tokenizer"])
    model = load_model(config, data, checkpoint, device)
    scores = evaluate(model, data, prompts_beside(data), rerank)

    name = split if split == "heldout" else Path(split).resolve().parent.name
    path = run_folder / f"evaluation-{name}-step-{run['step']:09d}.json"
    figures = {score.name: {"value": score.value, "chance": score.chance} for score in scores}
    content = {"checkpoint": str(checkpoint), "samples": len(data), "scores": figures}
    path.write_text(to_json(content, indent=1), encoding="utf-8")
    print(f"{run_folder}, step {run['step']}, {len(data)} pairs of {name}:")
    table = Table()
    for heading in ("", "score", "chance"):
        table.add_column(heading, justify="left" if not heading else "right")
    for score in scores:
        table.add_row(score.name, f"{score.value:.3f}", f"{score.chance:.3f}")
    Console().print(table)
    print(f"Written to {path}.")


def open_split(config: Config, split: str, tokenizer: str) -> HeldoutData:
    """The pairs to evaluate on, with the tokenizer that the run was trained with."""
    data_config = config.data if split == "heldout" else config.data.model_copy(update={"heldout": Path(split)})
    masked_lm = config.objectives.masked_lm
    data = HeldoutData(
        data_config,
        image_size=config.model.image.size,
        text_length=config.model.text.length,
        mask_probability=masked_lm.probability if masked_lm else 0.15,
        seed=config.seed,
    )
    if data.tokenizer.fingerprint != tokenizer:
        raise DataError(
            f"{config.data.tokenizer} is not the tokenizer that the run was trained with: put the old one back."
        )
    return data


def load_model(config: Config, data: HeldoutData, checkpoint: Path, device: torch.device) -> VisionLanguageModel:
    """The model with a checkpoint's master weights, in the type it was trained in."""
    specs = layer_specs(config, data.tokenizer.vocab_size)
    model = build_model(specs, config, data.tokenizer.pad_id, device)
    read_fragments(
        checkpoint, [Fragment(n, whole(p), 0, {"master": p.data.view(-1)}) for n, p in model.named_parameters()]
    )
    return model.to(training_dtype(config.engine, device)).eval()


def evaluate(model: VisionLanguageModel, data: HeldoutData, prompts: dict | None, rerank: int) -> list[Score]:
    """Every figure that the model's objectives allow."""
    split = encode_split(model, data)
    similarity = split.image_embeddings @ split.text_embeddings.T  # (N images, N captions)
    relevant = split.caption_ids[:, None] == split.caption_ids[None, :]
    scores = [
        *_recalls("text-to-image", "", similarity.T, relevant.T),
        *_recalls("image-to-text", "", similarity, relevant),
    ]
    if hasattr(model, "matching_head"):
        ranked = rerank_by_matching(model, split, similarity, min(rerank, len(data)))
        scores += [
            *_recalls("text-to-image", ", re-ranked", ranked[1].T, relevant.T),
            *_recalls("image-to-text", ", re-ranked", ranked[0], relevant),
            Score("matching accuracy, random negatives", matching_accuracy(model, split), 0.5),
        ]
    if hasattr(model, "masked_lm_head"):
        scores.append(Score("masked-LM accuracy", masked_lm_accuracy(model, split), 1 / data.tokenizer.vocab_size))
    if prompts is not None:
        value = zero_shot_accuracy(model, data, split, prompts)
        scores.append(
            Score(f"zero-shot accuracy, {len(prompts['classes'])} classes", value, 1 / len(prompts["classes"]))
        )
    return scores


@dataclass(frozen=True)
class EncodedSplit:
    """The split after the towers, on the CPU."""

    image_embeddings: Tensor  # (N, E)
    text_embeddings: Tensor  # (N, E)
    images: Tensor  # (N, P, D)
    texts: Tensor  # (N, L, D)
    masks: Tensor  # (N, L)
    masked_texts: Tensor  # (N, L, D)
    masked_masks: Tensor  # (N, L)
    masked_positions: Tensor  # (N, K)
    masked_targets: Tensor  # (N, K)
    image_ids: Tensor  # (N,)
    caption_ids: Tensor  # (N,)
    records: list[Record]


def encode_split(model: VisionLanguageModel, data: HeldoutData) -> EncodedSplit:
    """Runs both towers over every image, caption and masked caption."""
    columns: list[tuple[Tensor, ...]] = []
    records: list[Record] = []
    for batch in data.batches(BATCH, records=True):
        fields = batch.to(_device(model)).tensors()
        flow = start_flow(**fields, pad_id=model.pad_id)
        flow = _run_towers(model, flow)
        B = len(batch)
        rows = (
            _layer(model, "align", Align).embed_image(flow.image),
            _layer(model, "align", Align).embed_text(flow.text[:B]),
            flow.image,
            flow.text[:B],
            flow.text_mask[:B],
            flow.text[B:],
            flow.text_mask[B:],
            *(fields[name] for name in ("masked_positions", "masked_targets", "image_ids", "caption_ids")),
        )
        columns.append(tuple(row.cpu() for row in rows))
        records += batch.records
    tensors = (torch.cat(column)[: len(data)] for column in zip(*columns, strict=True))  # the last batch wraps around
    return EncodedSplit(*tensors, records=records[: len(data)])


def rerank_by_matching(
    model: VisionLanguageModel, split: EncodedSplit, similarity: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Similarities in which each query's `top` candidates are ordered by the matching head, before all others.

    Returns:
        Two (N images, N captions) tensors: one whose rows (images) were the queries, one whose columns were.
    """
    N = len(similarity)
    best_texts = similarity.topk(top, dim=1).indices  # (N, top)
    best_images = similarity.topk(top, dim=0).indices.T  # (N, top)
    own = torch.arange(N)[:, None].expand(N, top)
    by_image, by_text = similarity.clone(), similarity.clone()
    for target, images, texts in ((by_image, own, best_texts), (by_text, best_images, own)):
        images, texts = images.flatten(), texts.flatten()
        margins = match_margins(model, split, images, texts)
        target[images, texts] = margins + 1e4  # above every cosine; margins are small numbers
    return by_image, by_text


def match_margins(model: VisionLanguageModel, split: EncodedSplit, images: Tensor, texts: Tensor) -> Tensor:
    """How much more the matching head says "together" than "apart" of each pair. (N,), (N,) indices -> (N,)."""
    head = _layer(model, "matching_head", MatchingHead)
    margins = []
    for rows in torch.arange(len(images)).split(4 * BATCH):
        shown, inverse = images[rows].unique(return_inverse=True)
        logits = head.logits(
            _fuse(model, split.images[shown], inverse, split.texts[texts[rows]], split.masks[texts[rows]])
        ).float()
        margins.append((logits[:, 1] - logits[:, 0]).cpu())
    return torch.cat(margins)


def matching_accuracy(model: VisionLanguageModel, split: EncodedSplit) -> float:
    """Balanced: each image once with its own caption, once with that of a random sample that differs in both."""
    N = len(split.caption_ids)
    generator = torch.Generator().manual_seed(0)
    different = (split.caption_ids[:, None] != split.caption_ids) & (split.image_ids[:, None] != split.image_ids)
    partners = (torch.rand(N, N, generator=generator) * different).argmax(dim=1)
    matched = match_margins(model, split, torch.arange(N), torch.arange(N)) > 0
    mismatched = match_margins(model, split, torch.arange(N), partners) <= 0
    return float(torch.cat([matched, mismatched]).float().mean())


def masked_lm_accuracy(model: VisionLanguageModel, split: EncodedSplit) -> float:
    """Share of hidden pieces that are named rightly, the image in sight."""
    head = _layer(model, "masked_lm_head", MaskedLMHead)
    right = asked = 0
    for rows in torch.arange(len(split.caption_ids)).split(BATCH):
        fused = _fuse(
            model, split.images[rows], torch.arange(len(rows)), split.masked_texts[rows], split.masked_masks[rows]
        )
        answers = head.logits(fused, split.masked_positions[rows].to(fused.device)).argmax(dim=2).cpu()
        targets = split.masked_targets[rows]
        right += int((answers == targets).sum())
        asked += int((targets != UNUSED).sum())
    return right / max(asked, 1)


def zero_shot_accuracy(model: VisionLanguageModel, data: HeldoutData, split: EncodedSplit, prompts: dict) -> float:
    """Each image's class by the nearest mean of its classes' prompts. Source: CLIP, section 3.1.4."""
    classes = prompts["classes"]
    means = []
    for captions in classes.values():
        embeddings = torch.cat([_embed_captions(model, data, part) for part in _chunks(captions, BATCH)])
        means.append(torch.nn.functional.normalize(embeddings.mean(dim=0), dim=0))
    guesses = (split.image_embeddings @ torch.stack(means).T).argmax(dim=1)
    names = list(classes)
    truths = [str(record.metadata.get(prompts["field"])) for record in split.records]
    right = [names[guess] == truth for guess, truth in zip(guesses.tolist(), truths, strict=True)]
    return sum(right) / len(right)


def prompts_beside(data: HeldoutData) -> dict | None:
    """`prompts.json` next to the manifest: the metadata field that names the class, and each class's prompts."""
    path = data.manifest.path.with_name("prompts.json")
    if not path.exists():
        return None
    try:
        prompts = json.loads(decode_text(path.read_bytes()))
        if not (isinstance(prompts["field"], str) and prompts["classes"] and all(prompts["classes"].values())):
            raise ValueError("no field, or a class without prompts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path} cannot be used ({error}): write {{"field": "label", "classes": {{"cat": ["a photo of a cat"]}}}}.'
        ) from None
    return prompts


def _recalls(direction: str, suffix: str, similarity: Tensor, relevant: Tensor) -> Iterator[Score]:
    chance = chance_recall(relevant)
    for k, value in recall(similarity, relevant).items():
        yield Score(f"{direction} R@{k}{suffix}", value, chance[k])


def _embed_captions(model: VisionLanguageModel, data: HeldoutData, captions: list[str]) -> Tensor:
    embed = _layer(model, "text_embed", TextEmbed)
    rows = [data.tokenizer.encode(caption, len(embed.position))[0] for caption in captions]
    ids = torch.stack([torch.from_numpy(row) for row in rows]).to(_device(model))
    text, mask = embed.embed(ids), (ids != model.pad_id).long()
    for layer in model.children():
        if isinstance(layer, TextBlock):
            text = layer.transform(text, mask)
    return _layer(model, "align", Align).embed_text(text).cpu()


def _run_towers(model: VisionLanguageModel, flow: Flow) -> Flow:
    for name, layer in model.named_children():
        if name.startswith(("image_", "text_")):
            flow = layer(flow)
    return flow


def _fuse(model: VisionLanguageModel, images: Tensor, image_rows: Tensor, texts: Tensor, masks: Tensor) -> Tensor:
    """Text rows after the fusion layers. (B, P, D) images, (R,) the image of each row, (R, L, D), (R, L)."""
    device = _device(model)
    memory, rows, text, mask = images.to(device), image_rows.to(device), texts.to(device), masks.to(device)
    for layer in model.children():
        if isinstance(layer, FusionBlock):
            text = layer.transform(text, mask, memory, rows)
    return text


def _layer(model: VisionLanguageModel, name: str, kind: type[LayerT]) -> LayerT:
    layer = model.get_submodule(name)
    assert isinstance(layer, kind)
    return layer


def _device(model: VisionLanguageModel) -> torch.device:
    return next(model.parameters()).device


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))
