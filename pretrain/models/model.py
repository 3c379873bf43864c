"""The model: runs its layers in order and names what comes out.

Shapes: B samples on this rank, E embedding width.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import Config
from pretrain.models.align import Align, Embeddings
from pretrain.models.architectures import LayerSpec
from pretrain.models.flow import OBJECTIVES, Flow, start_flow
from pretrain.models.initial import build_layer
from pretrain.models.layers import Block


class Output(NamedTuple):
    """What one pass over a micro-batch says."""

    loss: Tensor  # scalar: the weighted sum that is optimised
    losses: Tensor  # (3,) float32, unweighted and detached, in the order of OBJECTIVES
    counts: Tensor  # (3, 2) int64: right answers and questions
    image_embeddings: Tensor  # (B, E) float32, unit length, detached
    text_embeddings: Tensor  # (B, E)


class VisionLanguageModel(nn.Module):
    """An ordered list of layers with the objectives inside it."""

    def __init__(self, layers: Mapping[str, nn.Module], config: Config, pad_id: int) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.pad_id = pad_id
        self.masked = config.objectives.masked_lm is not None
        self.recompute = config.engine.activation_checkpointing
        weights = [getattr(config.objectives, name) for name in OBJECTIVES]
        self.weights = [section.weight if section else 0.0 for section in weights]

    def forward(self, **batch: Tensor) -> Output:
        """One pass for every objective. The arguments are a Batch's tensors, by name."""
        return self.summarise(self.run(self.start(**batch)))

    def start(self, masked_text: Tensor, **batch: Tensor) -> Flow:
        """The flow before the first layer."""
        return start_flow(masked_text=masked_text if self.masked else None, pad_id=self.pad_id, **batch)

    def start_clean(self, masked_text: Tensor, **batch: Tensor) -> Flow:
        """The same without masked captions, of which embeddings know nothing."""
        return start_flow(masked_text=None, pad_id=self.pad_id, **batch)

    def run(self, flow: Flow) -> Flow:
        """The flow after the last layer."""
        for layer in self.children():
            if self.recompute and isinstance(layer, Block) and torch.is_grad_enabled():
                flow = checkpoint(layer, flow, use_reentrant=False, preserve_rng_state=False)  # no layer draws
            else:
                flow = layer(flow)
        return flow

    def embed(self, **batch: Tensor) -> Embeddings:
        """The towers alone, as far as the contrastive objective needs them. The arguments are those of `forward`."""
        embeddings = self.run_towers(self.start_clean(**batch))
        assert isinstance(embeddings, Embeddings), "every architecture aligns"
        return embeddings

    def run_towers(self, flow: Flow) -> Flow | Embeddings:
        """What the layer that aligns makes of a clean flow; if it is not here, the flow after the last layer."""
        for layer in self.children():
            if isinstance(layer, Align):
                return layer.embed(flow)
            flow = layer(flow)
        return flow

    def summarise(self, flow: Flow) -> Output:
        weights = torch.tensor(self.weights, device=flow.losses.device)
        return Output(
            loss=(weights * flow.losses).sum(),
            losses=flow.losses.detach(),
            counts=flow.counts,
            image_embeddings=flow.image_embeddings,
            text_embeddings=flow.text_embeddings,
        )


def build_model(specs: Sequence[LayerSpec], config: Config, pad_id: int, device: torch.device) -> VisionLanguageModel:
    """All layers on one device, with their initial weights."""
    return VisionLanguageModel({spec.name: build_layer(spec, config, device) for spec in specs}, config, pad_id)
