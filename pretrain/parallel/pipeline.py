"""Pipeline parallelism: the list of layers is cut into stages, through which micro-batches run one after the other."""

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.models.align import Align, Embeddings, find_pulls
from pretrain.models.flow import OBJECTIVES
from pretrain.models.model import Output, VisionLanguageModel
from pretrain.parallel.engine import Inputs
from pretrain.parallel.mesh import Axis, Mesh, training_dtype
from pretrain.parallel.parcel import Parcels


class Stage(nn.Module):
    """This rank's layers: takes a parcel from the stage before and gives one to the next; the last one gives a loss.

    Every stage reads the same samples, so that what the batch alone makes does not travel.
    """

    def __init__(self, model: VisionLanguageModel, pp: Axis, carrier: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.is_first, self.is_last = pp.rank == 0, pp.rank == pp.size - 1
        self.parcels = Parcels(carrier)
        self.unused = nn.ParameterList()  # what an optimizer wants to have here, and no layer has
        self.outputs: list[Output] = []  # of the last stage, one a micro-batch
        self._waiting: deque[dict[str, Tensor]] = deque()

    def begin(self, micro_batches: Sequence[Inputs], pulls: Sequence[dict[str, Tensor]]) -> None:
        """The micro-batches that the coming calls are about, in their order, each with the pulls on its embeddings."""
        assert not self._waiting, "each micro-batch runs once"
        self._waiting.extend(batch.tensors() | pull for batch, pull in zip(micro_batches, pulls, strict=True))
        self.outputs = []

    def forward(self, received: Tensor) -> Tensor:
        """A parcel, which the first stage does not look at -> a parcel, or on the last stage a scalar loss."""
        fresh = self.model.start(**self._waiting.popleft())
        flow = self.model.run(fresh if self.is_first else self.parcels.unpack(received, fresh))
        if not self.is_last:
            return self.parcels.pack(flow, fresh)
        output = self.model.summarise(flow)
        self.outputs.append(output._replace(loss=output.loss.detach()))
        # DeepSpeed skips a step by its gradient norm alone: a loss that is not finite must reach the norm.
        return output.loss * torch.where(output.loss.isfinite(), 1.0, torch.nan)

    def embed(self, batch: Inputs, received: Tensor) -> Tensor | Embeddings:
        """The same with the towers alone: the stage that aligns gives embeddings."""
        fresh = self.model.start_clean(**batch.tensors())
        result = self.model.run_towers(fresh if self.is_first else self.parcels.unpack(received, fresh))
        return result if isinstance(result, Embeddings) else self.parcels.pack(result, fresh)


class Link:
    """What a stage says to its neighbours: parcels go to the next one, their gradients to the one before.

    The first stage has none before it, and the last one none behind: there, nothing is sent, and what is received is
    empty.
    """

    def __init__(self, pp: Axis, device: torch.device, carrier: torch.dtype) -> None:
        self.pp = pp
        self.stages_behind = pp.size - 1 - pp.rank
        self._nothing = torch.empty(0, dtype=carrier, device=device)
        self._length_in: int | None = None  # parcels of one pass are equally long
        self._announced = False

    def begin(self) -> None:
        """Before each pass over micro-batches."""
        self._length_in, self._announced = None, False

    def receive(self) -> Tensor:
        if self.pp.rank == 0:
            return self._nothing
        if self._length_in is None:
            length = torch.empty(1, dtype=torch.int64, device=self._nothing.device)
            self._exchange(from_previous=length)
            self._length_in = int(length)
        parcel = self._nothing.new_empty(self._length_in)
        self._exchange(from_previous=parcel)
        return parcel.requires_grad_(torch.is_grad_enabled())

    def send(self, parcel: Tensor) -> None:
        if not self.stages_behind:
            return
        if not self._announced:
            self._exchange(to_next=torch.tensor([len(parcel)], device=parcel.device))
            self._announced = True
        self._exchange(to_next=parcel.detach())

    def send_gradient(self, gradient: Tensor | None) -> None:
        if self.pp.rank > 0:
            self._exchange(to_previous=gradient)

    def receive_gradient(self, parcel: Tensor, *, send: bool = False) -> Tensor:
        """The gradient of an earlier parcel, as long as `parcel`; with `send`, `parcel` goes out meanwhile."""
        if not self.stages_behind:
            return self._nothing
        gradient = torch.empty_like(parcel)
        self._exchange(to_next=parcel.detach() if send else None, from_next=gradient)
        return gradient

    def send_gradient_and_receive(self, gradient: Tensor | None) -> Tensor:
        """The next parcel, while the gradient of an earlier one goes back."""
        if self.pp.rank == 0:
            return self._nothing
        assert gradient is not None
        parcel = torch.empty_like(gradient)
        self._exchange(to_previous=gradient, from_previous=parcel)
        return parcel.requires_grad_()

    def _exchange(
        self,
        to_next: Tensor | None = None,
        to_previous: Tensor | None = None,
        from_next: Tensor | None = None,
        from_previous: Tensor | None = None,
    ) -> None:
        # All at once: two neighbours that both send first would wait for each other on NCCL.
        moves = [
            (dist.isend, to_next, self.pp.rank + 1),
            (dist.isend, to_previous, self.pp.rank - 1),
            (dist.irecv, from_next, self.pp.rank + 1),
            (dist.irecv, from_previous, self.pp.rank - 1),
        ]
        operations = [
            dist.P2POp(move, tensor, group=self.pp.group, group_peer=peer)
            for move, tensor, peer in moves
            if tensor is not None
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()


class Pipeline:
    """A stage and its neighbours: what both engines that run one have in common."""

    def __init__(self, model: VisionLanguageModel, config: Config, mesh: Mesh) -> None:
        carrier = training_dtype(config.engine, mesh.device)
        self.pp, self.dp, self.device = mesh.pp, mesh.dp, mesh.device
        self.embed_width = config.model.embed
        self.global_negatives = config.objectives.contrastive.negatives == "global_batch"
        aligns = any(isinstance(layer, Align) for layer in model.children())
        # On NCCL, all ranks of a group take part in its first operation, or wait for ever: it must not be the first
        # pass's, in which stages behind the one that aligns have no part.
        here = torch.tensor(mesh.pp.rank if aligns else 0, device=mesh.device)
        self.align_stage = int(mesh.pp.sum(here))
        self.stage = Stage(model, mesh.pp, carrier)
        self.link = Link(mesh.pp, mesh.device, carrier)

    def begin(self, micro_batches: Sequence[Inputs]) -> None:
        """Before the micro-batches of an optimizer step run through the stages."""
        pulls = self._find_pulls(micro_batches) if self.global_negatives else None
        self.stage.begin(micro_batches, pulls or [{}] * len(micro_batches))

    @torch.no_grad()
    def _find_pulls(self, micro_batches: Sequence[Inputs]) -> list[dict[str, Tensor]] | None:
        """What the stage that aligns needs to know of the whole step: the towers run once before."""
        if self.pp.rank > self.align_stage:
            return None
        parts: list[Embeddings] = []
        self.link.begin()
        for batch in micro_batches:
            result = self.stage.embed(batch, self.link.receive())
            if isinstance(result, Embeddings):
                parts.append(result)
            else:
                self.link.send(result)
        return find_pulls(parts, self.dp.group) if parts else None

    def run(self, count: int) -> None:
        """Forward and backward passes of `count` micro-batches, each forward pass followed by a backward pass.

        A stage holds the activations of as many micro-batches as there are stages from it to the end.
        Source: Narayanan et al., Efficient large-scale language model training on GPU clusters (2021), section 2.2.
        """
        running: deque[tuple[Tensor, Tensor]] = deque()

        def forward(received: Tensor) -> Tensor:
            running.append((received, self.stage(received)))
            return running[-1][1]

        def backward(gradient: Tensor) -> Tensor | None:
            received, result = running.popleft()
            if self.link.stages_behind:
                result.backward(gradient)
            else:
                (result / count).backward()
            return received.grad

        self.link.begin()
        ahead = min(self.link.stages_behind, count)
        for _ in range(ahead):
            self.link.send(forward(self.link.receive()))
        received = self.link.receive() if ahead < count else None
        for number in range(ahead, count):
            assert received is not None
            gradient = backward(self.link.receive_gradient(forward(received), send=True))
            if number + 1 < count:
                received = self.link.send_gradient_and_receive(gradient)
            else:
                self.link.send_gradient(gradient)
        for _ in range(ahead):
            self.link.send_gradient(backward(self.link.receive_gradient(running[0][1])))

    def results(self, count: int) -> tuple[Tensor, Tensor]:
        """Losses and counts of the micro-batches that ran, on all stages: (3,) means and (3, 2) sums."""
        losses = torch.zeros(len(OBJECTIVES), device=self.device)
        counts = torch.zeros(len(OBJECTIVES), 2, dtype=torch.int64, device=self.device)
        for output in self.stage.outputs:
            losses, counts = losses + output.losses / count, counts + output.counts
        return self.pp.sum(losses), self.pp.sum(counts)

    @torch.no_grad()
    def evaluate(self, batch: Inputs) -> Output:
        """A forward pass, whose output all stages get."""
        self.stage.begin([batch], [{}])
        self.link.begin()
        self.link.send(self.stage(self.link.receive()))
        embeddings = torch.zeros(len(batch.tensors()["positions"]), self.embed_width, device=self.device)
        losses, counts = self.results(1)
        loss = torch.zeros((), device=self.device)
        images, texts = embeddings, embeddings.clone()
        for output in self.stage.outputs:  # of the last stage
            loss, images, texts = output.loss, output.image_embeddings, output.text_embeddings
        return Output(self.pp.sum(loss), losses, counts, self.pp.sum(images), self.pp.sum(texts))
