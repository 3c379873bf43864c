"""A config says in one sentence what is wrong with it: the key, the values, the fix."""

from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.errors import ConfigError
from pretrain.model_config import SIZES
from pretrain.retrieval import RECALL_AT

MINIMAL = """
output: runs/x
data: {train: train/manifest.json, tokenizer: t.model}
model: {size: tiny}
training: {steps: 100, global_batch: 64}
optimizer: {learning_rate: 3e-4, warmup_steps: 10}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_three_layers_the_command_line_last(path):
    config = load_config(path, ["training.steps=50", "objectives.matching.pool=8", "data.crop_scale=[0.9, 1.0]"])
    assert config.training.steps == 50  # the command line
    assert config.training.global_batch == 64  # the file
    assert config.training.accumulation == 1  # the default
    assert config.objectives.matching is not None
    assert config.objectives.matching.pool == 8
    assert config.data.crop_scale == (0.9, 1.0)


def test_3e_4_is_a_number_although_yaml_reads_a_string(path):
    assert load_config(path).optimizer.learning_rate == 3e-4
    assert load_config(path, ["optimizer.learning_rate=1e-5"]).optimizer.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat: did you mean 'learning_rate'?"),
        ("objectives.matching.poool=4", "unknown key objectives.matching.poool: did you mean 'pool'?"),
        *(
            (f"checkpoint.mirror={url}", f"checkpoint.mirror {url} is no folder of an object store: write s3://bucket/")
            for url in ("copies/here", "/copies", "https://host/x", "s3://", "s3:/bucket/x", "file:///copies")
        ),
        ("checkpoint.mirror=s3://me:pw@bucket/x", "checkpoint.mirror s3://bucket/x has more than a bucket and a fol"),
        ("checkpoint.mirror=s3://bucket/x?sig=sesame", "checkpoint.mirror s3://bucket/x?... has more than a bucket"),
        ("modle.size=tiny", "unknown key modle: did you mean 'model'?"),
        ("model.size=huge", "model.size is 'huge': input should be 'tiny', 'small/16', 'base/16' or 'large/16'."),
        ("training.steps=many", "training.steps is 'many': input should be a valid integer"),
        ("training.global_batch=-1", "training.global_batch is -1: input should be greater than 0."),
        ("model.image.size=60", "model.image.size 60 is not a multiple of model.image.patch 8: choose a size that is"),
        ("model.text.heads=5", "model.text.heads 5 does not divide the width 128: choose a number that does"),
        ("model.fusion.heads=5", "model.fusion.heads 5 does not divide the width 128"),
        ("model.fusion=null", "model.architecture albef (the default) needs model.fusion: remove `null`"),
        ("model.architecture=clipp", "model.architecture: 'clipp' is none of albef, clip"),
        (
            "objectives.matching.pool=24",
            "objectives.matching.pool 24 neither divides data.grain 16 (the default) nor is a multiple of it that "
            "divides the 64 samples of a micro-step (training.global_batch 64 / training.accumulation 1 (the default))"
            ": sizes that fit are 2, 4, 8, 16, 32, 64.",
        ),
        ("objectives.contrastive.temperature=2", "temperature 2.0 is not between min_temperature 0.01 and"),
        ("optimizer.warmup_steps=100", "optimizer.warmup_steps 100 is not below training.steps 100: shorten the"),
        ("seed=9223372036854775808", "seed is 9223372036854775808: input should be less than"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is inf: input should be a finite number"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas.1 is 1.5: input should be less than 1"),
        ("model.size=[a]", "model.size is '[a]': input should be"),
        ("training.steps", "Cannot read the override 'training.steps': write key=value"),
        ("data.crop_scale=[", "Cannot read the value of data.crop_scale=[: expected the node content"),
    ],
)
def test_a_mistake_is_named_with_its_fix(path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["engine.pipeline_parallel=2"],
            r"engine.zero_stage 3 \(the default\) and engine.pipeline_parallel 2 exclude .* set engine.zero",
        ),
        (
            ["engine.pipeline_parallel=2", "engine.zero_stage=1", "engine.offload=cpu"],
            r"engine.offload cpu does not go with engine.pipeline_parallel 2: set engine.offload=none",
        ),
    ],
)
def test_a_pipeline_that_cannot_work_names_both_keys_and_the_fix(path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (100, 10), (19_999, 1999), (20_000, 2000), (10**6, 2000)])
def test_a_short_run_that_names_no_warmup_warms_up_for_a_tenth_of_it(path, steps, warmup):
    path.write_text(MINIMAL.replace(", warmup_steps: 10", ""))
    assert load_config(path, [f"training.steps={steps}"]).optimizer.warmup_steps == warmup
    assert load_config(path, [f"training.steps={steps}", "optimizer.warmup_steps=3"]).optimizer.warmup_steps == 3


def test_offload_without_zero_names_both_keys(path):
    with pytest.raises(ConfigError, match=r"engine.offload cpu needs engine.zero_stage 1, 2 or 3, and it is 0"):
        load_config(path, ["engine.offload=cpu", "engine.zero_stage=0"])


def test_the_best_checkpoint_is_that_of_a_step_which_is_evaluated_and_saved(path):
    heldout = ["data.heldout=heldout.json", "training.evaluate_every=10", "checkpoint.every=5"]
    rates = [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in RECALL_AT]
    for best in ("loss", "loss/matching", "accuracy/masked_lm", *rates):
        assert load_config(path, [*heldout, f"checkpoint.best={best}"]).checkpoint.best == best
    for overrides, message in (
        ([*heldout, "checkpoint.best=R@1"], r"checkpoint.best R@1 is nothing that this run evaluates: set loss, loss/"),
        ([*heldout, "checkpoint.best=loss/captioning"], r"checkpoint.best loss/captioning is nothing that this run"),
        (["checkpoint.best=loss"], r"checkpoint.best loss needs held-out data: set data.heldout, or checkpoint.best="),
        (
            [*heldout, "checkpoint.every=4", "checkpoint.best=loss"],
            r"evaluate_every 10 is no multiple of .*every 4",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, overrides)


def test_an_objective_that_the_architecture_does_not_have_is_refused_with_one_that_has(path):
    message = "model.architecture clip has no objectives.matching: set objectives.matching=null, or choose albef"
    with pytest.raises(ConfigError, match=message):
        load_config(path, ["model.architecture=clip", "objectives.matching.pool=4"])


def test_a_section_that_the_architecture_does_not_have_is_refused(path):
    overrides = ["model.architecture=clip", "objectives.matching=null", "model.fusion={depth: 2, heads: 2}"]
    with pytest.raises(ConfigError, match="model.architecture clip has no model.fusion: remove it"):
        load_config(path, overrides)


@pytest.mark.parametrize(
    ("grain", "batch", "accumulation", "fit"),
    [(6, 36, 1, {2, 3, 6, 12, 18, 36}), (6, 36, 3, {2, 3, 6, 12}), (4, 24, 2, {2, 4, 12}), (1, 6, 1, {2, 3, 6})],
)
def test_a_pool_is_part_of_a_grain_or_grains_of_a_micro_step(path, grain, batch, accumulation, fit):
    batches = [f"data.grain={grain}", f"training.global_batch={batch}", f"training.accumulation={accumulation}"]
    for pool in range(2, batch + 2):
        overrides = [*batches, f"objectives.matching.pool={pool}"]
        if pool in fit:
            load_config(path, overrides)
        else:
            with pytest.raises(ConfigError, match=rf"sizes that fit are {', '.join(map(str, sorted(fit)))}\."):
                load_config(path, overrides)


def test_a_micro_step_of_one_sample_has_no_pool(path):
    overrides = ["data.grain=1", "training.global_batch=8", "training.accumulation=8"]
    with pytest.raises(ConfigError, match="sizes that fit are none"):
        load_config(path, overrides)


def test_the_objectives_of_the_architecture_are_on_unless_the_config_says_otherwise(path):
    objectives = load_config(path, ["objectives.masked_lm=null"]).objectives
    assert objectives.contrastive is not None
    assert (objectives.masked_lm, objectives.captioning) == (None, None)


def test_a_missing_key_and_a_missing_file_are_named(path):
    path.write_text(MINIMAL.replace("steps: 100, ", ""))
    with pytest.raises(ConfigError, match="training.steps is missing: add it to the file"):
        load_config(path)
    with pytest.raises(
        ConfigError, match="No config at .*nowhere.yaml: give the path of a YAML file; there are recipes in configs"
    ):
        load_config(path.with_name("nowhere.yaml"))
    with pytest.raises(ConfigError, match=r"No config at .*demo.yaml: .* recipe demo.yaml is configs/demo\.yaml\."):
        load_config(path.with_name("demo.yaml"))


@pytest.mark.parametrize("size", SIZES)
def test_clips_text_tower_is_the_whole_stack(path, size):
    off = ["objectives.matching=null", "model.architecture=clip"]
    fused = load_config(path, [f"model.size={size}"]).model
    dual = load_config(path, [f"model.size={size}", *off]).model
    assert fused.fusion is not None
    assert dual.fusion is None
    assert dual.text.depth == fused.text.depth + fused.fusion.depth


def test_every_config_in_the_repository_loads():
    configs = sorted(Path("configs").glob("*.yaml"))
    assert configs
    for config in configs:
        load_config(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train=https://user:hunter22@host/manifest.json",
            "data.train is 'https://host/manifest.json': it is a",
        ),
        ("data.heldout=https://host/m.json?X-Amz-Signature=hunter22", "data.heldout is 'https://host/m.json?...': it"),
        ("data.train={web: {manifest: 's3://u:hunter22@b/m'}}", "data.train.web.manifest is 's3://b/m': it is a URL"),
        ("output=runs/$MY_SECRET", "output is runs/$MY_SECRET, and what is not shown of it is a password, a signature"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_repeated(path, monkeypatch, override, message):
    """Before a run's folder would keep it in config.yaml, run.json and TensorBoard."""
    monkeypatch.setenv("MY_SECRET", "hunter22")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    "addition",
    [
        "seed: !!python/object/apply:os.system ['touch {mark}']\n",
        "engine: !!python/object/apply:os.system ['touch {mark}']\n",
        "engine: {{zero_stage: !!python/object/apply:os.system ['touch {mark}']}}\n",
        "checkpoint: !!python/object/new:os.system ['touch {mark}']\n",
        "? !!python/object/apply:os.system ['touch {mark}']\n: 1\n",
        "<<: !!python/object/apply:os.system ['touch {mark}']\n",
        "seed: !!python/name:os.system\n",
        "seed: !!python/module:os\n",
        "seed: !!int 3\n",
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_tag_in_a_config_runs_nothing_and_is_one_sentence(tmp_path, path, addition, whole):
    text = addition.format(mark=tmp_path / "mark")
    path.write_text(text if whole else MINIMAL + text)
    with pytest.raises(ConfigError):
        load_config(path)
    assert not (tmp_path / "mark").exists()


def test_a_tag_on_the_whole_config_is_one_sentence(path):
    path.write_text("!!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="is not a mapping of keys to values"):
        load_config(path)
