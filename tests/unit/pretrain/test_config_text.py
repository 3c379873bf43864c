"""A config means what is written in it: each value is read by the type of its key, and a mistake names its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import Config, load_config, parse_config
from pretrain.errors import ConfigError

MINIMAL = """\
output: runs/x
data:
  train: train/manifest.json
  tokenizer: t.model
model: {size: tiny}
training:
  steps: 100
  global_batch: 64
optimizer: {warmup_steps: 0}
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/a b")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def look_up(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def in_file(key: str, text: str) -> str:
    """MINIMAL with one value more, written as it stands."""
    *sections, leaf = key.split(".")
    tree = yaml.safe_load(MINIMAL)
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = "PLACE"
    return yaml.safe_dump(tree).replace("PLACE", text)


VALUES = [  # key, as it is written, what it means
    ("training.steps", "0100", 100),
    ("training.steps", "1e3", 1000),
    ("training.steps", "1.5E2", 150),
    ("training.steps", "+7", 7),
    ("training.steps", "0o17", 15),
    ("training.steps", "0x1F", 31),
    ("training.steps", '"50"', 50),
    ("seed", "9223372036854775807", 2**63 - 1),
    ("engine.zero_stage", "02", 2),
    ("optimizer.learning_rate", "3e-4", 3e-4),
    ("optimizer.learning_rate", ".5", 0.5),
    ("optimizer.learning_rate", "1", 1.0),
    ("optimizer.clip", "010", 10.0),
    ("data.flip", "true", True),
    ("data.flip", "FALSE", False),
    ("engine.offload", "none", "none"),
    ("model.size", "small/16", "small/16"),
    ("output", "2024-01-01", Path("2024-01-01")),
    ("output", "1234", Path("1234")),
    ("output", "0x10", Path("0x10")),
    ("output", "1:30", Path("1:30")),
    ("output", "yes", Path("yes")),
    ("output", "on", Path("on")),
    ("output", "1e3", Path("1e3")),
    ("output", "runs/exp#2", Path("runs/exp#2")),
    ("output", "'runs/exp #2'", Path("runs/exp #2")),
    ("output", "~", Path("/home/me")),
    ("output", "~/x", Path("/home/me/x")),
    ("output", "$HOME/x", Path("/home/me/x")),
    ("output", "${SCRATCH}/x", Path("/scratch/a b/x")),
    ("output", "./~me", Path("~me")),
    ("output", "a$5", Path("a$5")),
    ("output", "${HOME}$SCRATCH", Path("/home/me/scratch/a b")),
    ("data.cache", "{folder: $HOME/c, limit_gib: 1}", None),
    ("data.train", "{web: {manifest: ~/a}}", None),
    ("data.heldout", "null", None),
    ("data.heldout", "~", None),
    ("data.heldout", "None", None),
    ("data.heldout", "none", None),
    ("data.heldout", '"none"', Path("none")),
    ("data.lanes", "none", None),
    ("data.augment.rand_augment", "null", None),
    ("objectives.masked_lm", "None", None),
    ("data.crop_scale", "[0.9, 1]", (0.9, 1.0)),
    ("data.crop_scale", "0.9,1.0", (0.9, 1.0)),
    ("data.crop_scale", "0.9, 1", (0.9, 1.0)),
    ("data.augment.rand_augment", "2,7", (2, 7)),
    ("optimizer.betas", "0.9,0.95", (0.9, 0.95)),
]


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
def test_a_value_means_the_same_in_a_file_and_on_the_command_line(path, key, text, value):
    on_command_line = look_up(load_config(path, [f"{key}={text}"]), key)
    path.write_text(in_file(key, text))
    of_file = look_up(load_config(path), key)
    assert on_command_line == of_file
    if not text.startswith("{"):
        assert on_command_line == value
        assert type(on_command_line) is type(value)


def test_paths_in_blocks_of_the_command_line_are_expanded_too(path):
    config = load_config(path, ["data.train={web: {manifest: ~/a, weight: {0: 3, 010: 1}}, on: {manifest: $SCRATCH}}"])
    assert isinstance(config.data.train, dict)
    assert {name: source.manifest for name, source in config.data.train.items()} == {
        "web": Path("/home/me/a"),
        "on": Path("/scratch/a b"),
    }
    assert config.data.train["web"].weight == {0: 3, 10: 1}


@pytest.mark.parametrize("text", ["runs/exp #2", "[x]", "{x}", "a: b", "- a", "&a", "*a", "!a", "%a", "@a", "a 'b'"])
def test_any_text_on_the_command_line_is_that_very_folder(path, text):
    assert load_config(path, [f"output={text}"]).output == Path(text)


REFUSED = [
    ("training.steps", "1:30", "training.steps is '1:30': input should be a valid integer."),
    ("training.steps", "yes", "training.steps is 'yes': input should be a valid integer."),
    ("training.steps", "1_000", "training.steps is '1_000': write 1000, without separators."),
    ("training.steps", "1,000", "training.steps is '1,000': write 1000, without separators."),
    ("training.steps", "1.5", "training.steps is '1.5': input should be a valid integer."),
    ("training.steps", "2024-01-01", "training.steps is '2024-01-01': input should be a valid integer."),
    ("training.steps", "1e99999999999", "input should be a valid integer."),
    ("training.steps", "9" * 5000, "input should be a valid integer."),
    ("training.steps", "true", "training.steps is 'true': input should be a valid integer."),
    ("training.steps", "none", "training.steps is 'none': it cannot be null."),
    ("training.steps", "!!int 3", "training.steps is '!!int 3': "),
    ("optimizer.learning_rate", "1,5", "optimizer.learning_rate is '1,5': write 1.5, with a point."),
    ("optimizer.learning_rate", ".inf", "optimizer.learning_rate is inf: input should be a finite number."),
    ("optimizer.learning_rate", ".nan", "optimizer.learning_rate is nan: input should be a finite number."),
    ("optimizer.learning_rate", "nan", "optimizer.learning_rate is 'nan': input should be a valid number."),
    ("optimizer.learning_rate", "1:30", "optimizer.learning_rate is '1:30': input should be a valid number."),
    ("data.flip", "yes", "data.flip is 'yes': write true or false."),
    ("data.flip", "off", "data.flip is 'off': write true or false."),
    ("data.flip", "1", "data.flip is '1': write true or false."),
    ("output", "''", "output is '': it is empty: give a path."),
    ("output", "' '", "output is ' ': it is empty: give a path."),
    ("output", "null", "output is 'null': it cannot be null: give a path."),
    ("output", "$NOWHERE/x", "output is '$NOWHERE/x': the variable NOWHERE is not set, or empty: set it, or"),
    ("output", "${EMPTY}/x", "output is '${EMPTY}/x': the variable EMPTY is not set, or empty"),
    ("output", "~nobody_here/x", "there is no user of this name: write ./~nobody_here/x for a file"),
    ("output", "s3://bucket/run", "output is 's3://bucket/run': it is a URL: give a path on this machine"),
    ("data.train", "https://x/manifest.json", "data.train is 'https://x/manifest.json': it is a URL"),
    ("data.heldout", "''", "data.heldout is '': it is empty: give a path, or null."),
    ("data.crop_scale", "(0.9, 1.0)", "data.crop_scale is '(0.9, 1.0)': write a list, as in [1, 2] or 1,2."),
    ("data.crop_scale", "0.9", "data.crop_scale is '0.9': write a list, as in [1, 2] or 1,2."),
    ("data.crop_scale", "[0.9]", "data.crop_scale has too few values: it takes at least 2."),
    ("data.crop_scale", "[a, 1]", "data.crop_scale.0 is 'a': input should be a valid number."),
    ("objectives.matching", "false", "objectives.matching is 'false': it is a block of keys, or null to switch it off"),
    ("objectives.matching", "''", "objectives.matching is '': it is a block of keys, or null to switch it off"),
    ("engine", "null", "engine is 'null': it is a block of keys: data_parallel, tensor_parallel"),
    ("data.train", "{web: {manifest: a, weigth: 3}}", "unknown key data.train.web.weigth: did you mean 'weight'?"),
    ("data.train", "{web: {manifest: a, weight: x}}", "data.train.web.weight is 'x': input should be a valid number."),
    ("data.train", "{web: {manifest: a, weight: {x: 3}}}", "data.train.web.weight has the key 'x': input should be"),
    ("data.train", "{web: {manifest: a, weight: {0: 3, 00: 1}}}", "data.train.web.weight.0 is written twice"),
    ("data.train", "{a.b: {manifest: a}}", "data.train has the key 'a.b': string should match"),
    ("data.train", "{}", "data.train names no source"),
]


@pytest.mark.parametrize(("key", "text", "message"), REFUSED)
def test_what_its_key_does_not_take_is_refused_wherever_it_is_written(path, key, text, message):
    with pytest.raises(ConfigError) as on_command_line:
        load_config(path, [f"{key}={text}"])
    path.write_text(in_file(key, text))
    with pytest.raises(ConfigError) as of_file:
        load_config(path)
    assert message in str(on_command_line.value)
    assert message in str(of_file.value)
    assert "\n" not in str(of_file.value)
    assert str(path) in str(of_file.value)
    assert str(path) not in str(on_command_line.value)
    assert "on the command line" in str(on_command_line.value)


def test_nothing_after_the_sign_is_no_null(path):
    with pytest.raises(ConfigError, match="output is '': it is empty: give a path"):
        load_config(path, ["output="])
    with pytest.raises(ConfigError, match="data.heldout is '': it is empty: give a path, or null"):
        load_config(path, ["data.heldout="])


def test_a_block_whose_keys_are_all_commented_out_is_not_switched_off(path):
    path.write_text(MINIMAL + "objectives:\n  matching:\n    # pool: 8\n")
    with pytest.raises(ConfigError, match=r":11: objectives.matching is '': it is a block of keys, or null to switch"):
        load_config(path)


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("seed: 1\nseed: 2\n", "seed is written twice, in line 10 and in line 11: remove one of the two."),
        ("data: {heldout: x}\n", "data is written twice, in line 2 and in line 10: remove one of the two."),
        ("engine:\n  offload: none\n  offload: cpu\n", "engine.offload is written twice, in line 11 and in line 12"),
        ("checkpoint: {every: 1, every: 1}\n", "checkpoint.every is written twice, in line 10 and in line 10"),
        ("sead: 1\n", "run.yaml:10: unknown key sead: did you mean 'seed'?"),
        ("training.steps: 5\n", "unknown key training.steps: in a file write training, a colon, and the rest indented"),
        ("? [a]\n: 1\n", "unknown key [a]: the keys there are output, seed"),
        ("engine:\n  ~: 1\n", "run.yaml:11: unknown key engine.~"),
        ("\tseed: 1\n", r"found character '\t' that cannot start any token in line 10, column 1; indent with spaces."),
        ("seed: [\n", "Cannot read the config"),
        ("seed: !!python/object/apply:os.getcwd []\n", "run.yaml:10: seed is '!!python/object/apply:os.getcwd []'"),
        ("---\nseed: 1\n", "another document in line 10"),
        ("seed: *nothing\n", "undefined alias 'nothing' in line 10"),
        ("engine: &a {zero_stage: *a}\n", "engine.zero_stage is '&a {zero_stage: *a}': input should be"),
        ("seed: " + "[" * 5000 + "\n", "it is nested too deeply"),
    ],
)
def test_a_file_that_is_not_well_made_names_the_line(path, addition, message):
    path.write_text(MINIMAL + addition)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blocks_may_be_shared_within_a_file(path):
    path.write_text(MINIMAL + "checkpoint: &c {every: 7}\nengine: {<<: {zero_stage: 1}, zero_stage: 2}\n")
    config = load_config(path)
    assert (config.checkpoint.every, config.engine.zero_stage) == (7, 2)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_byte_order_mark(path, encoding):
    path.write_bytes(MINIMAL.replace("runs/x", "runs/模型").encode(encoding))
    assert load_config(path).output == Path("runs/模型")


def test_what_is_no_config_file_is_one_sentence(path):
    for content, message in (
        (b"a: \xff\n", "Cannot read the config .*: it is no UTF-8 text."),
        (b"", "is not a mapping of keys to values; the recipe demo.yaml is configs/demo.yaml."),
        (b"- a\n", "is not a mapping of keys to values"),
        (b"!x {output: a}\n", "is not a mapping of keys to values"),
        (b"a\0b: 1\n", "Cannot read the config .*special characters are not allowed"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    with pytest.raises(ConfigError, match="Cannot read the config .*: Is a directory."):
        load_config(path.parent)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.stepps=3"], "on the command line: unknown key training.stepps: did you mean 'steps'?"),
        (["data.cache.folder=/x"], "on the command line: data.cache.limit_gib is missing"),
        (["optimizer.warmup_steps=100"], "on the command line: optimizer.warmup_steps 100 is not below training.steps"),
        (["objectives.contrastive.temperature=2"], "on the command line: objectives.contrastive: temperature 2.0"),
        (["engine.offload=cpu", "engine.zero_stage=0"], "on the command line: engine.offload cpu needs"),
        (["training.steps=5", "engine.zero_stage=9"], "on the command line: engine.zero_stage is 9"),
    ],
)
def test_a_mistake_in_an_override_is_said_to_be_on_the_command_line(path, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value).startswith(message)


def test_mistakes_of_both_places_are_told_apart(path):
    path.write_text(MINIMAL + "engine: {zero_stage: 9}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["training.accumulation=many"])
    assert str(caught.value).splitlines() == [
        f"{path}:10: engine.zero_stage is 9: input should be 0, 1, 2 or 3.",
        "on the command line: training.accumulation is 'many': input should be a valid integer.",
    ]


def test_a_value_that_nobody_wrote_is_said_to_be_the_default(path):
    with pytest.raises(
        ConfigError, match=r"engine.zero_stage 3 \(the default\) and engine.pipeline_parallel 2 exclude"
    ):
        load_config(path, ["engine.pipeline_parallel=2"])
    with pytest.raises(ConfigError, match=r"engine.zero_stage 3 and engine.pipeline_parallel 2 "):
        load_config(path, ["engine.pipeline_parallel=2", "engine.zero_stage=3"])


def test_a_runs_own_config_is_read_back_as_it_was(path):
    words = ["output=0100", "data.train={on: {manifest: yes, weight: {0: 1, 20: .5}}}", "data.augment.rand_augment=2,7"]
    config = load_config(path, words)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load_config(path) == config
    assert parse_config(config.model_dump(mode="json"), "x") == config
    longer = parse_config(config.model_dump(mode="json"), "x", ["training.steps=0200"])
    assert longer.training.steps == 200
    with pytest.raises(ConfigError, match="on the command line: unknown key sead"):
        parse_config(config.model_dump(mode="json"), "x", ["sead=1"])


KEYS = ["output", "data.train", "data.heldout", "data.crop_scale", "data.cache", "data.train.web.weight", "data.flip"]
KEYS += [
    "objectives.matching",
    "training.steps",
    "engine.zero_stage",
    "optimizer.betas",
    "data.augment.rand_augment",
    "x",
]
WORDS = ["0", "1e3", "~", "null", "[", "]", "{", "}", ":", ": ", ",", "'", '"', "#", "&a", "*a", "!!int ", "<<"]
WORDS += [
    "yes",
    "\n",
    "\t",
    "- ",
    "? ",
    "%",
    "\0",
    "\ud800",
    "模",
    "web",
    "manifest",
    "$HOME",
    "${",
    "a",
    "\x85",
    "---",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KEYS), st.lists(st.sampled_from(WORDS), max_size=8).map("".join), st.integers(0, len(MINIMAL)))
def test_no_text_ends_in_anything_but_a_config_or_a_sentence(tmp_path_factory, key, text, place):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    for content, overrides in ((MINIMAL, [f"{key}={text}"]), (MINIMAL[:place] + text + MINIMAL[place:], [])):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            assert str(error).endswith((".", "?"))  # noqa: PT017
        else:
            assert str(config.output).encode()
