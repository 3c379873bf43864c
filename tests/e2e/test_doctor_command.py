"""`python -m pretrain doctor` as a user runs it: on ranks that a launcher started, and alone; right, and broken."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed.tiny import mesh_of, tiny_config
from e2e.conftest import run
from pretrain.doctor import compare, measure_bandwidth
from pretrain.errors import TrainingError
from pretrain.models.heads import MaskedLMHead

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"  # its data are not there, and not needed

BROKEN = """
import os
import sys

import torch.distributed as dist

from pretrain.__main__ import main

right = dist.{collective}


def wrong(output, *arguments, **options):
    work = right(output, *arguments, **options)
    if output.is_floating_point() and os.environ["RANK"] == "1":
        if work is not None:
            work.wait()
        output *= 1.001
    return work


dist.{collective} = wrong
main()
"""


def doctor(*arguments, script=("-m", "pretrain")):
    launcher = ("--nnodes", 1, "--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    command = (*launcher, "--local-addr", "127.0.0.1", "--max-restarts", 0, *script, "doctor", CONFIG, *arguments)
    return run("launch.torchrun", *command)


def test_a_layout_takes_the_steps_of_one_process_and_the_command_says_what_it_measured():
    result = doctor("engine.zero_stage=3", "training.accumulation=2")
    assert result.code == 0, result.err
    number = r"\d[\d.e+-]*"
    assert re.search(rf"fp32( +{number}){{4}} +0.0001 +0.0001", result.out)
    for what in ("all-reduce", "all-gather", "to the next rank"):
        assert re.search(rf"dp, 2 ranks: {what}( +{number}){{3}} +rank [01]", result.out)
    assert re.search(rf"Matrix products in float32, [TG]FLOP/s a rank: median {number}, slowest {number}", result.out)
    assert "The layout takes the steps of one process." in result.out
    assert result.err == ""


def compared(mesh, config):
    torch.set_float32_matmul_precision("medium")  # as an environment may
    comparisons = compare(config, mesh_of(mesh, config))
    return comparisons, torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    "changes",
    [
        {"engine__zero_stage": 1},
        {"engine__tensor_parallel": 2, "engine__zero_stage": 0, "engine__precision": "bf16"},
        {"engine__pipeline_parallel": 2, "engine__zero_stage": 1, "training__accumulation": 4},
        {"objectives__contrastive__negatives": "global_batch", "engine__offload": "cpu"},
        {"objectives__matching__pool": 16, "objectives__contrastive__loss": "sigmoid", "engine__precision": "bf16"},
    ],
)
def test_what_the_layout_does_not_change_is_found_equal(two_ranks, changes):
    for comparisons, precision in two_ranks.run(compared, tiny_config(**changes)):
        assert precision == "highest"
        assert [comparison.problem(["here"] * 2) for comparison in comparisons] == [None] * len(comparisons)
        by_name = {comparison.name: max(comparison.largest().values()) for comparison in comparisons}
        assert set(by_name) == {"rank alone", "fp32"} | ({"bf16"} if "engine__precision" in changes else set())
        assert by_name["fp32"] < 1e-5
        assert by_name.get("bf16", 1.0) > 1e-4  # it ran in bf16


def compared_with_noise(mesh, config):
    """One rank's sums are wrong in the last digit: far below what a loss may differ by."""
    right = dist.all_reduce

    def wrong(tensor, *arguments, **options):
        work = right(tensor, *arguments, **options)
        if tensor.is_floating_point() and mesh.world.rank == 1:
            tensor *= 1 + 1e-6
        return work

    dist.all_reduce = wrong
    try:
        return [comparison.problem(["one", "two"]) for comparison in compare(config, mesh_of(mesh, config))]
    finally:
        dist.all_reduce = right


def test_copies_that_drift_apart_are_told_before_a_loss_shows_it(two_ranks):
    for alone, layout in two_ranks.run(compared_with_noise, tiny_config(engine__zero_stage=0)):
        assert alone is None
        assert re.match(r"fp32: \S+ of \S+ differs between ranks 0 and 1 after 3 steps, and \d+ more, where", layout)
        assert "one and two get unequal results" in layout


def compared_without_a_head(mesh, config):
    right = MaskedLMHead.forward
    MaskedLMHead.forward = lambda self, tokens, *_: (tokens.sum() * 0, torch.zeros(2, dtype=torch.int64))
    try:
        compare(config, mesh_of(mesh, config))
    except TrainingError as error:
        return str(error)
    finally:
        MaskedLMHead.forward = right


def test_a_layer_that_no_loss_reaches_is_told(two_ranks):
    for said in two_ranks.run(compared_without_a_head, tiny_config(engine__zero_stage=3)):
        assert said.startswith("8 trainable parameters had no gradient in this step, masked_lm_head.decode.bias first")


def bandwidth(mesh, config):
    return measure_bandwidth(mesh_of(mesh, config), torch.float32)


def test_the_links_of_the_layouts_own_axes_are_measured(two_ranks):
    for rates in two_ranks.run(bandwidth, tiny_config(engine__tensor_parallel=2, engine__zero_stage=0)):
        assert list(rates) == [f"tp, 2 ranks: {what}" for what in ("all-reduce", "all-gather", "to the next rank")]
        assert all(len(of_sizes) == 3 and min(of_sizes) > 0 for of_sizes in rates.values())


def test_one_process_needs_no_launcher():
    result = run("pretrain", "doctor", CONFIG)
    assert result.code == 0, result.err
    assert "The layout takes the steps of one process." in result.out


def test_a_collective_that_errs_on_one_rank_is_found_and_all_leave_with_the_code_of_it(tmp_path):
    """One part in a thousand: training would go on, and a loss curve would not show it."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(collective="reduce_scatter_tensor"))
    result = doctor("engine.zero_stage=3", script=(script,))
    assert result.code == 7, result.err
    assert re.search(r"fp32: .* of step \d is \S+ on rank \d of \S+ and \S+ in one process", result.err)
    assert "Traceback" not in result.err
    assert "The layout takes the steps" not in result.out


def test_degrees_that_do_not_fit_the_processes_are_one_sentence():
    result = run("pretrain", "doctor", CONFIG, "engine.tensor_parallel=2")
    assert result.code == 4
    assert "engine.tensor_parallel 2" in result.err
    assert "Traceback" not in result.err
