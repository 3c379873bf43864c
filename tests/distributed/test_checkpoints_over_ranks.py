"""Several ranks save one checkpoint: all of them or none, and from any number of ranks to any other."""

import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.store import CheckpointStore, Failed, Saved
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import Part, whole

ROWS, COLUMNS = 30, 40
KINDS = ("master", "exp_avg", "exp_avg_sq")


def values(name, step, kind) -> torch.Tensor:
    """All of a parameter, as it is after a step."""
    shape = {"weight": (ROWS, COLUMNS), "frozen": (7,), "bias": (3,)}[name]
    first = 1e4 * step + 1e3 * (*KINDS,).index(kind)
    return first + torch.arange(torch.Size(shape).numel()).view(shape).float()


def piece(name, part, start, stop, step, kinds=KINDS):
    """What a rank holds of a parameter: some elements of a part of it."""
    cut = tuple(slice(a, a + n) for a, n in zip(part.offset, part.size, strict=True))
    tensors = {kind: values(name, step, kind)[cut].flatten()[start:stop].clone() for kind in kinds}
    return Fragment(name, part, start, tensors)


def state(rank, size, step, cut_dim=0):
    """`weight` is cut along a dim; the frozen parameter is the last rank's, and `bias` the first's."""
    extent = (ROWS, COLUMNS)[cut_dim]
    offset, part_size = [0, 0], [ROWS, COLUMNS]
    offset[cut_dim], part_size[cut_dim] = rank * extent // size, (rank + 1) * extent // size - rank * extent // size
    part = Part((ROWS, COLUMNS), tuple(offset), tuple(part_size), is_cut=size > 1)
    fragments = [piece("weight", part, 0, ROWS * COLUMNS // size, step)]
    if rank == 0:
        fragments.append(piece("bias", whole(torch.empty(3)), 0, 3, step))
    if rank == size - 1:
        fragments.insert(0, piece("frozen", whole(torch.empty(7)), 0, 7, step, kinds=("master",)))
    return fragments


def flat_state(rank, size, step):
    """`weight` whole, of which a rank holds elements regardless of rows, as ZeRO does."""
    part, numel = whole(torch.empty(ROWS, COLUMNS)), ROWS * COLUMNS
    return [piece("weight", part, rank * numel // size, (rank + 1) * numel // size, step)]


def save(mesh, folder, step, node=None, cut_dim=0):
    store = CheckpointStore(folder, mesh.world, node=node)
    store.save(step, state(mesh.world.rank, mesh.world.size, step, cut_dim), {})
    return store.settle(wait=True)


def load(mesh, folder, step, make):
    store = CheckpointStore(folder, mesh.world)
    wanted = make(mesh.world.rank, mesh.world.size, step)
    expected = [{kind: tensor.clone() for kind, tensor in fragment.tensors.items()} for fragment in wanted]
    for fragment in wanted:
        for tensor in fragment.tensors.values():
            tensor.zero_()
    store.load(store.newest_valid(step=step), wanted)
    return all(
        torch.equal(there[kind], fragment.tensors[kind])
        for there, fragment in zip(expected, wanted, strict=True)
        for kind in there
    )


@pytest.mark.parametrize("cut_dim", [0, 1])
@pytest.mark.parametrize(("node", "files"), [(None, ["00000", "00001"]), (0, ["00000"])])
def test_what_two_ranks_save_any_ranks_load(two_ranks, one_rank, four_ranks, tmp_path, node, files, cut_dim):
    outcomes = two_ranks.run(save, tmp_path, 5, node, cut_dim)
    assert {type(outcome) for outcome in outcomes} == {Saved}
    checkpoint = tmp_path / "step-000000005"
    data = sorted(checkpoint.glob("*.safetensors"))
    assert [path.stem for path in data] == [f"node-{number}" for number in files]
    tensors = {name: tensor for path in data for name, tensor in load_file(path).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "0/trained": (3, ROWS * COLUMNS // 2 + 3),
        "1/trained": (3, ROWS * COLUMNS // 2),
        "1/frozen": (1, 7),
    }
    for ranks in (one_rank, two_ranks, four_ranks):
        assert all(ranks.run(load, tmp_path, 5, state))
        assert all(ranks.run(load, tmp_path, 5, flat_state))


def save_with_little_space(mesh, folder, step, poor_rank):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.world.rank == poor_rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        return save(mesh, folder, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("poor_rank", [0, 1])
def test_one_rank_that_cannot_write_costs_this_save_on_all_ranks_and_no_other(two_ranks, tmp_path, poor_rank):
    two_ranks.run(save, tmp_path, 1)
    for outcome in two_ranks.run(save_with_little_space, tmp_path, 2, poor_rank):
        assert isinstance(outcome, Failed)
        assert outcome.problem.startswith(f"rank {poor_rank}: File too large")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-000000001"]
    assert all(two_ranks.run(load, tmp_path, 1, state))
    assert {type(outcome) for outcome in two_ranks.run(save, tmp_path, 3)} == {Saved}


def save_while_one_rank_is_slow(mesh, folder):
    """The second rank asks twice before its own writing is done."""
    store = CheckpointStore(folder, mesh.world)
    store.save(1, state(mesh.world.rank, mesh.world.size, 1), {})
    mesh.world.gather_objects(None)
    writer = store._flight.writer
    writer.join()
    if mesh.world.rank == 1:
        writer.is_alive = lambda: True
    first = store.settle(wait=False)
    if mesh.world.rank == 1:
        del writer.is_alive
    return first, type(store.settle(wait=False))


def test_nothing_is_committed_before_all_ranks_have_written(two_ranks, tmp_path):
    assert two_ranks.run(save_while_one_rank_is_slow, tmp_path) == [(None, Saved)] * 2


def save_one_after_the_other(mesh, folder):
    """What ranks hold changes from save to save."""
    store = CheckpointStore(folder, mesh.world)
    rank, size = mesh.world.rank, mesh.world.size
    for step, cut_dim in ((1, 0), (2, 0), (3, 1), (4, 0)):
        store.save(step, state(rank, size, step, cut_dim), {})
        store.settle(wait=True)


def test_a_store_whose_ranks_come_to_hold_other_pieces_writes_another_index(two_ranks, tmp_path):
    two_ranks.run(save_one_after_the_other, tmp_path)
    for step in (2, 3, 4):
        assert all(two_ranks.run(load, tmp_path, step, state))


def test_a_damaged_piece_is_found_whichever_rank_looks_at_it(two_ranks, tmp_path):
    for step in (1, 2):
        two_ranks.run(save, tmp_path, step, 0)
    file = tmp_path / "step-000000002" / "node-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # in the second rank's piece
    file.write_bytes(content)
    assert CheckpointStore(tmp_path, ALONE).newest_valid(quarantine=False).name == "step-000000001"
    assert two_ranks.run(newest, tmp_path) == ["step-000000001"] * 2


def newest(mesh, folder):
    return CheckpointStore(folder, mesh.world).newest_valid().name
