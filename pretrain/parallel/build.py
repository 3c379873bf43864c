"""From a config to an engine."""

from pretrain.config import Config
from pretrain.models.architectures import layer_specs
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.replicated import ReplicatedEngine
from pretrain.parallel.zero import ZeroEngine


def build_engine(config: Config, mesh: Mesh, *, vocabulary: int, pad_id: int, micro_batch_per_rank: int) -> Engine:
    """The configured model, with its initial weights, on the configured engine."""
    specs = layer_specs(config, vocabulary, mesh.dp.group, mesh.tp.group)
    if config.engine.zero_stage == 0:
        return ReplicatedEngine(specs, config, mesh, pad_id)
    return ZeroEngine(specs, config, mesh, micro_batch_per_rank, pad_id)
