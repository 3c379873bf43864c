"""The `data:` section refuses what no run could mean."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from data_pipelines.config import DataConfig


@pytest.mark.parametrize("scale", [(0.5, 0.2), (0.0, 1.0), (-0.1, 0.5), (0.5, 1.1)])
def test_a_crop_scale_that_is_no_range_of_shares_is_refused_with_both_values(scale: tuple[float, float]):
    with pytest.raises(
        ValidationError, match=rf"crop_scale \[{scale[0]}, {scale[1]}\] must be .* 0 < low <= high <= 1"
    ):
        DataConfig(train=Path("m.json"), tokenizer=Path("t.model"), crop_scale=scale)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (1.0, 1.0)])
def test_a_crop_scale_may_be_a_single_share(scale: tuple[float, float]):
    assert DataConfig(train=Path("m.json"), tokenizer=Path("t.model"), crop_scale=scale).crop_scale == scale
