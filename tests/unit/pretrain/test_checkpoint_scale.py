"""The index of many ranks: what it costs grows with what they hold, and with nothing else."""

import json

import pytest
import torch

from benchmarks.checkpoint import measure_index, pretended_holding
from pretrain.checkpoint.boxes import Box
from pretrain.checkpoint.index import INTERVALS, TABLE, Index
from pretrain.checkpoint.layout import Layout

PARAMETERS = 40


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    return {ranks: measure_index(ranks, PARAMETERS, tmp_path_factory.mktemp("index")) for ranks in (256, 2048)}


def test_an_interval_takes_16_bytes_and_the_first_rank_little_more(figures, tmp_path):
    measure_index(256, PARAMETERS, tmp_path)
    assert (tmp_path / INTERVALS).stat().st_size == 16 * 256 * PARAMETERS
    few, many = figures[256], figures[2048]
    assert many.intervals == 8 * few.intervals
    bytes_per_interval = (many.commit_mib - few.commit_mib) * 2**20 / (many.intervals - few.intervals)
    assert bytes_per_interval < 50  # 200 MiB for 4 million


def test_eight_times_the_ranks_take_about_eight_times_as_long(figures):
    few, many = figures[256], figures[2048]
    assert many.commit_s < 16 * few.commit_s
    assert many.open_s < 16 * few.open_s
    assert many.find_s < 3 * few.find_s  # it bisects


def test_ranks_that_hold_the_same_parts_describe_them_once(tmp_path):
    measure_index(256, PARAMETERS, tmp_path)
    table = json.loads((tmp_path / TABLE).read_text())
    assert len(table["parameters"]) == 8 * PARAMETERS  # of eight stages
    assert {len(parameter["cuts"]) for parameter in table["parameters"]} == {9}


def test_a_piece_is_found_in_the_ranks_that_hold_it_and_in_no_other(tmp_path):
    measure_index(256, PARAMETERS, tmp_path)
    index = Index.open(tmp_path)
    parameter = index.parameters["stage2.block1.weight3"]
    rows = [(f.start, f.stop, f.stream.file, f.part.offset) for f in index.find(parameter, Box((384, 0), (64, 64)))]
    # Elements [0, 4096) of the fourth part: of four data-parallel ranks of that stage, the first two.
    assert rows == [
        (0, 2048, "node-00064.safetensors", (384, 0)),
        (2048, 4096, "node-00072.safetensors", (384, 0)),
    ]


def test_a_file_per_node_and_a_tensor_per_rank_in_it():
    heads = [pretended_holding(rank, 64, 3).head for rank in range(64)]
    layout = Layout(torch.stack(heads))
    assert len({share.file for share in layout.shares}) == 8
    for first, second in zip(layout.shares, layout.shares[1:], strict=False):
        if first.file == second.file:
            assert first.position + first.bytes == second.position
        else:
            assert second.position == 0
            assert second.header
