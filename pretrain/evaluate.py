"""Evaluation of a run on held-out pairs: retrieval, zero-shot classification, matching, masked language modelling.

One process, no engine: any checkpoint loads into a plain model.
Shapes: N samples, L text length, P patches, D width, E embedding width, K masked slots.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.batch import Record
from data_pipelines.errors import DataError
from data_pipelines.heldout import HeldoutData
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
from pretrain.scores import HELDOUT, Score, name_of, show, write
from pretrain.screen import say
from pretrain.zero_shot import prompts_beside, zero_shot_accuracy

LayerT = TypeVar("LayerT", bound=nn.Module)
BATCH = 64  # samples, or pairs, in one forward pass


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
    with still_there(checkpoint):
        run = read_run(checkpoint)
    config = parse_config(copy.deepcopy(run["config"]), str(checkpoint), overrides)
    if split != HELDOUT:
        config = config.model_copy(update={"data": config.data.model_copy(update={"heldout": Path(split)})})
    data = open_split(config, run_folder, run["tokenizer"])
    with still_there(checkpoint):
        model = load_model(config, data, checkpoint, device)
    if complaint := data.complaint():
        say(complaint)
    prompts = prompts_beside(data.manifest.path)
    evaluated = encode_split(model, data)
    scores = evaluate(model, data, evaluated, rerank)
    problems = []
    if prompts is not None:
        try:
            metadata = [evaluated.records[pair].metadata for pair in evaluated.gallery.first_pair.tolist()]
            embed = partial(_embed_captions, model, data)
            scores.append(zero_shot_accuracy(evaluated.gallery.images, metadata, prompts, embed))
        except DataError as error:
            problems.append(str(error))

    name = name_of(data.manifest, run["config"]["data"]["heldout"])
    say(f"{run_folder}, step {run['step']}, {len(data)} pairs of {name}, {len(evaluated.gallery.images)} images:")
    show(scores)
    path = run_folder / f"evaluation-{name}-step-{run['step']:09d}.json"
    try:
        write(path, scores, checkpoint=checkpoint, data=data)
        say(f"Written to {path}.")
    except DataError as error:
        problems.append(f"{error} The figures above are complete.")
    if problems:
        raise DataError("\n".join(problems))


@contextlib.contextmanager
def still_there(checkpoint: Path) -> Iterator[None]:
    """A live run removes old checkpoints, also one that is being read."""
    try:
        yield
    except FileNotFoundError:
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
    """Runs both towers over every image, caption and masked caption. Tokens are kept where heads need them."""
    keep = slice(None) if hasattr(model, "matching_head") or hasattr(model, "masked_lm_head") else slice(0)
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
            flow.image[:, keep],
            flow.text[:B, keep],
            flow.text_mask[:B, keep],
            flow.text[B:, keep],
            flow.text_mask[B:, keep],
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


def _recalls(direction: str, suffix: str, recalls: dict[int, Recall]) -> Iterator[Score]:
    for k, (value, chance) in recalls.items():
        yield Score(f"{direction} R@{k}{suffix}", value, chance)


def _embed_captions(model: VisionLanguageModel, data: HeldoutData, captions: Sequence[str]) -> Tensor:
    embed = _layer(model, "text_embed", TextEmbed)
    rows = [data.tokenizer.encode(caption, len(embed.position))[0] for caption in captions]
    embeddings = []
    for ids in torch.from_numpy(np.stack(rows)).split(BATCH):
        ids = ids.to(_device(model))
        text, mask = embed.embed(ids), (ids != model.pad_id).long()
        for layer in model.children():
            if isinstance(layer, TextBlock):
                text = layer.transform(text, mask)
        embeddings.append(_layer(model, "align", Align).embed_text(text).cpu())
    return torch.cat(embeddings)


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
