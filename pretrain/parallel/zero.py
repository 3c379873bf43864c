"""ZeRO stages 1-3 on DeepSpeed: optimizer state, gradients and, at stage 3, parameters are partitioned."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.models.architectures import LayerSpec
from pretrain.models.initial import build_layer
from pretrain.models.model import Output, VisionLanguageModel
from pretrain.optim import build_optimizer
from pretrain.parallel.engine import Fragment, Inputs, StepResult
from pretrain.parallel.mesh import Mesh, training_dtype

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of BoundedAdamW, which is AdamW

# On a CPU, DeepSpeed compiles a shared-memory collective at first use. A process killed while it compiles leaves a
# lock behind, and every later run waits for it for ever. gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ZeroEngine:
    """Builds the model layer by layer, partitioning each before the next, and trains it."""

    def __init__(
        self, specs: Sequence[LayerSpec], config: Config, mesh: Mesh, micro_batch_per_rank: int, pad_id: int
    ) -> None:
        self.device = mesh.device
        self.mesh = mesh
        self.stage = config.engine.zero_stage
        settings = deepspeed_settings(config, mesh, micro_batch_per_rank)
        layers: dict[str, nn.Module] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for spec in specs:
            # zero.Init would leave a layer that is already built in fp32, whatever its settings say.
            layer = build_layer(spec, config, mesh.device).to(training_dtype(config.engine, mesh.device))
            self.shapes |= {f"{spec.name}.{name}": tuple(p.shape) for name, p in layer.named_parameters()}
            if self.stage == 3:  # without the group, zero.Init would partition over the whole world
                deepspeed.zero.Init(module=layer, data_parallel_group=mesh.group, config_dict_or_path=settings)
            layers[spec.name] = layer
        model = VisionLanguageModel(layers, config, pad_id)
        optimizer = build_optimizer(
            model.named_parameters(), self.shapes, config.optimizer, config.objectives.contrastive
        )
        # DeepSpeed's declared types are wider than what it returns here.
        self.engine: Any
        self.optimizer: Any
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._prime_optimizer()
        self.applied_steps = 0

    def step(self, micro_batches: Sequence[Inputs], learning_rate: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses, counts = 0, 0
        self.engine.train()
        for batch in micro_batches:
            output = self.engine(**batch.tensors())
            losses, counts = losses + output.losses / len(micro_batches), counts + output.counts
            # DeepSpeed skips a step by its gradient norm alone: a loss that is not finite must reach the norm.
            finite = torch.where(output.loss.isfinite(), 1.0, torch.nan)
            self.engine.backward(output.loss * finite)
            self.engine.step()
        applied = bool(self.engine.was_step_applied())
        self.applied_steps += applied
        if self.stage == 3:
            # Stage 3 keeps a parameter's last gradient, and applies it again in a step that gives it none.
            self.optimizer.grad_partitions_flat_buffer.zero_()
        return StepResult(
            losses=self.mesh.mean(torch.as_tensor(losses)).cpu(),
            counts=self.mesh.sum(torch.as_tensor(counts)).cpu(),
            gradient_norm=float(self.engine.get_global_grad_norm()),
            applied=applied,
        )

    @torch.no_grad()
    def evaluate(self, batch: Inputs) -> Output:
        self.engine.eval()
        return self.engine(**batch.tensors())

    def fragments(self) -> Iterator[Fragment]:
        pieces = self._partition if self.stage == 3 else self._slice
        for name, parameter in self.engine.module.named_parameters():
            if (piece := pieces(parameter)) is not None:
                start, tensors = piece
                views = {kind: tensor.detach() for kind, tensor in tensors.items()}
                yield Fragment(name, self.shapes[name], start, views)

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
        start = self.mesh.dp_rank * size
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
        settings["data_types"] = {"grad_accum_dtype": "fp32"}  # micro-batches would be added up in bf16
    return settings
