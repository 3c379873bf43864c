"""From a config to an engine."""

from pretrain.accounting.stages import cut_into_stages
from pretrain.config import Config
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import Groups
from pretrain.models.towers import Vocabulary
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.replicated import ReplicatedEngine
from pretrain.parallel.zero import ZeroEngine
from pretrain.parallel.zero_pipeline import ZeroPipelineEngine


def build_engine(config: Config, mesh: Mesh, *, vocabulary: Vocabulary, micro_batch_per_rank: int) -> Engine:
    """The configured model, with its initial weights, on the configured engine.

    Raises:
        ConfigError: the model's layers do not hang together, or are fewer than the pipeline's stages.
    """
    architecture = architecture_of(config, vocabulary, Groups(mesh.dp.group, mesh.tp.group))
    stages = cut_into_stages(config, vocabulary, architecture, mesh.pp.size)
    if config.engine.zero_stage == 0:
        return ReplicatedEngine(architecture, stages, config, mesh)
    engine = ZeroEngine if mesh.pp.size == 1 else ZeroPipelineEngine
    return engine(architecture, stages, config, mesh, micro_batch_per_rank)
