"""Each objective by itself has the gradient of one process, whatever the layout: losses and gradient norms over steps.

The sum of three gradients would hide a small one that is wrong.
"""

import pytest

from distributed.test_tensor_parallel_equals_one_process import DUAL_ENCODER
from distributed.test_zero_equals_one_process import assert_same_curve
from distributed.tiny import engine_curve, plain_curve, tiny_config

STEPS = 6
LAYOUTS = {  # name -> ranks, and what the config says of them
    "dp 2": ("two_ranks", {}),
    "dp 4": ("four_ranks", {}),
    "tp 2": ("two_ranks", {"engine__tensor_parallel": 2}),
    "tp 2 x dp 2": ("four_ranks", {"engine__tensor_parallel": 2}),
}
# The contrastive objective cannot be left out: it is weighed so lightly that the others' gradient is all there is.
FAINT = {"objectives__contrastive__weight": 1e-7}
OBJECTIVES = {
    "contrastive": DUAL_ENCODER,
    "contrastive, sigmoid": {**DUAL_ENCODER, "objectives__contrastive__loss": "sigmoid"},
    "matching": {**FAINT, "objectives__masked_lm": None},
    "matching, pool over ranks": {**FAINT, "objectives__masked_lm": None, "objectives__matching__pool": 16},
    "masked_lm": {**FAINT, "objectives__matching": None},
}


@pytest.fixture(scope="module")
def references():
    return {name: plain_curve(tiny_config(**changes), STEPS) for name, changes in OBJECTIVES.items()}


def test_a_faint_objective_is_no_part_of_the_gradient(references):
    for objective in ("matching", "masked_lm"):
        fainter = tiny_config(**{**OBJECTIVES[objective], "objectives__contrastive__weight": 1e-9})
        ((_, norm),) = plain_curve(fainter, 1)
        assert norm == pytest.approx(references[objective][0][1], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_its_gradient_is_that_of_one_process(request, references, objective, layout):
    ranks, changes = LAYOUTS[layout]
    config = tiny_config(engine__zero_stage=0, **OBJECTIVES[objective], **changes)
    for curve in request.getfixturevalue(ranks).run(engine_curve, config, STEPS):
        assert_same_curve(curve, references[objective])
