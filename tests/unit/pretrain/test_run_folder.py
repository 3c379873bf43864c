"""A run's folder: one job at a time, earlier configs, and a copy of the tokenizer."""

import os
import socket

import pytest

from data_pipelines.errors import DataError
from pretrain import run_folder
from pretrain.errors import StorageError
from pretrain.run_folder import claim, keep_config, keep_tokenizer, kept_tokenizers


def test_a_second_job_is_refused_with_host_pid_and_time_of_the_first_until_that_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE_S", 0.0)
    first = claim(tmp_path / "a" / "run")
    with pytest.raises(StorageError) as error:
        claim(tmp_path / "a" / "run")
    who = f"in use by process {os.getpid()} on {socket.gethostname()} since 20"
    assert who in str(error.value)
    assert str(error.value).endswith("stop that job first, or choose another output folder.")
    first.close()
    claim(tmp_path / "a" / "run").close()


def test_a_lock_whose_owner_cannot_be_read_still_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE_S", 0.0)
    with claim(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(StorageError, match="in use by another job: stop"):
            claim(tmp_path)


@pytest.mark.parametrize("below", ["file", "/proc"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^Cannot write the run's folder .*run \(output\) \(.*\): .*\.$"):
        claim(tmp_path / below / "run")


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    claim(tmp_path).close()
    assert "cannot be locked (No locks available): see to it that no other job writes there." in capsys.readouterr().out


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
