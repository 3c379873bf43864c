"""What a run leaves out survives in its folder."""

import pytest

from data_pipelines.errors import DataError
from data_pipelines.order.mixture import LeftOut
from pretrain.errors import CheckpointError
from pretrain.parallel.mesh import ALONE
from pretrain.rollback import Rollbacks

SPANS = [LeftOut(start=4, stop=9, taken={"web": 9}), LeftOut(start=12, stop=13, taken={"web": 12, "books": 1})]


def test_what_is_kept_is_what_a_later_start_finds(tmp_path):
    rollbacks = Rollbacks(tmp_path, ALONE)
    assert rollbacks.load() == ()
    for kept in (SPANS[:1], SPANS):
        rollbacks.keep(kept)
        assert Rollbacks(tmp_path, ALONE).load() == tuple(kept)


@pytest.mark.parametrize("content", ["", "{", "3", '[{"start": 1}]', '[{"start": 1, "stop": 2, "taken": 3}]', "\udcff"])
def test_a_record_that_cannot_be_read_is_one_sentence(tmp_path, content):
    (tmp_path / "rollbacks.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="rollbacks.json, which says what data .* cannot be read"):
        Rollbacks(tmp_path, ALONE).load()


def test_a_record_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "rollbacks.json").mkdir()
    with pytest.raises(DataError, match=r"Cannot write .*rollbacks.json"):
        Rollbacks(tmp_path, ALONE).keep(SPANS)
