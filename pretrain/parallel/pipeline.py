"""Pipeline parallelism: the list of layers is cut into stages, through which micro-batches run one after the other."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.models.layer import Call, Flow, Layer
from pretrain.models.model import Model, Report, StandIns, report
from pretrain.parallel import first_pass
from pretrain.parallel.loss_limit import LossLimit
from pretrain.parallel.mesh import Axis, Mesh, training_dtype
from pretrain.parallel.message import Messages


class Stage(nn.Module):
    """This rank's layers: takes a message from the stage before and gives one to the next; the last one gives a loss.

    Every stage reads the same samples, so that columns of the batch do not travel.
    """

    def __init__(self, model: Model, stage_of: Mapping[str, int], pp: Axis, messages: Messages) -> None:
        super().__init__()
        self.model, self.stage_of, self.pp, self.messages = model, stage_of, pp, messages
        self.unused = nn.ParameterList()  # what an optimizer wants to have here, and no layer has
        self.reports: list[Report] = []  # of the last stage, one per micro-batch
        self._waiting: deque[tuple[Flow, StandIns]] = deque()
        self._limit: LossLimit

    def begin(self, micro_batches: Sequence[tuple[Flow, StandIns]], limit: LossLimit) -> None:
        """The micro-batches that the coming calls are about, in their order."""
        assert not self._waiting, "each micro-batch runs once"
        self._limit = limit
        self._waiting.extend(micro_batches)
        self.reports = []

    def forward(self, received: Tensor) -> Tensor:
        """A message, which the first stage does not look at -> a message, or on the last stage a scalar loss."""
        have, stand_ins = self._waiting.popleft()
        calls = self.model.calls(self.model.architecture.reports, have)
        flow = self.advance(calls, have, received, stand_ins)
        if self.pp.rank < self.pp.size - 1:
            return self.pack(calls, have, flow)
        result = report(self.model.architecture, flow)
        self.reports.append(result.without_graph())
        return self._limit(result.loss)

    def advance(self, calls: Sequence[Call], have: Flow, received: Tensor, stand_ins: StandIns | None = None) -> Flow:
        """The flow after this stage's layers."""
        names = self._crossing(calls, have, self.pp.rank)
        own = [call for call in calls if self.stage_of[call.layer.name] == self.pp.rank]
        made = self.messages.unpack(received, names, have)
        return self.model.run_calls(own, have, made, stand_ins)

    def pack(self, calls: Sequence[Call], have: Flow, flow: Flow) -> Tensor:
        """What the next stages need of it."""
        return self.messages.pack(flow, self._crossing(calls, have, self.pp.rank + 1))

    def _crossing(self, calls: Sequence[Call], have: Flow, stage: int) -> frozenset[str]:
        """What crosses the border before a stage: all that was made before it and is read or wanted from it on."""
        before = [call for call in calls if self.stage_of[call.layer.name] < stage]
        return before[-1].crossing(have) if before else frozenset()


class Link:
    """What a stage says to its neighbours: messages go to the next one, their gradients to the one before.

    The first stage has none before it, and the last one none behind: there, nothing is sent, and what is received is
    empty.
    """

    def __init__(self, pp: Axis, device: torch.device, carrier: torch.dtype) -> None:
        self.pp = pp
        self.stages_behind = pp.size - 1 - pp.rank
        self._nothing = torch.empty(0, dtype=carrier, device=device)
        self._length_in: int | None = None  # messages of one pass are equally long
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
        message = self._nothing.new_empty(self._length_in)
        self._exchange(from_previous=message)
        return message.requires_grad_(torch.is_grad_enabled())

    def send(self, message: Tensor) -> None:
        if not self.stages_behind:
            return
        if not self._announced:
            self._exchange(to_next=torch.tensor([len(message)], device=message.device))
            self._announced = True
        self._exchange(to_next=message.detach())

    def send_gradient(self, gradient: Tensor | None) -> None:
        if self.pp.rank > 0:
            self._exchange(to_previous=gradient)

    def receive_gradient(self, message: Tensor, *, send: bool = False) -> Tensor:
        """The gradient of an earlier message, as long as `message`; with `send`, `message` goes out meanwhile."""
        if not self.stages_behind:
            return self._nothing
        gradient = torch.empty_like(message)
        self._exchange(to_next=message.detach() if send else None, from_next=gradient)
        return gradient

    def send_gradient_and_receive(self, gradient: Tensor | None) -> Tensor:
        """The next message, while the gradient of an earlier one goes back."""
        if self.pp.rank == 0:
            return self._nothing
        assert gradient is not None
        message = torch.empty_like(gradient)
        self._exchange(to_previous=gradient, from_previous=message)
        return message.requires_grad_()

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

    def __init__(self, model: Model, stages: Sequence[Sequence[Layer]], config: Config, mesh: Mesh) -> None:
        messages = Messages(training_dtype(config.engine, mesh.device), mesh.device)
        stage_of = {layer.name: number for number, layers in enumerate(stages) for layer in layers}
        self.pp, self.dp, self.device = mesh.pp, mesh.dp, mesh.device
        # On NCCL, all ranks of a group take part in its first operation, or wait for ever: it must not be one of a
        # pass without gradient, in which stages behind the last one that it needs have no part.
        mesh.pp.sum(torch.zeros(1, device=mesh.device))
        self.stage = Stage(model, stage_of, mesh.pp, messages)
        self.link = Link(mesh.pp, mesh.device, messages.carrier)

    @property
    def reports(self) -> list[Report]:
        """Of the micro-batches that ran; none on stages but the last."""
        return self.stage.reports

    def begin(self, micro_batches: Sequence[Flow], limit: LossLimit) -> None:
        """Before the micro-batches of an optimizer step run through the stages."""
        self.stage.begin(first_pass.prepare(self.stage.model, micro_batches, self.dp, self.forward), limit)

    @torch.no_grad()
    def forward(self, want: Collection[str], batches: Sequence[Flow]) -> list[Flow]:
        """Forward passes, whose results all stages get."""
        calls = self.stage.model.calls(want, batches[0])
        last = max((self.stage.stage_of[call.layer.name] for call in calls), default=0)
        results: list[Flow] = []
        self.link.begin()
        for batch in batches if self.pp.rank <= last else ():
            flow = self.stage.advance(calls, batch, self.link.receive())
            if self.pp.rank < last:
                self.link.send(self.stage.pack(calls, batch, flow))
            else:
                results.append(flow)
        made = set(want) - batches[0].keys()
        spread = self._spread(results, made, batches, last) if made else [{} for _ in batches]
        return [{n: batch[n] for n in want if n in batch} | flow for batch, flow in zip(batches, spread, strict=True)]

    def _spread(self, results: list[Flow], names: set[str], batches: Sequence[Flow], last: int) -> list[Flow]:
        """From stage `last` to all others."""
        messages, found, length = self.stage.messages, [], torch.zeros(1, dtype=torch.int64, device=self.device)
        for number, batch in enumerate(batches):
            message = messages.pack(results[number], names) if results else None
            if number == 0:
                length += 0 if message is None else len(message)
                dist.broadcast(length, group=self.pp.group, group_src=last)
            if message is None:
                message = torch.empty(int(length), dtype=messages.carrier, device=self.device)
            dist.broadcast(message, group=self.pp.group, group_src=last)
            found.append(messages.unpack(message, names, batch))
        return found

    def run(self, count: int) -> None:
        """Forward and backward passes of `count` micro-batches, each forward pass followed by a backward pass.

        A stage holds the activations of as many micro-batches as there are stages from it to the end.
        Source: Narayanan et al., Efficient large-scale language model training on GPU clusters (2021), section 2.2.
        """
        running: deque[tuple[Tensor, Tensor]] = deque()

        def forward(received: Tensor) -> Tensor:
            running.append((received, self.stage(received)))
            return running[-1][1]

        def backward(gradient: Tensor) -> Tensor:
            received, result = running.popleft()
            if self.link.stages_behind:
                result.backward(gradient)
            else:
                (result / count).backward()
            return torch.zeros_like(received) if received.grad is None else received.grad

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
