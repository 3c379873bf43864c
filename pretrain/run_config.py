"""The config's sections on how a run goes: its optimizer, its length, its checkpoints, its place on a cluster."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from data_pipelines.config import Section
from data_pipelines.redaction import redacted


class OptimizerConfig(Section):
    """AdamW; weight decay leaves 1-D parameters alone. Warmup, then a cosine, by optimizer step."""

    learning_rate: float = Field(default=1e-4, gt=0)
    final_learning_rate: float = Field(default=1e-6, ge=0)
    warmup_steps: int = Field(default=2000, ge=0)
    """Steps in which the rate rises from 0. Where it is not given, a run of fewer than 20,000 steps has a tenth."""
    weight_decay: float = Field(default=0.02, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm over all parameters and ranks; 0 switches clipping off."""


class TrainingConfig(Section):
    """How long, in steps of how many samples, and how often to look."""

    steps: int = Field(gt=0)
    """Optimizer steps of the whole run, those before a resume included."""
    global_batch: int = Field(gt=0)
    """Samples per optimizer step, over all ranks and micro-steps. The micro-batch per rank follows."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-steps per optimizer step. With `objectives.contrastive.negatives` micro_batch it is part of the recipe."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines on the screen; metrics.jsonl and TensorBoard get every step."""
    evaluate_every: int = Field(default=500, ge=1)
    """Steps between two evaluations on held-out data."""
    deterministic: bool = False
    """Take deterministic kernels alone, so that steps are equal to the last digit on GPUs too; slower. CPUs are so
    anyway."""
    max_skipped_steps: int = Field(default=10, ge=1, le=100)
    """Steps of the last 100 that were skipped, because the loss or the gradient norm was not finite or by `spikes`, at
    which the run stops, or with `spikes` rollback goes back."""
    spikes: Literal["warn", "skip", "rollback"] = "warn"
    """What happens where the loss jumps. warn: a line. skip: that step changes no weight. rollback: the run goes back
    to its newest checkpoint, and leaves out all that it has read since."""
    spike_threshold: float = Field(default=10.0, gt=0)
    """How far above the median of earlier losses a loss is a spike, in standard deviations as the median absolute
    deviation gives them; one is at least 1 % of the median."""
    spike_window: int = Field(default=100, ge=10)
    """Steps whose losses a loss is compared with; as many pass before the first comparison."""
    max_rollbacks: int = Field(default=5, ge=1)
    """Rollbacks in the whole run; at the next spike it stops."""
    hang_timeout_s: float = Field(default=60, gt=0)
    """How long a step, a save or a batch of an evaluation may take before the ranks count as hung, if five times the
    slowest of the last hundred is less. Where data may be tried again, `data.patience_s` is added; the first three
    have 15 times as long; nothing has longer than 18 minutes."""
    time_limit_minutes: float | None = Field(default=None, gt=0)
    """Minutes from the start, before which the run saves and leaves with exit code 85. Slurm's own limit is known
    without."""
    debug: bool = False
    """Checks after each step that every trainable parameter had a gradient, and stops the run if one had none."""


class CheckpointConfig(Section):
    """When to save, and what to do at the start."""

    every: int = Field(default=500, ge=1)
    """Steps between two checkpoints; the last step always saves."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes after which to save between those too. null: only by steps."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory: 12 bytes per parameter over the ranks that share them.
    false: training waits, and nothing is copied."""
    keep: int = Field(default=3, ge=2)
    """Newest checkpoints that stay on disk."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of steps that this divides stay too. null: none."""
    best: str | None = None
    """The checkpoint that is best on held-out data stays too: by the highest `text_to_image_R@1`, `image_to_text_R@5`,
    `accuracy/matching` and the like, or by the lowest `loss` or `loss/matching`. null: none."""
    mirror: str | None = None
    """URL in an object store, such as s3://bucket/run, where each checkpoint is copied in the background, and from
    where the newest is fetched if the output folder has none. Each run needs its own. null: no copies."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: from the newest valid checkpoint if there is any. must: an error if there is none. never: an
    error if there is one, so that nothing is overwritten."""

    @field_validator("mirror")
    @classmethod
    def _is_an_object_store(cls, url: str | None) -> str | None:
        scheme, host, _, query, fragment = urlsplit(url or "s3://bucket")
        if not host or scheme in ("file", "http", "https"):
            raise ValueError(
                f"checkpoint.mirror {redacted(url or '')} is no folder of an object store: write s3://bucket/folder or "
                f"gs://bucket/folder"
            )
        if "@" in host or query or fragment:
            raise ValueError(
                f"checkpoint.mirror {redacted(url or '')} has more than a bucket and a folder: leave out user, "
                f"password and query, since credentials come from the environment"
            )
        return url


class SlurmConfig(Section):
    """What `python -m launch slurm` asks a cluster for; its options are these keys. null: the cluster decides."""

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=8, ge=0)
    gpu: str = "h100"
    """The GPUs' kind, for the plan that is made before a job is submitted; see `python -m launch plan --help`."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """null: one per GPU."""
    ranks_by: Literal["torchrun", "srun"] = "torchrun"
    """torchrun: one task per node. srun: one task per GPU, each of which sees its own GPU alone."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Cores, shared by the ranks and their decoding workers; null: eight per GPU."""
    time: str = Field(default="24:00:00", pattern=r"^\d+(-\d+)?(:\d+){0,2}$")
    """Time limit, as Slurm writes it: minutes, h:mm:ss or days-hours."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    array: str | None = Field(default=None, pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?$")
    """Several runs as one job, such as 0-3: in `output` and in settings on the command line, %a is the run's number."""
    modules: tuple[str, ...] = ()
    """For `module load`."""
    environment: Path | None = None
    """Folder of a venv or conda environment; or a tar of one, which is copied to each node's own disk."""
    container: str | None = None
    """image.sqsh, or whatever else enroot reads, for Pyxis; image.sif for Apptainer."""
    mounts: tuple[Path, ...] = ()
    """Folders that a container sees besides the current one."""
    warning_s: int = Field(default=300, ge=10)
    """Seconds before the time limit at which the ranks save and stop."""
    max_requeues: int = Field(default=10, ge=0)
    """How often a job that was stopped by its time limit or by another job goes back into the queue."""
    chain: int = Field(default=1, ge=1)
    """Jobs that go on one after the other, where a cluster requeues none."""
