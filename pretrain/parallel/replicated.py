"""ZeRO stage 0: data-parallel ranks hold the same, and gradients are averaged. Plain PyTorch, no DeepSpeed."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from pretrain.config import Config
from pretrain.models.layer import Architecture, Flow, Layer
from pretrain.models.model import Model, Report
from pretrain.optim import build_optimizer
from pretrain.parallel import first_pass
from pretrain.parallel.engine import Fragment, StepResult, by_name, totals
from pretrain.parallel.loss_limit import LossLimit
from pretrain.parallel.mesh import Mesh, training_dtype
from pretrain.parallel.pipeline import Pipeline
from pretrain.parallel.tensor import Part, build_part
from pretrain.parallel.unused import GradientWatch


class ReplicatedEngine:
    """Weights in the training type, fp32 master copies, gradients accumulated in fp32."""

    def __init__(
        self, architecture: Architecture, stages: Sequence[Sequence[Layer]], config: Config, mesh: Mesh
    ) -> None:
        self.device = mesh.device
        self.mesh = mesh
        self.architecture = architecture
        self.clip = config.optimizer.clip
        modules: dict[str, nn.Module] = {}
        self.parts: dict[str, Part] = {}
        for layer in stages[mesh.pp.rank]:
            modules[layer.name], parts = build_part(layer, config.seed, mesh.device, mesh.tp.group)
            self.parts |= parts
        model = Model(architecture, modules, config.engine.activation_checkpointing)
        self.model = model.to(mesh.device, training_dtype(config.engine, mesh.device))
        self.pipeline = Pipeline(model, stages, config, mesh) if mesh.pp.size > 1 else None
        # In fp32 the master copy shares the weight's memory: `float` copies nothing then.
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
        shapes = {name: part.shape for name, part in self.parts.items()}
        self.optimizer = build_optimizer(self.masters.items(), shapes, config.optimizer, config.objectives.contrastive)
        # One buffer behind all gradients: one collective per step instead of one per parameter. The ranks of a tp axis
        # hold the same of what lies first.
        weights = dict(model.named_parameters())
        names = sorted(self.masters, key=lambda name: self.parts[name].is_cut)
        sizes = [self.masters[name].numel() for name in names]
        self.gradients = torch.zeros(sum(sizes), device=mesh.device)
        self.copied = self.gradients[
            : sum(m.numel() for name, m in self.masters.items() if not self.parts[name].is_cut)
        ]
        for name, part in zip(names, self.gradients.split(sizes), strict=True):
            self.optimizer.prime(self.masters[name])
            self.masters[name].grad = gradient = part.view_as(self.masters[name])
            weights[name].register_post_accumulate_grad_hook(partial(_hand_over, gradient))
        self.watch = GradientWatch(model, mesh.world) if config.training.debug else None
        self.applied_steps = 0

    def step(self, micro_batches: Sequence[Flow], learning_rate: float, loss_limit: float = math.inf) -> StepResult:
        self.model.train()
        limit = LossLimit(loss_limit, len(micro_batches), self.mesh.dp)
        if self.pipeline:
            self.pipeline.begin(micro_batches, limit)
            self.pipeline.run(len(micro_batches))
            reports = self.pipeline.reports
        else:
            reports: list[Report] = []
            for have, stand_ins in first_pass.prepare(self.model, micro_batches, self.mesh.dp, self._run_all):
                report = self.model(have, stand_ins)
                (limit(report.loss) / len(micro_batches)).backward()
                reports.append(report.without_graph())
        if self.watch:
            self.watch.check()
        figures, counts = totals(self.architecture, reports, self.mesh)

        self.mesh.dp.mean(self.gradients)
        # Sums of one gradient over two dp groups may differ in the last digit: copies would drift apart.
        self.mesh.tp.mean(self.copied)
        norm = self._norm()
        applied = bool(norm.isfinite())
        if applied:
            if self.clip > 0:
                clip_grads_with_norm_(self.masters.values(), self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.applied_steps += 1
            self._copy_masters_to_weights()
        self.gradients.zero_()
        return StepResult(*by_name(self.architecture, figures, counts), float(norm), applied)

    def run(self, want: Collection[str], batches: Sequence[Flow]) -> list[Flow]:
        self.model.eval()
        return first_pass.evaluate(self.model, want, batches, self._run_all)

    @torch.no_grad()
    def _run_all(self, want: Collection[str], batches: Sequence[Flow]) -> list[Flow]:
        if self.pipeline:
            return self.pipeline.forward(want, batches)
        return [self.model.run(want, batch) for batch in batches]

    def fragments(self) -> Iterator[Fragment]:
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            tensors = {"master": master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            flat = {kind: tensor.view(-1) for kind, tensor in tensors.items()}
            part = self.parts[name]
            saved_here = self.mesh.dp.rank == 0 and (part.is_cut or self.mesh.tp.rank == 0)
            yield Fragment(name, part, 0, flat, saved_here)

    def loaded(self, steps: int) -> None:
        self.applied_steps = steps
        for master in self.masters.values():
            self.optimizer.state[master]["step"].fill_(steps)
        self._copy_masters_to_weights()

    def _norm(self) -> Tensor:
        """Of the whole model's gradient: each element once, on whatever rank it lies."""
        squares = {True: self.gradients.new_zeros(()), False: self.gradients.new_zeros(())}
        for name, master in self.masters.items():
            assert master.grad is not None
            squares[self.parts[name].is_cut] += master.grad.square().sum()
        return self.mesh.pp.sum(self.mesh.tp.sum(squares[True]) + squares[False]).sqrt()

    @torch.no_grad()
    def _copy_masters_to_weights(self) -> None:
        for master, weight in zip(self.masters.values(), self.model.parameters(), strict=True):
            if weight.dtype != master.dtype:
                weight.copy_(master)


def _hand_over(gradient: Tensor, weight: Tensor) -> None:
    """Adds a weight's gradient to the master's, after each backward pass."""
    assert weight.grad is not None
    gradient.add_(weight.grad)
    weight.grad = None
