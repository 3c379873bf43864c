"""A run stops when too many of its samples are bad, and says which."""

import pytest

from data_pipelines.batch import BadSample
from data_pipelines.errors import DataError
from data_pipelines.stream.budget import BadSampleBudget

BAD = BadSample("data/00003.tar", "000123", "image cannot be decoded: it is cut short")


def test_a_run_goes_on_until_both_allowances_are_used_up():
    budget = BadSampleBudget(2, 0.01)
    budget.add([BAD], 50)
    budget.add([BAD, BAD], 50)
    with pytest.raises(DataError):
        budget.add([BAD], 0)
    assert (budget.num_bad, budget.num_seen) == (4, 100)
    assert budget.reasons == {BAD.reason: 4}


def test_the_message_names_counts_reason_key_shard_and_fix():
    budget = BadSampleBudget(0, 0.0)
    with pytest.raises(DataError) as error:
        budget.add([BAD, BAD, BAD], 64)
    message = str(error.value)
    for words in ("3 of 64 samples", f"3 x {BAD.reason}", BAD.key, BAD.shard, "data.max_bad_samples (0)"):
        assert words in message
    assert "data.max_bad_fraction (0.0)" in message
