"""The sigmoid loss, one block of pairs at a time, is the plain formula over all pairs at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.tiny import assert_same_curve, commit, engine_curve, plain_curve, tiny_config, tiny_engine
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.verify import read_run
from pretrain.collectives import row_offset
from pretrain.objectives.contrastive import Identity
from pretrain.objectives.sigmoid import sigmoid_loss
from pretrain.parallel.mesh import Mesh

G, E, STEPS = 32, 3, 10
SIGMOID = {"objectives__contrastive__loss": "sigmoid", "objectives__contrastive__temperature": 0.1}
GLOBAL = {"objectives__contrastive__negatives": "global_batch"}


def leaves():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(G, E, generator=generator), dim=1) for _ in range(2))
    text = F.normalize(text + image, dim=1)
    return [image, text, torch.tensor([1.3]), torch.tensor([-2.0])]


def whole_identity():
    image_ids, caption_ids = torch.arange(G), torch.arange(G)
    image_ids[3], caption_ids[9] = image_ids[28], caption_ids[1]  # one pair on two ranks, one on a rank of two
    return Identity(image_ids, caption_ids)


class Watch(TorchDispatchMode):
    """How large the tensors are that operations make, and how much is kept for the backward pass."""

    largest = kept = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.numel())
        return made

    def keep(self, tensor):
        self.kept += tensor.numel()
        return tensor


def gradients(mesh):
    """Loss, counts and gradients of this rank's rows, averaged over ranks as an engine does; and what it took."""
    B = G // mesh.dp.size
    first = row_offset(B, mesh.dp.group)
    mine = slice(first, first + B)
    image, text, log_scale, bias = leaves()
    image, text = image[mine].clone().requires_grad_(), text[mine].clone().requires_grad_()
    scalars = [log_scale.requires_grad_(), bias.requires_grad_()]
    identity = Identity(whole_identity().image_ids[mine], whole_identity().caption_ids[mine])
    with Watch() as watch, saved_tensors_hooks(watch.keep, lambda tensor: tensor):
        loss, counts = sigmoid_loss(image, text, *scalars, identity, mesh.dp.group)
        loss.backward()
    return {
        "loss": mesh.dp.mean(loss.detach()),
        "counts": mesh.dp.sum(counts),
        "image": image.grad / mesh.dp.size,
        "text": text.grad / mesh.dp.size,
        "log_scale": mesh.dp.mean(scalars[0].grad),
        "bias": mesh.dp.mean(scalars[1].grad),
        "largest": watch.largest,
        "kept": watch.kept,
    }


def plain():
    """The same from all pairs at once, by autograd."""
    inputs = [leaf.requires_grad_() for leaf in leaves()]
    image, text, log_scale, bias = inputs
    cosines = image @ text.T
    logits = log_scale.exp() * cosines + bias
    own, left_out = torch.eye(G).bool(), whole_identity().same(whole_identity())
    loss = -F.logsigmoid(logits.diagonal()).sum() - F.logsigmoid(-logits)[~left_out].sum()
    found = dict(zip(("image", "text", "log_scale", "bias"), torch.autograd.grad(loss / G, inputs), strict=True))
    rivals = cosines.masked_fill(left_out & ~own, -2)
    right = sum((rivals.argmax(dim) == torch.arange(G)).sum() for dim in (0, 1))
    return {"loss": loss.detach() / G, "counts": torch.tensor([right, 2 * G]), **found}


def assert_same_as_plain(parts):
    expected = plain()
    assert 0.1 < expected["counts"][0] / expected["counts"][1] < 0.9
    for side in ("image", "text"):
        torch.testing.assert_close(torch.cat([part[side] for part in parts]), expected[side], rtol=1e-5, atol=1e-7)
    for part in parts:
        for name in ("loss", "counts", "log_scale", "bias"):
            torch.testing.assert_close(part[name], expected[name], msg=name)


@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_a_round_of_the_ring_gives_loss_and_gradients_of_all_pairs(request, ranks):
    assert_same_as_plain(request.getfixturevalue(ranks).run(gradients))


def test_a_process_alone_gives_them_too():
    assert_same_as_plain([gradients(Mesh(torch.device("cpu")))])


def test_a_rank_never_holds_more_than_a_block_and_keeps_none(four_ranks):
    B = G // 4
    for part in four_ranks.run(gradients):
        assert part["largest"] == B * B
        assert part["kept"] == 2 * B * E + 2


def test_a_large_block_is_made_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr("pretrain.objectives.sigmoid.MAX_LOGITS", 5 * G)  # 32 rows are six times 5, and 2
    found = gradients(Mesh(torch.device("cpu")))
    assert_same_as_plain([found])
    assert found["largest"] == max(5 * G, (2 * E + 1) * G)


@pytest.fixture(scope="module")
def reference():
    return plain_curve(tiny_config(training__accumulation=1, **SIGMOID), STEPS)


def test_the_reference_learns(reference):
    assert reference[-1].losses["contrastive"] < reference[0].losses["contrastive"] / 2


@pytest.mark.parametrize(("ranks", "stage"), [("one_rank", 3), ("two_ranks", 0), ("two_ranks", 3), ("four_ranks", 1)])
def test_engines_equal_one_process(request, reference, ranks, stage):
    config = tiny_config(training__accumulation=1, engine__zero_stage=stage, **SIGMOID)
    for curve in request.getfixturevalue(ranks).run(engine_curve, config, STEPS):
        assert_same_curve(curve, reference)


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 4), (3, 2)])
def test_accumulation_with_negatives_of_the_global_batch_is_the_whole_batch(two_ranks, reference, stage, accumulation):
    config = tiny_config(training__accumulation=accumulation, engine__zero_stage=stage, **GLOBAL, **SIGMOID)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, reference)


def test_rings_inside_the_world_equal_one_process(four_ranks, reference):
    config = tiny_config(training__accumulation=1, engine__tensor_parallel=2, engine__zero_stage=0, **SIGMOID)
    for curve in four_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, reference)


def save(mesh, config, folder):
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, 4, engine)
    commit(CheckpointStore(folder, mesh.world), 4, engine)


def go_on(mesh, config, folder):
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, 1, engine, first=15)  # another bias and other moments than fresh ones
    store = CheckpointStore(folder, mesh.world)
    checkpoint = store.newest_valid()
    store.load(checkpoint, engine.fragments())
    engine.loaded(read_run(checkpoint)["applied_steps"])
    return engine_curve(mesh, config, STEPS - 4, engine, first=4)


def test_a_checkpoint_holds_the_bias(two_ranks, one_rank, tmp_path, reference):
    config = tiny_config(training__accumulation=1, engine__zero_stage=3, **SIGMOID)
    two_ranks.run(save, config, tmp_path)
    (curve,) = one_rank.run(go_on, tiny_config(training__accumulation=1, engine__zero_stage=0, **SIGMOID), tmp_path)
    assert_same_curve(curve, reference[4:])
