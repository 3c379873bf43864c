"""`python -m launch plan`: what it says of a run, what it refuses, and that its handbook computes the same."""

import json
import math
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sentencepiece
import yaml

from data_pipelines.errors import UserError
from distributed.tiny import tiny_config
from launch.hardware import GPUS, TIME_ERROR, find_gpu, latency_s
from launch.plan import (
    VOCABULARY,
    Cluster,
    Costs,
    Plan,
    _with_engine,
    best_layouts,
    count_pieces,
    divisors,
    make_plan,
    objection,
)
from launch.plan_report import run_plan
from pretrain.config import Config, load_config

REPOSITORY = Path(__file__).parents[3]
HUGE = REPOSITORY / "configs/huge.yaml"
CLUSTER = Cluster(512, 8, GPUS["h100"])


def huge(*overrides: str) -> Config:
    return load_config(HUGE, overrides)


MEASURED: dict[str, Costs] = {}


def costs(config: Config) -> Costs:
    """Of each optimisation once for all tests."""
    key = config.model_dump_json(exclude={"engine"})
    if key not in MEASURED:
        MEASURED[key] = Costs(config, VOCABULARY)
    return MEASURED[key]


def planned(config: Config, cluster: Cluster) -> Plan:
    return make_plan(config, cluster, costs(config))


def run(capsys, path: Path, *overrides: str, cluster: Cluster = CLUSTER, **options: Any) -> tuple[int, str]:
    with mock.patch("launch.plan_report.Costs", lambda config, _: costs(config)):
        code = run_plan(path, overrides, cluster, **options)
    return code, capsys.readouterr().out


def test_the_command_answers_for_20_b_parameters_in_ten_seconds_of_a_processor():
    words = f"plan {HUGE} --nodes 512 --gpus-per-node 8 --gpu h100 --json training.steps=300000"
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words.split()], cwd=REPOSITORY, capture_output=True, text=True
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said["parameters"] == pytest.approx(20e9, rel=0.05)
    assert said["gpu_hours"] == pytest.approx(300_000 * said["step_s"] / 3600 * 4096)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 10


def handbook() -> dict[str, float]:
    """Evaluates the lines `name = formula = value` of docs/planning.md, each with the names before it."""
    text = (REPOSITORY / "docs/planning.md").read_text().partition("## By hand")[2]
    found: dict[str, float] = {}
    for name, formula, value in re.findall(r"^(\w+) = (.+) = (\S+)$", text, re.MULTILINE):
        found[name] = eval(formula, {}, found)
        digits = len(re.sub(r"e.*|^0\.0*|\D", "", value))
        assert float(f"{found[name]:.{digits - 1}e}") == pytest.approx(float(value), rel=1e-9), name
    return found


def test_the_handbooks_calculation_is_right_and_the_plans_own():
    by_hand = handbook()
    plan = planned(huge(), CLUSTER)
    seconds = {(each.transfer.what, each.transfer.kind): each.time_s for each in plan.exchanges}
    ours = {
        "training": plan.costs.flops,
        "compute_s": plan.compute_s,
        "activations": plan.activations(checkpointing=False),
        "memory_gib": plan.memory_gib,
        "weights_s": seconds["updated weights", "all-gather"],
        "gradients_s": seconds["gradients", "all-reduce"],
        "cut_s": seconds["activations of cut matrices", "all-reduce"],
        "step_s": plan.step_s,
        "samples_per_s": plan.samples_per_s,
        "mfu": plan.mfu,
        "hours": plan.hours,
        "gpu_hours": plan.hours * 4096,
        "zero_3_host_s": planned(huge("engine.zero_stage=3"), CLUSTER).step_s,
    }
    assert by_hand["parameters"] == plan.costs.forward.parameters
    assert {name: by_hand[name] for name in ours} == pytest.approx(ours, rel=0.01)


def test_the_header_of_the_config_says_what_the_plan_says():
    plan, header = planned(huge(), CLUSTER), HUGE.read_text().partition("output:")[0]
    for part in (
        f"{plan.step_s:.2f} s a step",
        f"{plan.mfu:.0%} of the peak",
        f"{plan.memory_gib:.0f} GiB of each GPU",
    ):
        assert part in header


def test_the_report_names_every_part(capsys):
    code, said = run(capsys, HUGE)
    assert code == 0
    for part in (
        "20.43 B parameters",
        "a guess: there is no data/pairs/tokenizer.model yet, and --vocabulary is not given",
        "possible, and fits",
        "activations in the backward pass, with checkpointing",
        "matching alone",
        "all-gather",
        "reduce-scatter",
        "tp, NVLink",
        "dp, network",
        "pipeline bubble",
        "model FLOPs utilisation",
        "GPU-hours",
        "best layouts of the same optimisation",
        "computing at 50% of the peak",
    ):
        assert part in said
    assert not re.search(r"[\w.]/(work|home)/", said)


@pytest.mark.parametrize(
    ("overrides", "cluster", "said"),
    [
        (
            ["engine.tensor_parallel=4"],
            Cluster(2, 6, GPUS["h100"]),
            "engine.tensor_parallel 4 does not divide the 6 GPUs",
        ),
        (
            ["engine.data_parallel=3"],
            CLUSTER,
            "engine.data_parallel 3 x engine.tensor_parallel 2 x engine.pipeline_parallel 1 = 6 does not make up the "
            "4,096 GPUs of the run: change one of them, or take another number of GPUs.",
        ),
        (
            ["engine.pipeline_parallel=3", "engine.zero_stage=1"],
            CLUSTER,
            "engine.tensor_parallel 2 x engine.pipeline_parallel 3 = 6 does not divide the 4,096 GPUs of the run",
        ),
        (["training.global_batch=32784"], CLUSTER, "training.global_batch 32,784 does not divide into whole grains"),
        (["training.global_batch=32768"], Cluster(1, 8, GPUS["a100"]), "GiB at its fullest, and a GPU of 79 GiB"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence_with_exit_code_4(capsys, overrides, cluster, said):
    code, out = run(capsys, HUGE, *overrides, cluster=cluster)
    assert code == 4
    assert "NOT POSSIBLE" in out
    assert said in out


def test_what_the_config_itself_refuses_is_the_reason():
    words = ["plan", str(HUGE), "--nodes", "512", "engine.pipeline_parallel=2"]
    done = subprocess.run([sys.executable, "-m", "launch", *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 4
    assert "engine.zero_stage 2 and engine.pipeline_parallel 2 exclude each other" in done.stderr


def test_the_best_layouts_are_the_fastest_that_fit_and_do_the_same():
    best = best_layouts(huge(), CLUSTER, costs(huge()))
    assert len(best) == 3
    fastest_s = best[0].step_s
    for plan in best:
        assert plan.step_s > fastest_s / (1 + TIME_ERROR)
        assert plan.fits
        assert objection(plan.config, CLUSTER) is None
        assert plan.config.training == huge().training  # accumulation is part of the recipe
    given = planned(huge("engine.tensor_parallel=8"), CLUSTER)
    assert best[0].step_s < given.step_s


def test_of_zeros_stages_the_lowest_that_the_plan_cannot_tell_from_the_fastest_is_listed():
    config, node = load_config(REPOSITORY / "configs/base.yaml"), Cluster(1, 8, GPUS["h100"])
    first = best_layouts(config, node, costs(config))[0]
    fastest_s = min(planned(_with_engine(config, zero_stage=stage), node).step_s for stage in range(4))
    assert fastest_s < first.step_s < fastest_s * (1 + TIME_ERROR)
    assert first.config.engine.zero_stage < 2


def test_both_rows_of_activations_are_of_the_backward_pass(capsys):
    """With checkpointing the fullest moment of this run is the reduction, which holds pixels alone."""
    base, node = REPOSITORY / "configs/base.yaml", Cluster(1, 8, GPUS["h100"])
    found = [json.loads(run(capsys, base, f"engine.zero_stage={n}", cluster=node, as_json=True)[1]) for n in (0, 1, 3)]
    held = [each["activation_bytes"] for each in found]
    assert held[0] == held[1] == held[2]
    assert 0.05 < held[0]["with checkpointing"] / held[0]["without checkpointing"] < 0.5


def test_the_layout_asked_for_is_marked_and_the_others_come_as_overrides_to_paste(capsys):
    base, node = REPOSITORY / "configs/base.yaml", Cluster(1, 8, GPUS["h100"])
    for asked in (["engine.zero_stage=0"], ["engine.tensor_parallel=4", "engine.zero_stage=3"]):
        said = run(capsys, base, *asked, cluster=node)[1]
        table, _, rest = said.partition("best layouts of the same optimisation\n")[2].partition("overrides that ask")
        assert table.count("asked for") == 1
        pasted = re.findall(r"^(\d): (.+)$", rest, flags=re.MULTILINE)
        rows = {row.split()[0]: row for row in table.splitlines()[2:] if row}
        assert len(pasted) == len(rows) - 1
        for number, words in pasted:
            plan = planned(load_config(base, [*asked, *words.split()]), node)
            assert f" {plan.step_s:.3f} " in rows[number]
            assert "asked for" not in rows[number]


def test_a_plan_has_one_conclusion(capsys):
    said = run(capsys, HUGE, "training.global_batch=500", cluster=Cluster(1, 8, GPUS["h100"]))[1]
    assert "4 data-parallel ranks x training.accumulation 1 x data.grain 16 = 64 must divide it; use 448 or 512" in said
    assert "best layouts" not in said
    assert "more GPUs" not in said
    tiny = Cluster(1, 1, find_gpu("t4:65:15:1:1"))
    said = run(capsys, HUGE, "engine.tensor_parallel=1", "training.global_batch=16", cluster=tiny)[1]
    assert (
        "has room for 9: no layout of this global batch fits, so take more GPUs, or a smaller model or batch." in said
    )
    assert "best layouts" not in said


def test_a_plan_says_in_hours_how_long_it_takes_and_how_many_cores_decode(capsys):
    base, node = REPOSITORY / "configs/base.yaml", Cluster(1, 8, GPUS["h100"])
    said = json.loads(run(capsys, base, cluster=node, as_json=True)[1])
    assert said["hours"] == pytest.approx(240_000 * said["step_s"] / 3600)
    assert said["decoding_cores_per_node"] == pytest.approx(said["samples_per_s"] / 559)
    assert re.search(rf"240,000 steps, 122\.9 M samples +{said['hours']:.1f} h\n", run(capsys, base, cluster=node)[1])


def test_ranks_that_share_matrices_decode_the_same_samples_each():
    one, two = (planned(huge(f"engine.tensor_parallel={tp}"), CLUSTER) for tp in (1, 2))
    assert one.decoding_cores / one.samples_per_s * 2 == pytest.approx(two.decoding_cores / two.samples_per_s)


def test_the_search_does_not_take_longer_the_more_gpus_there_are():
    best_layouts(huge(), CLUSTER, costs(huge()))
    began = time.process_time()
    best_layouts(huge(), Cluster(10_000_000, 8, GPUS["h100"]), costs(huge()))
    assert time.process_time() - began < 2


def test_a_cluster_is_divided_in_every_way():
    for number in range(1, 101):
        assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


@pytest.mark.parametrize("named", [[], ["engine.data_parallel=2048"]], ids=str)
def test_the_overrides_of_a_best_layout_run_on_the_same_config(capsys, named):
    said = json.loads(run(capsys, HUGE, *named, as_json=True)[1])
    assert any("engine.tensor_parallel=2" not in best["overrides"] for best in said["best"])
    for best in said["best"]:
        again = planned(huge(*named, *best["overrides"]), CLUSTER)
        assert objection(again.config, CLUSTER) is None
        assert again.step_s == pytest.approx(best["step_s"])


def test_accumulation_is_free_where_it_changes_nothing():
    words = ["objectives.contrastive.negatives=global_batch", "training.global_batch=16384"]
    config = load_config(REPOSITORY / "configs/base.yaml", words)
    best = best_layouts(config, Cluster(1, 4, GPUS["h100"]), costs(config))
    assert {plan.layout.micro_steps for plan in best} != {1}
    for plan in best:
        alone = make_plan(plan.config, plan.cluster, Costs(plan.config, VOCABULARY))
        assert (plan.step_s, plan.memory_gib) == pytest.approx((alone.step_s, alone.memory_gib), rel=0.02)


def test_zero_3_over_thousands_of_ranks_is_as_slow_as_the_processor_and_not_recommended():
    flat = planned(huge("engine.zero_stage=3"), CLUSTER)
    assert 15 < flat.step_s == flat.host_s < 25
    assert all(plan.config.engine.zero_stage < 3 for plan in best_layouts(huge(), CLUSTER, costs(huge())))
    few = planned(huge("engine.zero_stage=3", "training.global_batch=512"), Cluster(8, 8, GPUS["h100"]))
    assert few.step_s == few.device_s > few.host_s


def test_a_ring_passes_every_rank_and_a_tree_the_levels_of_its_nodes():
    assert latency_s("all-gather", 2048, 512) == pytest.approx(5e-3, rel=0.01)
    assert latency_s("reduce-scatter", 4096, 512) > 1.5 * latency_s("reduce-scatter", 2048, 512)
    assert latency_s("all-reduce", 2048, 512) == pytest.approx(1.75e-4, rel=0.01)
    assert latency_s("all-reduce", 4096, 1024) - latency_s("all-reduce", 2048, 512) == pytest.approx(17e-6)
    assert latency_s("all-reduce", 2, 1) < latency_s("all-gather", 8, 1) < 30e-6


def test_a_pipeline_waits_for_its_slowest_stage_and_fills_with_micro_steps():
    def plan(accumulation: int):
        words = [f"training.accumulation={accumulation}", "engine.pipeline_parallel=4", "engine.zero_stage=1"]
        return planned(huge(*words, "training.global_batch=131072"), Cluster(64, 8, GPUS["h100"]))

    few, many = plan(4), plan(16)
    assert few.bubble_s / few.compute_s == pytest.approx(3 / 4, rel=0.2)
    assert many.bubble_s / many.compute_s == pytest.approx(3 / 16, rel=0.2)
    assert many.memory_gib < few.memory_gib
    assert [e.transfer.axis for e in few.exchanges if e.transfer.kind == "point-to-point"] == ["pp"]


def test_tensor_parallel_stays_on_nvlink_and_data_parallel_leaves_the_node():
    exchanges = planned(huge(), CLUSTER).exchanges
    assert {each.link for each in exchanges if each.transfer.axis == "tp"} == {"NVLink"}
    assert {each.link for each in exchanges if each.transfer.axis == "dp"} == {"network"}
    one_node = planned(huge("training.global_batch=64"), Cluster(1, 8, GPUS["h100"]))
    assert {each.link for each in one_node.exchanges} == {"NVLink"}


def test_one_gpu_has_a_plan_and_exchanges_nothing(capsys):
    code, said = run(capsys, REPOSITORY / "configs/small.yaml", cluster=Cluster(1, 1, GPUS["h100"]))
    assert code == 0
    assert "nothing is exchanged: there is one rank" in said


def test_any_gpu_can_be_described():
    assert find_gpu("H200").memory_gib == 139
    assert find_gpu("b1:2000:180:900:100").network_gb_s == 100
    for wrong in ("v100", "b1:2000:180", "b1:a:b:c:d"):
        with pytest.raises(UserError, match=f"--gpu {wrong} is not known"):
            find_gpu(wrong)
    for wrong in ("b1:0:180:900:100", "b1:nan:180:900:100", "b1:2000:180:inf:100", "b1:2000:180:900:-1"):
        with pytest.raises(UserError, match=f"--gpu {wrong} has a figure that is not above 0 and finite"):
            find_gpu(wrong)


def test_the_vocabulary_is_read_from_the_tokenizer(tmp_path):
    captions = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "house", "tree")]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(captions * 3), model_prefix=str(tmp_path / "t"), vocab_size=20, minloglevel=2
    )
    assert count_pieces(tmp_path / "t.model", None) == (20, f"read from {tmp_path / 't.model'}")
    assert count_pieces(tmp_path / "t.model", 99) == (99, "as given")
    assert count_pieces(tmp_path / "none", None)[0] == VOCABULARY


@pytest.fixture
def finished(tmp_path) -> Path:
    """The folder of a run that took 2 s a step after a slow start."""
    tree = tiny_config(engine__zero_stage=0).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    steps = [{"step": n, "time/step_s": 9 if n == 1 else 2, "memory/peak_gib": 0.5} for n in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in steps))
    return tmp_path


def test_a_run_is_set_beside_its_plan(capsys, finished):
    cluster = Cluster(1, 2, find_gpu("cpu:0.1:8:1:1"))
    code, said = run(capsys, finished / "config.yaml", cluster=cluster, run=finished, as_json=True)
    compared = json.loads(said)["compared"]
    assert compared["seconds per step"]["measured"] == 2
    assert compared["samples/s"]["measured"] == 16
    assert compared["peak memory, GiB"]["measured"] == 0.5
    ratio = compared["TFLOP/s per GPU"]["predicted"] / compared["TFLOP/s per GPU"]["measured"]
    assert ratio == pytest.approx(2 / compared["seconds per step"]["predicted"])
    assert "against the run" in run(capsys, finished / "config.yaml", cluster=cluster, run=finished)[1]
    assert math.isfinite(code)


def test_a_run_of_something_else_is_not_compared(finished):
    cluster = Cluster(1, 2, GPUS["h100"])
    with pytest.raises(UserError, match=r"training\.global_batch was 32 there and is 64 in the plan"):
        run_plan(finished / "config.yaml", ["training.global_batch=64"], cluster, run=finished)
    with pytest.raises(UserError, match=r"holds no config\.yaml: give the output folder of a run"):
        run_plan(None, [], cluster, run=finished / "nowhere")
    (finished / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no step yet"):
        run_plan(finished / "config.yaml", [], cluster, run=finished)
