"""ZeRO stage 1 on each stage of a pipeline: DeepSpeed runs the micro-batches through the stages, and the optimizer."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from pretrain.models.layer import Flow
from pretrain.optim import BoundedAdamW
from pretrain.parallel import first_pass
from pretrain.parallel.engine import StepResult
from pretrain.parallel.loss_limit import LossLimit
from pretrain.parallel.mesh import training_dtype
from pretrain.parallel.pipeline import Pipeline
from pretrain.parallel.zero import Topology, ZeroEngine


class ZeroPipelineEngine(ZeroEngine):
    """Each stage is one layer to DeepSpeed, and what it hands on one tensor."""

    def _initialize(self, optimizer: BoundedAdamW, settings: dict[str, Any], topology: Topology | None) -> Any:
        mesh = self.mesh
        self.pipeline = Pipeline(self.model, self.stages, self.config, mesh)
        stages = [self.pipeline.stage if rank == mesh.pp.rank else nn.Identity() for rank in range(mesh.pp.size)]
        ranks = PipeModelDataParallelTopology(num_pp=mesh.pp.size, num_mp=mesh.tp.size, num_dp=mesh.dp.size)
        for group in optimizer.param_groups:
            if not group["params"]:  # it sums the norm group by group, and waits for ever for a stage that lacks one
                unused = nn.Parameter(torch.zeros(1, dtype=training_dtype(self.config.engine, mesh.device)))
                self.pipeline.stage.unused.append(unused)
                group["params"].append(unused)
        # Every tensor-parallel rank sends whole messages. By default each sends a share, and all gather them again.
        settings = settings | {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
        deepspeed.init_distributed(verbose=False)  # it takes over the process group that is there
        module = PipelineModule(stages, topology=ranks, partition_method="uniform")
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)

    def step(self, micro_batches: Sequence[Flow], learning_rate: float, loss_limit: float = math.inf) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        self.pipeline.begin(micro_batches, LossLimit(loss_limit, len(micro_batches), self.mesh.dp))
        nothing = torch.empty(0, device=self.device)  # a stage knows its micro-batches already
        self.engine.train_batch(iter([(nothing, nothing)] * len(micro_batches)))
        return self._result(self.pipeline.reports)

    def run(self, want: Collection[str], batches: Sequence[Flow]) -> list[Flow]:
        self.model.eval()
        return first_pass.evaluate(self.model, want, batches, self.pipeline.forward)
