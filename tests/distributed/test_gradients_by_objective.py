"""Each objective by itself has the gradient of one process, whatever the layout: losses and gradient norms over steps.

The sum of three gradients would hide a small one that is wrong.
"""

import pytest

from distributed.layouts import LAYOUTS
from distributed.tiny import CLIP, assert_same_curve, engine_curve, plain_curve, tiny_config

STEPS = 6
HERE = [name for name in LAYOUTS if "ZeRO-0" in name]  # plain PyTorch: the fastest
# The contrastive objective cannot be left out: it is weighed so lightly that the others' gradient is all there is.
FAINT = {"objectives__contrastive__weight": 1e-7}
OBJECTIVES = {
    "contrastive": CLIP,
    "contrastive, sigmoid": {**CLIP, "objectives__contrastive__loss": "sigmoid"},
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
        (first,) = plain_curve(fainter, 1)
        assert first.norm == pytest.approx(references[objective][0].norm, rel=1e-5)


@pytest.mark.parametrize("layout", HERE)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_its_gradient_is_that_of_one_process(request, references, objective, layout):
    ranks, changes = LAYOUTS[layout]
    config = tiny_config(**OBJECTIVES[objective], **changes)
    for curve in request.getfixturevalue(ranks).run(engine_curve, config, STEPS):
        assert_same_curve(curve, references[objective])
