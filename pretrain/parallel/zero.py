"""ZeRO stages 1-3 on DeepSpeed: optimizer state, gradients and, at stage 3, parameters are partitioned."""

import contextlib
import io
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.models.layer import Architecture, Flow, Layer
from pretrain.models.model import Model, Report
from pretrain.optim import BoundedAdamW, build_optimizer
from pretrain.parallel import first_pass
from pretrain.parallel.engine import Fragment, StepResult, by_name, totals
from pretrain.parallel.loss_limit import LossLimit
from pretrain.parallel.mesh import TIMEOUT, Axis, Mesh, training_dtype
from pretrain.parallel.tensor import Part, build_part
from pretrain.parallel.unused import GradientWatch

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of BoundedAdamW, which is AdamW

# On a CPU, DeepSpeed compiles a shared-memory collective at first use. A process killed while it compiles leaves a
# lock behind, and every later run waits for it for ever. gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed imports the Muon optimizer at every start, and compiling that one imports torch's compiler: two seconds.
compiler.compile = lambda: compiler.dummy_decorator


class ZeroEngine:
    """Builds the model layer by layer, partitioning each before the next, and trains it."""

    def __init__(
        self,
        architecture: Architecture,
        stages: Sequence[Sequence[Layer]],
        config: Config,
        mesh: Mesh,
        micro_batch_per_rank: int,
    ) -> None:
        self.device = mesh.device
        self.mesh = mesh
        self.config = config
        self.architecture = architecture
        self.stages = stages
        self.stage = config.engine.zero_stage
        settings = deepspeed_settings(config, mesh, micro_batch_per_rank)
        # DeepSpeed would not look at it otherwise, and each of its groups costs a communicator.
        topology = Topology(mesh) if self.stage == 3 or (mesh.tp.size > 1 and mesh.pp.size == 1) else None
        modules: dict[str, nn.Module] = {}
        self.parts: dict[str, Part] = {}
        for layer in stages[mesh.pp.rank]:
            module, parts = build_part(layer, config.seed, mesh.device, mesh.tp.group)
            self.parts |= parts
            # zero.Init would leave a layer that is already built in fp32, whatever its settings say.
            module = module.to(training_dtype(config.engine, mesh.device))
            if topology and self.stage == 3:  # without the group, zero.Init would partition over the whole world
                deepspeed.zero.Init(module=module, data_parallel_group=topology.dp, config_dict_or_path=settings)
            modules[layer.name] = module
        self.model = Model(architecture, modules, config.engine.activation_checkpointing)
        optimizer = build_optimizer(
            self.model.named_parameters(),
            {name: part.shape for name, part in self.parts.items()},
            config.optimizer,
            config.objectives.contrastive,
            [name for name, part in self.parts.items() if not part.is_cut] if mesh.tp.size > 1 else None,
        )
        # Sums of one gradient over two dp groups may differ in the last digit: copies would drift apart.
        optimizer.average = mesh.tp.mean if mesh.tp.size > 1 else None
        deepspeed.utils.groups.mpu = None  # it would take an earlier engine's for this one's
        # DeepSpeed's declared types are wider than what it returns here.
        self.engine: Any
        self.optimizer: Any
        with contextlib.redirect_stdout(io.StringIO()):  # it prints stages, and memory
            self.engine, self.optimizer, *_ = self._initialize(optimizer, settings, topology)
        self._prime_optimizer()
        self.watch = GradientWatch(self.model, mesh.world) if config.training.debug else None
        self.applied_steps = 0

    def _initialize(self, optimizer: BoundedAdamW, settings: dict[str, Any], topology: "Topology | None") -> Any:
        mpu = topology if self.mesh.tp.size > 1 else None
        return deepspeed.initialize(model=self.model, optimizer=optimizer, config=settings, mpu=mpu)

    def step(self, micro_batches: Sequence[Flow], learning_rate: float, loss_limit: float = math.inf) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.train()
        reports: list[Report] = []
        limit = LossLimit(loss_limit, len(micro_batches), self.mesh.dp)
        # The first pass does not go through DeepSpeed's forward, which prepares a backward pass.
        for have, stand_ins in first_pass.prepare(self.model, micro_batches, self.mesh.dp, self._run_all):
            report = self.engine(have, stand_ins)
            reports.append(report.without_graph())
            self.engine.backward(limit(report.loss))
            self.engine.step()
        if self.stage == 3:
            # Stage 3 keeps a parameter's last gradient, and applies it again in a step that gives it none.
            self.optimizer.grad_partitions_flat_buffer.zero_()
        return self._result(reports)

    def _result(self, reports: Sequence[Report]) -> StepResult:
        if self.watch:
            self.watch.check()
        applied = bool(self.engine.was_step_applied())
        self.applied_steps += applied
        norm = float(self.engine.get_global_grad_norm())
        return StepResult(*by_name(self.architecture, *totals(self.architecture, reports, self.mesh)), norm, applied)

    def run(self, want: Collection[str], batches: Sequence[Flow]) -> list[Flow]:
        self.engine.eval()
        return first_pass.evaluate(self.model, want, batches, self._run_all)

    @torch.no_grad()
    def _run_all(self, want: Collection[str], batches: Sequence[Flow]) -> list[Flow]:
        return [self.model.run(want, batch) for batch in batches]

    def fragments(self) -> Iterator[Fragment]:
        pieces = self._partition if self.stage == 3 else self._slice
        for name, parameter in self.model.named_parameters():
            if (piece := pieces(parameter)) is not None:
                start, tensors = piece
                views = {kind: tensor.detach() for kind, tensor in tensors.items()}
                part = self.parts[name]
                yield Fragment(name, part, start, views, saved_here=part.is_cut or self.mesh.tp.rank == 0)

    def loaded(self, steps: int) -> None:
        self.applied_steps = steps
        for state in self.optimizer.optimizer.state.values():
            state["step"].fill_(steps)
        if self.stage == 3:
            self.optimizer._partition_all_parameters()  # small ones stay gathered, and would keep their old values
            for group in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            self.optimizer.update_lp_params()

    def _prime_optimizer(self) -> None:
        """Creates the optimizer's state now instead of in the first step: a checkpoint is loaded into it."""
        for flat in self._flat_masters():
            self.optimizer.optimizer.prime(flat)
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_masters(self) -> list[Tensor]:
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [flat for group in self.optimizer.optimizer.param_groups for flat in group["params"]]

    def _partition(self, parameter: Any) -> tuple[int, dict[str, Tensor]] | None:
        """Stage 3: rank r holds the r-th of equal flat parts, the last one padded."""
        size = parameter.ds_tensor.ds_numel
        start = self.mesh.dp.rank * size
        length = min(size, parameter.ds_numel - start)
        if length <= 0:
            return None
        keys = {"master": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
        return start, {
            kind: self.optimizer._get_fp32_opt_state_partition(parameter, False, key)[0][:length]
            for kind, key in keys.items()
        }

    def _slice(self, parameter: Any) -> tuple[int, dict[str, Tensor]] | None:
        """Stages 1 and 2: the parameters, laid end to end, are cut into equal parts regardless of their borders."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return mapping.lp_fragment_address.start, {
            "master": mapping.get_hp_fragment(),
            "exp_avg": mapping.get_hp_fragment("exp_avg"),
            "exp_avg_sq": mapping.get_hp_fragment("exp_avg_sq"),
        }


class Topology:
    """The mesh under the names by which DeepSpeed asks for it."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.dp, self.tp = (_group_of(axis, mesh.world) for axis in (mesh.dp, mesh.tp))

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp.size


def _group_of(axis: Axis, world: Axis) -> Any:
    """DeepSpeed wants a group even for a rank alone on its axis."""
    if axis.group is not None or world.size == 1:
        return axis.group
    return dist.new_group([world.rank], timeout=TIMEOUT, use_local_synchronization=True)


def deepspeed_settings(config: Config, mesh: Mesh, micro_batch_per_rank: int) -> dict[str, Any]:
    """DeepSpeed's own dictionary. Whatever has a surprising default is set explicitly."""
    engine = config.engine
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_per_rank,
        "gradient_accumulation_steps": config.training.accumulation,
        "gradient_clipping": config.optimizer.clip,  # its default is 1.0, not off
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": engine.zero_stage, "overlap_comm": mesh.device.type == "cuda"},
    }
    if engine.offload == "cpu":
        pin = mesh.device.type == "cuda"
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    if training_dtype(engine, mesh.device) == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        # Micro-batches would be added up in bf16. The gradient of a single one comes in bf16, and stage 3 keeps it so.
        if engine.zero_stage < 3 or config.training.accumulation > 1:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
