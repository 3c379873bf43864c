"""A pool of hard negatives may lie on several ranks: they find the negatives of one process, and take its steps.

Grains of 4 samples, pools of 16 or 32, so that every pool lies on all ranks; all three objectives, fp32.
"""

import pytest
import torch
import torch.nn.functional as F

from distributed.tiny import ARCHITECTURES, assert_same_curve, engine_curve, plain_curve, tiny_config
from pretrain.collectives import all_gather, all_gather_with_gradient, fetch, find_route
from pretrain.objectives.contrastive import Identity
from pretrain.objectives.matching import mine_hard_negatives
from pretrain.parallel.mesh import Mesh

STEPS = 6
G, GRAIN, FIRST = 32, 4, 96  # samples of a micro-step, and where it begins


def pool_config(pool, **changes):
    return tiny_config(**{"objectives__matching__pool": pool, "training__accumulation": 1, **changes})


@pytest.fixture(scope="module")
def curves():
    return {pool: plain_curve(pool_config(pool), STEPS) for pool in (16, 32)}


@pytest.mark.parametrize("pool", [16, 32])
@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks", "four_ranks"])
def test_any_number_of_ranks_equals_one_process(request, curves, ranks, pool):
    for curve in request.getfixturevalue(ranks).run(engine_curve, pool_config(pool, engine__zero_stage=0), STEPS):
        assert_same_curve(curve, curves[pool])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_equals_one_process(two_ranks, curves, stage):
    config = pool_config(16, engine__zero_stage=stage, engine__activation_checkpointing=stage == 3)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, curves[16])


def test_accumulation_with_negatives_of_the_global_batch_equals_one_process(two_ranks, curves):
    config = pool_config(16, training__accumulation=2, objectives__contrastive__negatives="global_batch")
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, curves[16])


def test_a_group_that_is_part_of_the_world_equals_one_process(four_ranks, curves):
    for curve in four_ranks.run(engine_curve, pool_config(32, engine__tensor_parallel=2, engine__zero_stage=0), STEPS):
        assert_same_curve(curve, curves[32])


def test_without_masked_lm_the_fetched_captions_are_found_too(two_ranks):
    config = pool_config(32, engine__zero_stage=0, objectives__masked_lm=None)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, plain_curve(config, STEPS))


@pytest.mark.parametrize("architecture", ["blip", "vilt"])
def test_other_architectures_find_the_pairs_of_one_process_too(two_ranks, architecture):
    config = pool_config(16, engine__zero_stage=0, **ARCHITECTURES[architecture].changes)
    reference = plain_curve(config, STEPS)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, reference)


def negatives(mesh, pool):
    """{position: (position of its negative image, of its negative caption, whether each is valid)}, of this rank's."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(G, 8, generator=generator), dim=1) for _ in range(2))
    image_ids, caption_ids = torch.arange(G) // 3, torch.arange(G)
    image_ids[8:16] = 99  # nothing but false negatives for a pool of 8
    mine = torch.arange(G).view(-1, GRAIN)[mesh.dp.rank :: mesh.dp.size].flatten()
    identity = Identity(image_ids[mine], caption_ids[mine])
    log_scale = torch.tensor([1.0])
    found = mine_hard_negatives(
        image[mine], text[mine], log_scale, identity, FIRST + mine, pool, seed=0, group=mesh.dp.group
    )
    everyone = all_gather(FIRST + mine, mesh.dp.group)
    columns = (everyone[found.image_rows], everyone[found.text_rows], found.valid)
    return dict(zip((FIRST + mine).tolist(), zip(*(column.tolist() for column in columns), strict=True), strict=True))


@pytest.mark.parametrize("pool", [8, 16, 32])
@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_negatives_are_exactly_those_of_one_process(request, ranks, pool):
    alone = negatives(Mesh(torch.device("cpu")), pool)
    together = {}
    for found in request.getfixturevalue(ranks).run(negatives, pool):
        together |= found
    assert together == alone
    assert any(not image_valid for _, _, image_valid in alone.values()) == (pool == 8)


def fetched(mesh, dtype, wanted):
    """Rows fetched and gathered, and the gradients that each way gives this rank's own rows."""
    generator = torch.Generator().manual_seed(mesh.dp.rank)
    rows = torch.randn(4, 3, 2, generator=generator).to(dtype).requires_grad_()
    wanted = torch.tensor(wanted[mesh.dp.rank])
    weights = torch.randn(len(wanted), 3, 2, generator=generator).to(dtype)
    route = find_route(wanted, len(rows), mesh.dp.group)
    ways = []
    for found in (
        fetch(rows, route, mesh.dp.group),
        all_gather_with_gradient(rows, mesh.dp.group)[wanted],
    ):
        rows.grad = None
        (found * weights).sum().backward()
        ways.append((found.detach(), rows.grad))
    return ways


WANTED = {
    "anybody's": [[3, 9, 9, 0, 15], [4, 1, 12, 6, 6], [8, 10, 9, 11, 2], [0, 14, 5, 7, 13]],
    "one rank's": [[5, 4, 7], [6, 6, 6], [4, 5, 6], [7, 7, 4]],
    "their own": [[0, 1], [4, 5], [8, 8], [15, 12]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", WANTED)
def test_fetched_rows_are_the_gathered_ones_gradients_included(four_ranks, wanted, dtype):
    for (rows, gradient), (expected_rows, expected_gradient) in four_ranks.run(fetched, dtype, WANTED[wanted]):
        assert torch.equal(rows, expected_rows)
        assert rows.dtype == gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected_gradient)
