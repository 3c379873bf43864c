"""The typed config: defaults <- YAML file <- `key=value` on the command line.

Frozen, and strict: an unknown key is refused with the nearest name, a value out of range with its range, a
combination that cannot work with both keys and the fix. Imports no torch, so a login node reads it at once.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from data_pipelines.config import DataConfig, Section
from data_pipelines.redaction import redacted
from pretrain.config_text.problems import sentences
from pretrain.config_text.tree import Tree, lay_over, read_tree
from pretrain.errors import ConfigError
from pretrain.model_config import ARCHITECTURES, ModelConfig
from pretrain.run_config import CheckpointConfig, OptimizerConfig, SlurmConfig, TrainingConfig


class ContrastiveConfig(Section):
    """Image-text contrastive objective (ITC) over all samples of a micro-step or of a step, on all ranks."""

    weight: float = Field(default=1.0, gt=0)
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: which of all captions belongs to an image, and the other way round (InfoNCE, CLIP). sigmoid: does this
    caption belong to this image, for each pair (SigLIP), in blocks of one rank's images by one rank's captions; its
    paper starts at `temperature` 0.1."""
    negatives: Literal["micro_batch", "global_batch"] = "micro_batch"
    """micro_batch: samples of one micro-step, on all ranks. global_batch: of the whole optimizer step, exactly, so that
    accumulation no longer changes what is optimised; the towers run once more, without gradient."""
    temperature: float = Field(default=0.07, gt=0)
    """Where the learnable temperature starts."""
    min_temperature: float = Field(default=0.01, gt=0)
    max_temperature: float = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "ContrastiveConfig":
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError(
                f"temperature {self.temperature} is not between min_temperature {self.min_temperature} and "
                f"max_temperature {self.max_temperature}: move one of the three"
            )
        return self


class MatchingConfig(Section):
    """Image-text matching objective (ITM) on negatives mined by similarity, in vilt on random ones."""

    weight: float = Field(default=1.0, gt=0)
    pool: int = Field(default=16, ge=2)
    """Samples, consecutive in the global order, among which a negative is looked for. A divisor of `data.grain`,
    or a multiple, up to all of a micro-step: then ranks exchange negatives' tokens, and hold two images per sample."""


class MaskedLMConfig(Section):
    """Masked-language-model objective (MLM), the image in sight."""

    weight: float = Field(default=1.0, gt=0)
    probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of a caption's pieces that are predicted; whole words, 80/10/10."""


class CaptioningConfig(Section):
    """Captioning objective: write the caption, piece by piece, the image in sight; a mean over all pieces of a step."""

    weight: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class ObjectivesConfig(Section):
    """What is optimised: a weighted sum of all that the architecture can be trained with. `null` switches one off."""

    contrastive: ContrastiveConfig | None = None
    matching: MatchingConfig | None = None
    masked_lm: MaskedLMConfig | None = None
    captioning: CaptioningConfig | None = None


class EngineConfig(Section):
    """How the model is spread over devices: data_parallel x tensor_parallel x pipeline_parallel ranks."""

    data_parallel: int | None = Field(default=None, ge=1)
    """Ranks, or groups of them, that read different samples. null: as many as the started processes make."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share each layer's matrices, and read the same samples; neighbours, inside a node."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Stages that the list of layers is cut into, one after the other; micro-steps fill them. Farthest apart."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """What DeepSpeed's ZeRO partitions: nothing, optimizer state, also gradients, also parameters."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware has it, else fp32. Master weights and moments are always fp32."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more compute."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: optimizer state lives in host memory, and is updated there."""

    def misfit(self, world: int, ranks: str = "processes") -> str | None:
        """Why the degrees do not make up so many ranks, in one sentence; None if they do."""
        product = self.tensor_parallel * self.pipeline_parallel * (self.data_parallel or 1)
        degrees = f"engine.tensor_parallel {self.tensor_parallel} x engine.pipeline_parallel {self.pipeline_parallel}"
        if self.data_parallel:
            fits, degrees, must = product == world, f"engine.data_parallel {self.data_parallel} x {degrees}", "make up"
        else:
            fits, must = world % product == 0, "divide"
        if fits:
            return None
        return (
            f"{degrees} = {product:,} does not {must} the {world:,} {ranks} of the run: change one of them, or take "
            f"another number of {ranks}."
        )

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "EngineConfig":
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError(
                "engine.offload cpu needs engine.zero_stage 1, 2 or 3, and it is 0: set one of them, or "
                "engine.offload=none"
            )
        return self

    @model_validator(mode="after")
    def _pipeline_keeps_its_layers(self) -> "EngineConfig":
        if self.pipeline_parallel > 1 and self.zero_stage > 1:
            raise ValueError(
                f"engine.zero_stage {self.zero_stage} and engine.pipeline_parallel {self.pipeline_parallel} exclude "
                f"each other, because a stage keeps its gradients and parameters from micro-step to micro-step: set "
                f"engine.zero_stage=1, or engine.pipeline_parallel=1"
            )
        if self.pipeline_parallel > 1 and self.offload != "none":
            raise ValueError(
                f"engine.offload {self.offload} does not go with engine.pipeline_parallel {self.pipeline_parallel}: "
                f"set engine.offload=none, or engine.pipeline_parallel=1"
            )
        return self


class Config(Section):
    """One training run."""

    output: Path
    """Folder of the run: checkpoints, metrics, TensorBoard, the resolved config."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Keys the initial weights, the order of the data, augmentation, masks and negatives."""
    init_from: Path | None = None
    """Another run's folder, or one of its checkpoints, with whose weights a fresh run starts: those that fit by name
    and shape; positions are interpolated. A run that goes on from its own checkpoints does not look at it."""
    data: DataConfig
    model: ModelConfig
    objectives: ObjectivesConfig = ObjectivesConfig()
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="before")
    @classmethod
    def _switch_on_objectives(cls, given: Any) -> Any:
        """An objective of which the config does not speak is on if the architecture has it."""
        if not isinstance(given, dict):
            return given
        model, objectives = given.get("model"), given.get("objectives", {})
        name = str(model.get("architecture")) if isinstance(model, dict) else ""
        choice = ARCHITECTURES.get(name, ARCHITECTURES["albef"])
        if not isinstance(objectives, dict):
            return given
        return given | {"objectives": {name: {} for name in choice.objectives} | objectives}

    @model_validator(mode="before")
    @classmethod
    def _shorten_the_default_warmup(cls, given: Any) -> Any:
        match given:
            case {"training": {"steps": int(steps)}} if steps < 20_000:
                optimizer = given.get("optimizer", {})
                if isinstance(optimizer, dict) and "warmup_steps" not in optimizer:
                    return {**given, "optimizer": {**optimizer, "warmup_steps": max(steps, 0) // 10}}
        return given

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        architecture = self.model.architecture
        for name in ObjectivesConfig.model_fields:
            if getattr(self.objectives, name) and name not in ARCHITECTURES[architecture].objectives:
                others = [other for other, choice in ARCHITECTURES.items() if name in choice.objectives]
                raise ValueError(
                    f"model.architecture {architecture} has no objectives.{name}: set objectives.{name}=null, or "
                    f"choose {' or '.join(others)}"
                )
        tensor_parallel = self.engine.tensor_parallel
        for name, tower in self.model.towers.items():
            if tower.depth and tower.heads % tensor_parallel:
                raise ValueError(
                    f"engine.tensor_parallel {tensor_parallel} does not divide model.{name}.heads {tower.heads}: a "
                    f"rank holds whole heads, so set engine.tensor_parallel to a divisor"
                )
        if self.objectives.matching is not None:
            self._pool_fits(self.objectives.matching.pool)
        self._best_is_known()
        if self.optimizer.warmup_steps >= self.training.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below training.steps "
                f"{self.training.steps}: shorten the warmup"
            )
        return self

    def _best_is_known(self) -> None:
        """The best checkpoint is that of a step which is evaluated and saved."""
        best, checkpoint, evaluate_every = self.checkpoint.best, self.checkpoint, self.training.evaluate_every
        if best is None:
            return
        objectives = [name for name in ObjectivesConfig.model_fields if getattr(self.objectives, name)]
        known = ["loss", *(f"{what}/{name}" for what in ("loss", "accuracy") for name in objectives)]
        if self.objectives.contrastive is not None:
            known += [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
        if best not in known:
            raise ValueError(f"checkpoint.best {best} is nothing that this run evaluates: set {', '.join(known)}")
        if self.data.heldout is None:
            raise ValueError(f"checkpoint.best {best} needs held-out data: set data.heldout, or checkpoint.best=null")
        if evaluate_every % checkpoint.every:
            raise ValueError(
                f"checkpoint.best {best} needs a checkpoint of every step that is evaluated, and "
                f"training.evaluate_every {evaluate_every} is no multiple of checkpoint.every {checkpoint.every}: "
                f"change one of them"
            )

    def _pool_fits(self, pool: int) -> None:
        """Pools lie inside grains, or whole grains make whole pools of a micro-step."""
        grain, batch, accumulation = self.data.grain, self.training.global_batch, self.training.accumulation
        if grain % pool and (pool % grain or batch % (accumulation * pool)):
            micro_step = batch // accumulation
            sizes = [size for size in range(2, min(grain, 1024) + 1) if grain % size == 0]
            sizes += [size for size in range(2 * grain, 64 * grain, grain) if batch % (accumulation * size) == 0]
            raise ValueError(
                f"objectives.matching.pool {pool} neither divides data.grain {grain} nor is a multiple of it that "
                f"divides the {micro_step} samples of a micro-step (training.global_batch {batch} / "
                f"training.accumulation {accumulation}): sizes that fit are {', '.join(map(str, sizes)) or 'none'}"
            )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `key.path=value` overrides in order, and checks the whole.

    Raises:
        ConfigError: the file cannot be read, or a key, a value or a combination is wrong; the message names
            all of them, one line each.
    """
    return _checked(read_tree(path, Config), overrides)


def parse_config(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Checks a tree of plain values, overrides laid over it; `source` is named in the errors."""
    return _checked(Tree(source, copy.deepcopy(values)), overrides)


def _checked(tree: Tree, overrides: Sequence[str]) -> Config:
    for override in overrides:
        lay_over(tree, override, Config)
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, Config, tree))) from None
    _check_secrets(config.model_dump(mode="json"), tree.source)
    return config


def _check_secrets(value: Any, source: str, key: str = "") -> None:
    """Refuses what config.yaml, run.json and TensorBoard would show to everybody."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_secrets(inner, source, f"{key}.{name}" if key else name)
    elif isinstance(value, str) and (without := redacted(value)) != value:
        raise ConfigError(
            f"{source}: {key} is {without}, and what is not shown of it is a password, a signature or a key, which the "
            f"run's folder would keep for all to read: give it to the client in its own configuration or environment."
        )
