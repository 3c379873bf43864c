"""From a config to an engine."""

from pretrain.config import Config
from pretrain.models.architectures import layer_specs
from pretrain.models.model import build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.replicated import ReplicatedEngine
from pretrain.parallel.zero import ZeroEngine


def build_engine(config: Config, mesh: Mesh, *, vocabulary: int, pad_id: int, micro_batch_per_rank: int) -> Engine:
    """The configured model, with its initial weights, on the configured engine."""
    specs = layer_specs(config, vocabulary, mesh.group)
    if config.engine.zero_stage == 0:
        return ReplicatedEngine(build_model(specs, config, pad_id, mesh.device), config, mesh)
    return ZeroEngine(specs, config, mesh, micro_batch_per_rank, pad_id)
