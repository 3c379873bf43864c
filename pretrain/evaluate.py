"""Evaluation of a run on held-out pairs: retrieval, zero-shot classification, matching, masked language modelling.

One process, no engine: any checkpoint loads into a plain model.
Shapes: N samples, L text length, P patches, D width, E embedding width, K masked slots.
"""

import contextlib
import copy
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor, nn

from data_pipelines.batch import Record
from data_pipelines.errors import DataError
from data_pipelines.heldout import HeldoutData
from data_pipelines.manifest import normalised, write_atomically
from data_pipelines.tokenizer import Tokenizer
from pretrain.checkpoint.fragments import read_fragments
from pretrain.checkpoint.store import CheckpointStore, read_run
from pretrain.config import Config, parse_config
from pretrain.errors import CheckpointError, ConfigError
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
from pretrain.retrieval import Gallery, Recall, Reranker
from pretrain.run_folder import kept_tokenizers
from pretrain.screen import say

HELDOUT = "heldout"  # the name of the split that the run's config names
LayerT = TypeVar("LayerT", bound=nn.Module)
BATCH = 64  # samples, or pairs, in one forward pass


@dataclass(frozen=True)
class Score:
    """One figure, and what guessing would score."""

    name: str
    value: float
    chance: float


@torch.no_grad()
def main(run_folder: Path, split: str, rerank: int, *, step: int | None = None, overrides: Sequence[str] = ()) -> None:
    """Evaluates a checkpoint of a run, the newest valid one by default: a table, and JSON beside the run.

    Raises:
        UserError: what is needed is not there. A figure that cannot be had, or the file, costs neither the others.
    """
    if rerank < 0:
        raise ConfigError(f"--rerank {rerank} is below 0: give a number of candidates, or 0 to rank nothing again.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = CheckpointStore(run_folder / "checkpoints", ALONE, keep=2)
    checkpoint = store.newest_valid(quarantine=False, step=step)
    if checkpoint is None:
        raise CheckpointError(f"No checkpoint in {store.folder}: give the output folder of a run that has saved one.")
    with _still_there(checkpoint):
        run = read_run(checkpoint)
    config = parse_config(copy.deepcopy(run["config"]), str(checkpoint), overrides)
    if split != HELDOUT:
        config = config.model_copy(update={"data": config.data.model_copy(update={"heldout": Path(split)})})
    data = open_split(config, run_folder, run["tokenizer"])
    with _still_there(checkpoint):
        model = load_model(config, data, checkpoint, device)
    if complaint := data.complaint():
        say(complaint)
    prompts = prompts_beside(data)
    evaluated = encode_split(model, data)
    scores = evaluate(model, data, evaluated, rerank)
    problems = []
    if prompts is not None:
        try:
            scores.append(zero_shot(model, data, evaluated, prompts))
        except DataError as error:
            problems.append(str(error))

    name = name_of(data, run["config"]["data"]["heldout"])
    say(f"{run_folder}, step {run['step']}, {len(data)} pairs of {name}, {len(evaluated.gallery.images)} images:")
    table = Table()
    for heading in ("", "score", "chance"):
        table.add_column(heading, justify="left" if not heading else "right")
    for score in scores:
        table.add_row(score.name, f"{score.value:.3f}", f"{score.chance:.3f}")
    with contextlib.suppress(OSError):
        Console().print(table)
    path = run_folder / f"evaluation-{name}-step-{run['step']:09d}.json"
    try:
        write_atomically(path, lambda tmp: tmp.write_text(report(checkpoint, data, scores)))
        say(f"Written to {path}.")
    except DataError as error:
        problems.append(f"{error} The figures above are complete.")
    if problems:
        raise DataError("\n".join(problems))


def report(checkpoint: Path, data: HeldoutData, scores: list[Score]) -> str:
    """The scores, and what they were measured on, as JSON."""
    figures = {
        score.name: {"value": score.value if math.isfinite(score.value) else None, "chance": score.chance}
        for score in scores
    }
    content = {
        "checkpoint": str(checkpoint),
        "manifest": str(data.manifest.path),
        "manifest_hash": data.manifest.hash,
        "samples": len(data),
        "bad_samples": len(data.bad),
        "scores": figures,
    }
    return json.dumps(content, indent=1, allow_nan=False)


def name_of(data: HeldoutData, heldout: str | None) -> str:
    """The name of a split in messages and files: no two manifests have the same."""
    if heldout is not None and data.manifest.path == normalised(Path(heldout)):
        return HELDOUT
    return f"{data.manifest.path.parent.name}-{data.manifest.hash[:8]}"


@contextlib.contextmanager
def _still_there(checkpoint: Path) -> Iterator[None]:
    """A live run removes old checkpoints, also one that is being read."""
    try:
        yield
    except (OSError, SafetensorError):
        if checkpoint.exists():
            raise
        raise CheckpointError(
            f"{checkpoint} was removed while it was read, as a run does that goes on: evaluate again, or raise "
            f"checkpoint.keep."
        ) from None


def open_split(config: Config, run_folder: Path, fingerprint: str) -> HeldoutData:
    """The pairs to evaluate on, with the tokenizer that the run was trained with, and all of them looked at."""
    masked_lm = config.objectives.masked_lm
    path = find_tokenizer([*kept_tokenizers(run_folder), config.data.tokenizer], fingerprint)
    data = HeldoutData(
        config.data.model_copy(update={"tokenizer": path}),
        image_size=config.model.image.size,
        text_length=config.model.text.length,
        mask_probability=masked_lm.probability if masked_lm else 0.15,
        seed=config.seed,
    )
    data.examine()
    return data


def find_tokenizer(paths: Sequence[Path], fingerprint: str) -> Path:
    """The first of some paths that holds the tokenizer a run was trained with."""
    for path in paths:
        with contextlib.suppress(DataError):
            if Tokenizer.load(path).fingerprint == fingerprint:
                return path
    raise DataError(
        f"The tokenizer that the run was trained with is not at {' or '.join(map(str, paths))}: put it back, or say "
        f"where it is with data.tokenizer=PATH. Another one would make other words of the same ids."
    )


def load_model(config: Config, data: HeldoutData, checkpoint: Path, device: torch.device) -> VisionLanguageModel:
    """The model with a checkpoint's master weights, in the type it was trained in."""
    specs = layer_specs(config, data.tokenizer.vocab_size)
    model = build_model(specs, config, data.tokenizer.pad_id, device)
    read_fragments(
        checkpoint, [Fragment(n, whole(p), 0, {"master": p.data.view(-1)}) for n, p in model.named_parameters()]
    )
    return model.to(training_dtype(config.engine, device)).eval()


def evaluate(model: VisionLanguageModel, data: HeldoutData, split: "EncodedSplit", rerank: int) -> list[Score]:
    """Every figure that the model's objectives allow."""
    gallery = split.gallery
    scores = [
        *_recalls("text-to-image", "", gallery.text_to_image()),
        *_recalls("image-to-text", "", gallery.image_to_text()),
    ]
    if hasattr(model, "matching_head"):
        if rerank:
            by_text, by_image = rerankers(model, split)
            scores += [
                *_recalls("text-to-image", ", re-ranked", gallery.text_to_image(rerank, by_text)),
                *_recalls("image-to-text", ", re-ranked", gallery.image_to_text(rerank, by_image)),
            ]
        scores.append(Score("matching accuracy, random negatives", matching_accuracy(model, split), 0.5))
    if hasattr(model, "masked_lm_head"):
        scores.append(Score("masked-LM accuracy", masked_lm_accuracy(model, split), 1 / data.tokenizer.vocab_size))
    return scores


@dataclass(frozen=True)
class EncodedSplit:
    """The split after the towers, on the CPU."""

    gallery: Gallery
    images: Tensor  # (N, P, D)
    texts: Tensor  # (N, L, D)
    masks: Tensor  # (N, L)
    masked_texts: Tensor  # (N, L, D)
    masked_masks: Tensor  # (N, L)
    masked_positions: Tensor  # (N, K)
    masked_targets: Tensor  # (N, K)
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
    # The last batch wraps around.
    image, text, *tokens, image_ids, caption_ids = (
        torch.cat(column)[: len(data)] for column in zip(*columns, strict=True)
    )
    return EncodedSplit(Gallery.of(image, text, image_ids, caption_ids), *tokens, records=records[: len(data)])


def rerankers(model: VisionLanguageModel, split: EncodedSplit) -> tuple[Reranker, Reranker]:
    """What the matching head makes of each query's candidates: for captions that look for images, and for images."""

    def by_text(texts: Tensor, images: Tensor) -> Tensor:  # (Q,), (Q, top)
        pairs = split.gallery.first_pair[images]
        return match_margins(model, split, pairs.flatten(), texts.repeat_interleave(images.shape[1])).view_as(images)

    def by_image(images: Tensor, texts: Tensor) -> Tensor:
        pairs = split.gallery.first_pair[images]
        return match_margins(model, split, pairs.repeat_interleave(texts.shape[1]), texts.flatten()).view_as(texts)

    return by_text, by_image


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
    """Balanced: each pair once as it is, and its image once with the caption of a random other."""
    pairs, partners = split.gallery.random_negatives(torch.Generator().manual_seed(0))
    matched = match_margins(model, split, pairs, pairs) > 0
    mismatched = match_margins(model, split, pairs, partners) <= 0
    return float(torch.cat([matched, mismatched]).float().mean())


def masked_lm_accuracy(model: VisionLanguageModel, split: EncodedSplit) -> float:
    """Share of hidden pieces that are named rightly, the image in sight."""
    head = _layer(model, "masked_lm_head", MaskedLMHead)
    right = asked = 0
    for rows in torch.arange(len(split.texts)).split(BATCH):
        fused = _fuse(
            model, split.images[rows], torch.arange(len(rows)), split.masked_texts[rows], split.masked_masks[rows]
        )
        answers = head.logits(fused, split.masked_positions[rows].to(fused.device)).argmax(dim=2).cpu()
        targets = split.masked_targets[rows]
        right += int((answers == targets).sum())
        asked += int((targets != UNUSED).sum())
    return right / max(asked, 1)


def zero_shot(model: VisionLanguageModel, data: HeldoutData, split: EncodedSplit, prompts: "Prompts") -> Score:
    """Each image's class by the nearest mean of its classes' prompts, among the classes that occur.

    Source: CLIP, section 3.1.4.

    Raises:
        DataError: no image has a class.
    """
    gallery = split.gallery
    metadata = [split.records[pair].metadata for pair in gallery.first_pair.tolist()]
    truths = [str(fields[prompts.field]) if prompts.field in fields else None for fields in metadata]
    names = [name for name in prompts.classes if name in set(truths)]
    if not names:
        found = ", ".join(sorted({truth for truth in truths if truth is not None})[:5])
        raise DataError(
            f"No zero-shot accuracy: the field {prompts.field!r} of the samples' json "
            + (f"names none of the classes of {prompts.path}, but {found}." if found else "is in none of them.")
        )
    means = []
    for name in names:
        embeddings = torch.cat([_embed_captions(model, data, part) for part in _chunks(prompts.classes[name], BATCH)])
        means.append(torch.nn.functional.normalize(embeddings.mean(dim=0), dim=0))
    guesses = (gallery.images @ torch.stack(means).T).argmax(dim=1).tolist()
    right = [names[guess] == truth for guess, truth in zip(guesses, truths, strict=True) if truth in names]
    left_out = f" of {len(prompts.classes)}" if len(names) < len(prompts.classes) else ""
    if len(right) < len(truths):
        say(f"Zero-shot: {len(truths) - len(right)} of {len(truths)} images have no class of {prompts.path}.")
    return Score(f"zero-shot accuracy, {len(names)}{left_out} classes", sum(right) / len(right), 1 / len(names))


@dataclass(frozen=True)
class Prompts:
    """What names a sample's class, and what is said of each class."""

    path: Path
    field: str
    classes: dict[str, list[str]]


def prompts_beside(data: HeldoutData) -> Prompts | None:
    """`prompts.json` next to the manifest: the metadata field that names the class, and each class's prompts."""
    path = data.manifest.path.with_name("prompts.json")
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        classes = {name: [said] if isinstance(said, str) else said for name, said in content["classes"].items()}
        if not isinstance(content["field"], str) or not classes:
            raise ValueError("no field, or no classes")
        for name, said in classes.items():
            if not (isinstance(said, list) and said and all(isinstance(prompt, str) and prompt for prompt in said)):
                raise ValueError(f"the prompts of {name!r} are no list of texts")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path} cannot be used ({error}): write {{"field": "label", "classes": {{"cat": ["a photo of a cat"]}}}}.'
        ) from None
    return Prompts(path, content["field"], classes)


def _recalls(direction: str, suffix: str, recalls: dict[int, Recall]) -> Iterator[Score]:
    for k, (value, chance) in recalls.items():
        yield Score(f"{direction} R@{k}{suffix}", value, chance)


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
