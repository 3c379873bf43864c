"""One rank's fragments on disk: a safetensors file of boxes, and the index that says where every box lies."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pretrain.checkpoint.boxes import Box, boxes_of_slice
from pretrain.errors import CheckpointError
from pretrain.parallel.engine import Fragment


@dataclass(frozen=True)
class Written:
    """What one rank wrote: its file's size and hash, and the boxes inside it."""

    file: str
    bytes: int
    sha256: str
    boxes: dict[str, list[Box]]  # by parameter
    shapes: dict[str, tuple[int, ...]]


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> Written:
    """Writes the fragments that this rank saves, hashing while it writes, and waits for the disk.

    Raises:
        OSError: the disk is full, gone or read-only.
    """
    pieces: dict[str, Tensor] = {}
    boxes: dict[str, list[Box]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for fragment in fragments:
        if not fragment.saved_here:
            continue
        boxes[fragment.name] = _boxes(fragment)
        shapes[fragment.name] = fragment.part.shape
        for kind, flat in fragment.tensors.items():
            lengths = [box.numel for box in boxes[fragment.name]]
            for box, piece in zip(boxes[fragment.name], flat.split(lengths), strict=True):
                pieces[_key(kind, fragment.name, box)] = piece.view(box.size)
    size, digest = _write_safetensors(path, pieces)
    return Written(path.name, size, digest, boxes, shapes)


def merge_index(written: Iterable[Written]) -> dict[str, Any]:
    """The index of a whole checkpoint: for each parameter its shape, and every box with the file that holds it."""
    index: dict[str, Any] = {}
    for part in written:
        for name, boxes in part.boxes.items():
            entry = index.setdefault(name, {"shape": list(part.shapes[name]), "boxes": []})
            entry["boxes"] += [{"file": part.file, "offset": box.offset, "size": box.size} for box in boxes]
    return index


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a checkpoint."""
    index = json.loads((folder / "index.json").read_text())
    return {name: tuple(entry["shape"]) for name, entry in index.items()}


def read_fragments(folder: Path, fragments: Iterable[Fragment]) -> None:
    """Fills the fragments' views from a checkpoint that any layout wrote.

    Raises:
        CheckpointError: the checkpoint lacks a parameter, or has it in another shape.
    """
    index: Mapping[str, Any] = json.loads((folder / "index.json").read_text())
    files: dict[str, Any] = {}
    for fragment in fragments:
        entry = index.get(fragment.name)
        if entry is None or tuple(entry["shape"]) != fragment.part.shape:
            found = "is not in it" if entry is None else f"has shape {tuple(entry['shape'])} in it"
            raise CheckpointError(
                f"The checkpoint {folder} is of another model: {fragment.name} {found}, and shape "
                f"{fragment.part.shape} here. Restore the model section of the config, or start a new run with another "
                f"output folder."
            )
        stored = [(piece["file"], Box(tuple(piece["offset"]), tuple(piece["size"]))) for piece in entry["boxes"]]
        wanted = _boxes(fragment)
        for kind, flat in fragment.tensors.items():
            for target, piece in zip(wanted, flat.split([box.numel for box in wanted]), strict=True):
                for file, source in stored:
                    if (common := target.intersect(source)) is not None:
                        if file not in files:
                            files[file] = safe_open(folder / file, framework="pt")
                        values = files[file].get_slice(_key(kind, fragment.name, source))
                        view = piece.view(target.size)[common.slices_in(target)]
                        view.copy_(values[common.slices_in(source)])


def _boxes(fragment: Fragment) -> list[Box]:
    """Where a fragment lies in the whole parameter, in the order of its elements."""
    part = fragment.part
    return [
        Box(tuple(a + b for a, b in zip(part.offset, box.offset, strict=True)), box.size)
        for box in boxes_of_slice(fragment.start, fragment.stop, part.size)
    ]


def _key(kind: str, name: str, box: Box) -> str:
    return f"{kind}/{name}/{','.join(map(str, box.offset))}"


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Streams fp32 tensors into a safetensors file; returns its size in bytes and its sha256.

    The library's own writer takes the whole file in memory and cannot hash on the way.
    Source: the format's description, https://huggingface.co/docs/safetensors.
    """
    header: dict[str, Any] = {}
    position = 0
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        end = position + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text, *map(_bytes_of, tensors.values())):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().numpy().reshape(-1).view("uint8").data
