"""From a config to an engine."""

from pretrain.accounting.stages import stages
from pretrain.config import Config
from pretrain.models.architectures import layer_specs
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.replicated import ReplicatedEngine
from pretrain.parallel.zero import ZeroEngine
from pretrain.parallel.zero_pipeline import ZeroPipelineEngine


def build_engine(config: Config, mesh: Mesh, *, vocabulary: int, pad_id: int, micro_batch_per_rank: int) -> Engine:
    """The configured model, with its initial weights, on the configured engine."""
    specs = layer_specs(config, vocabulary, mesh.dp.group, mesh.tp.group)
    here = [specs[index] for index in stages(config, vocabulary, mesh.pp.size)[mesh.pp.rank]]
    if config.engine.zero_stage == 0:
        return ReplicatedEngine(here, config, mesh, pad_id)
    engine = ZeroEngine if mesh.pp.size == 1 else ZeroPipelineEngine
    return engine(here, config, mesh, micro_batch_per_rank, pad_id)
