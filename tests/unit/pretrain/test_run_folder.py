"""What a run's folder keeps: earlier configs, and a copy of the tokenizer."""

from pretrain.run_folder import keep_config, keep_tokenizer, kept_tokenizers


def test_every_config_that_held_for_a_while_is_kept(tmp_path):
    for text, step in (("a", 0), ("a", 5), ("b", 10), ("c", 10), ("d", 20), ("d", 20)):
        keep_config(tmp_path, text, step)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "config.yaml": "d",
        "config-until-step-10.yaml": "a",
        "config-until-step-10_2.yaml": "b",
        "config-until-step-20.yaml": "c",
    }


def test_the_tokenizer_is_copied_without_the_weights_beside_it(tmp_path):
    folder, run = tmp_path / "bert", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "pytorch_model.bin"):
        (folder / name).write_text(name)
    (tmp_path / "x.model").write_text("pieces")
    assert kept_tokenizers(run) == []
    keep_tokenizer(run, folder)
    assert {path.name for path in (run / "tokenizer").iterdir()} == {"tokenizer.json", "vocab.txt"}
    keep_tokenizer(run, tmp_path / "x.model")
    assert kept_tokenizers(run) == [run / "tokenizer.model", run / "tokenizer"]
    assert (run / "tokenizer.model").read_text() == "pieces"


def test_what_cannot_be_kept_costs_a_line_and_not_the_run(tmp_path, capsys):
    keep_tokenizer(tmp_path, tmp_path / "gone.model")
    (tmp_path / "config.yaml").mkdir()
    keep_config(tmp_path, "a", 1)
    said = capsys.readouterr().out
    assert "The tokenizer cannot be kept" in said
    assert "The config cannot be kept" in said
