"""The trainer gets the same global batches on any layout, from any point of a run, whatever is broken."""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from corpus import Corpus, Members, make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.batch import IGNORE, Batch
from data_pipelines.errors import DataError
from data_pipelines.order.mixture import DataState
from data_pipelines.stream.loader import TrainingData
from data_pipelines.stream.workers import BatchDataset, stream, usable_workers

Rows = dict[int, tuple[bytes, ...]]  # position -> every tensor's row


def rows_of(batches: list[Batch]) -> Rows:
    rows: Rows = {}
    for batch in batches:
        for i, position in enumerate(batch.tensors["positions"].tolist()):
            assert position not in rows
            rows[position] = tuple(tensor[i].numpy().tobytes() for tensor in batch.tensors.values())
    return rows


def merged(steps: list[Rows]) -> Rows:
    return {position: row for rows in steps for position, row in rows.items()}


def global_steps(
    corpus: Corpus, state: DataState, num_steps: int, dp_size=1, accumulation=1, **changes: object
) -> list[Rows]:
    """What all ranks together are given in each step."""
    ranks = [
        corpus.training(dp_rank=rank, dp_size=dp_size, accumulation=accumulation, **changes) for rank in range(dp_size)
    ]
    taken = [list(islice(data.batches(state), num_steps * accumulation)) for data in ranks]
    return [
        rows_of([batch for batches in taken for batch in batches[step * accumulation : (step + 1) * accumulation]])
        for step in range(num_steps)
    ]


# Every way to cut six grains into ranks and micro-steps; three ranks do not divide the four lanes.
LAYOUTS = [(1, 1), (1, 2), (1, 3), (1, 6), (2, 1), (2, 3), (3, 1), (3, 2), (6, 1)]


@pytest.fixture(scope="module")
def whole(corpus: Corpus) -> list[Rows]:
    """More than two epochs, from one process."""
    return global_steps(corpus, corpus.training().initial_state(), 18)


@pytest.mark.parametrize(("dp_size", "accumulation"), LAYOUTS)
def test_ranks_and_accumulation_give_the_same_pixels_tokens_and_masks(
    corpus: Corpus, whole: list[Rows], dp_size: int, accumulation: int
):
    start = corpus.training().initial_state()
    assert global_steps(corpus, start, 14, dp_size, accumulation) == whole[:14]


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_give_the_same_batches_in_the_same_order(corpus: Corpus, workers: int):
    data = corpus.training(global_batch=8)
    with_workers = corpus.training(global_batch=8, workers=workers)
    state = data.advance(data.initial_state())
    batches = with_workers.batches(state)
    for batch, expected in zip(islice(batches, 30), data.batches(state), strict=False):
        assert all(torch.equal(batch.tensors[name], tensor) for name, tensor in expected.tensors.items())
    batches.close()


@given(st.integers(0, 14), st.sampled_from(LAYOUTS), st.sampled_from([8, 12, 24]))
@settings(deadline=None, max_examples=20)
def test_a_run_resumed_at_any_step_in_another_layout_gives_exactly_the_rest(
    corpus: Corpus, whole: list[Rows], step: int, layout: tuple[int, int], other_batch: int
):
    data = corpus.training()
    state = data.initial_state()
    for _ in range(step):
        state = data.advance(state)
    state = DataState.from_dict(state.to_dict())
    assert global_steps(corpus, state, 3, *layout) == whole[step : step + 3]
    # Another global batch takes the same samples in the same order.
    others = global_steps(corpus, state, 72 // other_batch, global_batch=other_batch)
    assert merged(others) == merged(whole[step : step + 3])


def test_the_global_order_is_that_of_the_order_object(corpus: Corpus):
    ranks = [corpus.training(dp_rank=rank, dp_size=2, accumulation=3) for rank in range(2)]
    streams = [data.batches(data.initial_state()) for data in ranks]
    positions = [
        batch.tensors["positions"].tolist() for _ in range(3) for batch in (next(streams[0]), next(streams[1]))
    ]
    assert [position for part in positions for position in part] == list(range(24))


def test_no_epoch_repeats_a_sample_and_epochs_differ(corpus: Corpus):
    data = corpus.training()
    batches = islice(data.batches(data.initial_state()), 20)
    images = torch.cat([batch.tensors["image_ids"] for batch in batches]).tolist()
    epochs = [images[start : start + 160] for start in (0, 160, 320)]  # 164 samples in lanes of whole grains
    assert all(len(set(epoch)) == 160 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_is_cropped_and_masked_anew_in_each_epoch(corpus: Corpus):
    data = corpus.training(lanes=1, global_batch=4)
    batches = list(islice(data.batches(data.initial_state()), 82))
    first, second = (
        {
            image: (text, masked, pixels)
            for batch in part
            for image, text, masked, pixels in zip(
                batch.tensors["image_ids"].tolist(),
                batch.tensors["text"].tolist(),
                batch.tensors["masked_text"].tolist(),
                batch.tensors["images"].tolist(),
                strict=True,
            )
        }
        for part in (batches[:41], batches[41:])
    )
    assert first.keys() == second.keys()
    assert all(first[image][0] == second[image][0] for image in first)
    assert sum(first[image][1] != second[image][1] for image in first) > 82
    assert sum(first[image][2] != second[image][2] for image in first) > 155


def test_a_batch_is_what_the_contract_says(corpus: Corpus):
    data = corpus.training(global_batch=8)
    batch = next(data.batches(data.initial_state()))
    assert len(batch) == data.micro_batch_per_rank == 8
    assert {name: (tensor.dtype, *tensor.shape[1:]) for name, tensor in batch.tensors.items()} == {
        "images": (torch.uint8, 3, 8, 8),
        "text": (torch.int64, 12),
        "masked_text": (torch.int64, 12),
        "masked_positions": (torch.int64, 2),
        "masked_targets": (torch.int64, 2),
        "positions": (torch.int64,),
        "image_ids": (torch.int64,),
        "caption_ids": (torch.int64,),
    }
    targets = batch.tensors["masked_targets"]
    used = targets != IGNORE
    assert torch.equal(batch.tensors["text"].gather(1, batch.tensors["masked_positions"])[used], targets[used])
    assert used.any(dim=1).all()
    assert batch.bad == batch.records == ()


def test_the_seed_changes_order_crops_and_masks_together(corpus: Corpus):
    states = [corpus.training(seed=seed) for seed in (1, 2)]
    first, second = (next(data.batches(data.initial_state())) for data in states)
    assert not torch.equal(first.tensors["image_ids"], second.tensors["image_ids"])


@pytest.mark.parametrize(("global_batch", "dp_size", "accumulation"), [(20, 2, 1), (24, 1, 4), (4, 2, 1), (0, 1, 1)])
def test_a_batch_that_does_not_divide_is_an_error_with_every_number(
    corpus: Corpus, global_batch: int, dp_size: int, accumulation: int
):
    words = rf"training.global_batch {global_batch} .* {dp_size} data-parallel ranks? x training.accumulation "
    words += rf"{accumulation} x data.grain 4 = \d+ must divide it; use \d+ (or \d+ )?samples"
    with pytest.raises(DataError, match=words):
        corpus.training(global_batch=global_batch, dp_size=dp_size, accumulation=accumulation)


@pytest.mark.parametrize(
    ("global_batch", "dp_size", "fixes"),
    [
        (32, 3, "use 24 or 36 samples, a smaller data.grain, or 1, 2 or 4 data-parallel ranks."),
        (64, 3, "use 60 or 72 samples, a smaller data.grain, or 1, 2 or 4 data-parallel ranks."),
        (4, 2, "use 8 samples, a smaller data.grain, or 1 data-parallel rank."),
        (30, 2, "use 24 or 32 samples, or a smaller data.grain."),  # no number of ranks would do
    ],
)
def test_another_number_of_ranks_is_proposed_where_there_is_one(corpus: Corpus, global_batch, dp_size, fixes):
    with pytest.raises(DataError) as caught:
        corpus.training(global_batch=global_batch, dp_size=dp_size)
    assert str(caught.value).endswith(fixes)


def test_a_missing_file_is_named_with_its_key(corpus: Corpus, tmp_path):
    for change, key in (
        ({"train": tmp_path / "m.json"}, "data.train: There is no manifest at"),
        ({"train": {"web": {"manifest": tmp_path / "m.json"}}}, "data.train.web.manifest: There is no manifest at"),
    ):
        with pytest.raises(DataError, match=key):
            corpus.training(**change)


def test_a_state_of_other_data_is_refused(corpus: Corpus):
    data = corpus.training()
    with pytest.raises(DataError, match=r"seed \(saved 99, now 7\)"):
        data.resumed(data.initial_state().model_copy(update={"seed": 99}))


# What is broken ----------------------------------------------------------------------------------------------

BAD = {
    3: "image cannot be decoded",
    40: "caption of 70,000 bytes",
    41: "json is not an object",
    90: "image cannot be decoded",
}


def spoil(index: int, sample: Members) -> Members:
    if index == 3:
        return sample | {"jpg": b"no image at all"}
    if index == 40:
        return sample | {"json": json.dumps({"captions": ["x" * 70_000]}).encode()}
    if index == 41:
        return sample | {"json": b'{"captions": ["cut'}
    if index == 90:
        image = sample["jpg"]
        assert isinstance(image, bytes)
        return sample | {"jpg": image[: len(image) // 2]}
    return sample


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("spoilt"), tokenizer_path, (70, 33, 1, 60), spoil)


@pytest.mark.parametrize(("dp_size", "accumulation"), [(2, 1), (3, 2), (1, 6)])
def test_bad_samples_are_replaced_by_the_same_ones_on_any_layout(spoilt: Corpus, dp_size: int, accumulation: int):
    start = spoilt.training().initial_state()
    assert global_steps(spoilt, start, 6, dp_size, accumulation) == global_steps(spoilt, start, 6)


def test_each_bad_sample_is_reported_once_an_epoch_with_shard_key_and_reason(spoilt: Corpus):
    data = spoilt.training(lanes=1, global_batch=4)  # one lane of 164 takes every sample
    batches = list(islice(data.batches(data.initial_state()), 41))
    found = {int(bad.key): bad for batch in batches for bad in batch.bad}
    assert sum(len(batch.bad) for batch in batches) == len(found) == len(BAD)
    assert all(found[index].reason.startswith(reason) for index, reason in BAD.items())
    assert Path(found[90].shard) == spoilt.folder / "00001.tar"
    assert all(len(batch) == 4 for batch in batches)


def test_the_place_of_a_bad_sample_is_taken_by_the_next_good_one_of_its_window(spoilt: Corpus, corpus: Corpus):
    settings = {"lanes": 1, "global_batch": 4, "window": 2048}
    ours, clean = spoilt.training(**settings), corpus.training(**settings)
    bad, flat = (
        torch.cat([batch.tensors["image_ids"] for batch in islice(data.batches(data.initial_state()), 41)]).tolist()
        for data in (ours, clean)
    )
    changed = [i for i, (a, b) in enumerate(zip(flat, bad, strict=True)) if a != b]
    assert len(changed) == 4
    for i in changed:
        following = flat[i + 1 :] + flat[:i]
        wrong = {flat[j] for j in changed}
        assert bad[i] == next(image for image in following if image not in wrong)


def test_a_window_without_a_good_sample_is_an_error(tmp_path: Path, tokenizer_path: Path):
    corpus = make_corpus(tmp_path, tokenizer_path, (16,), lambda _, sample: sample | {"jpg": b"nothing"})
    data = corpus.training(global_batch=16)
    with pytest.raises(DataError, match=r"whole window of 16 .* in shard .*00000\.tar: image cannot be decoded"):
        next(data.batches(data.initial_state()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_under_a_run_stops_it_with_one_sentence(corpus: Corpus, tmp_path: Path, workers: int):
    shutil.copytree(corpus.folder, tmp_path / "c")
    copy = replace(corpus, folder=tmp_path / "c")
    data = copy.training(workers=workers)
    for shard in (tmp_path / "c").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[: len(content)] = bytes(len(content))
        shard.write_bytes(content)
    with pytest.raises(DataError) as error:
        next(data.batches(data.initial_state()))
    message = str(error.value)
    assert (
        "holds no sample (0 samples instead of one at byte 0 of it): it has changed since it was indexed; restore it"
        in message
    )
    assert "\n" not in message
    assert "Traceback" not in message


def test_a_shard_truncated_under_a_run_is_never_skipped(corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.folder, tmp_path / "c")
    data = replace(corpus, folder=tmp_path / "c").training()
    os.truncate(tmp_path / "c" / "00000.tar", 20_000)
    with pytest.raises(DataError, match=r"00000\.tar has 20,000 bytes but had"):
        list(islice(data.batches(data.initial_state()), 12))


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do(corpus: Corpus):
    others = set(multiprocessing.active_children())
    data = corpus.training(global_batch=4, workers=1)
    batches = data.batches(data.initial_state())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    with pytest.raises(DataError, match=r"worker died, most often because memory .* data\.workers \(1 per rank"):
        list(islice(batches, 20))


def run_training(
    corpus: Corpus, folder: Path, body: str, wrapper: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs `body` in a process of its own that has been fed one batch by two workers."""
    return run_script(
        folder,
        f"""
import multiprocessing, os, signal
from corpus import Corpus
from pathlib import Path
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("told to stop", flush=True))
    data = Corpus(Path({str(corpus.folder)!r}), Path({str(corpus.tokenizer)!r})).training(global_batch=4, workers=2)
    batches = data.batches(data.initial_state())
    next(batches)
{textwrap.indent(body, "    ")}
""",
        wrapper,
    )


def run_script(folder: Path, script: str, wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    (folder / "run.py").write_text(script)
    return subprocess.run(
        [*wrapper, sys.executable, str(folder / "run.py")],
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[3]}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=100,  # a hang
        check=False,
    )


SMALL_SHM = (
    "unshare",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs -o size=$0 none /dev/shm && exec "$@"',
)
FEW_FILES = ("sh", "-c", 'ulimit -n $0 && exec "$@"')


@pytest.mark.parametrize(
    ("wrapper", "words"),
    [
        ((*SMALL_SHM, "64k"), "A data worker cannot hand over a batch: /dev/shm is full"),
        ((*SMALL_SHM, "4k"), "Data workers cannot be started: /dev/shm is full"),
        ((*FEW_FILES, "36"), "too many files are open"),
        ((*FEW_FILES, "12"), "Data workers cannot be started: too many files are open"),
    ],
)
def test_a_batch_that_cannot_be_handed_over_is_one_sentence_within_seconds(
    corpus: Corpus, tmp_path: Path, wrapper: tuple[str, ...], words: str
):
    """It was lost between two processes, and the trainer waited for it for ever."""
    ran = run_training(corpus, tmp_path, "for _ in range(40): next(batches)", wrapper)
    if "unshare:" in ran.stderr or "mount:" in ran.stderr:
        pytest.skip(f"no small /dev/shm can be mounted here: {ran.stderr.strip()}")
    last = ran.stderr.strip().splitlines()[-1]
    assert words in last
    assert ". Lower data.workers (2 per rank), or " in last
    assert ran.stderr.count("Traceback") == 1  # of this script


class Silent(BatchDataset):
    """Data that never comes."""

    def make(self, key: object) -> None:
        time.sleep(999)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_request_to_stop_is_heard_while_data_does_not_come(tmp_path: Path, workers: int):
    ran = run_script(
        tmp_path,
        f"""
import os, signal, threading, time
from data_pipelines.stream.workers import stream
from pretrain.stopping import Interrupted, Stop
from test_training_data import Silent
if __name__ == "__main__":
    stop, batches = Stop(), stream(Silent(), range(9), {workers})
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with stop.interrupting():
            next(batches)
    except Interrupted:
        batches.close()
        print("heard", stop.requested)
""",
    )
    assert ran.stdout == "heard True\n", ran.stderr


def test_no_more_workers_start_than_there_are_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert [usable_workers(wanted) for wanted in (0, 2, 3, 64)] == [0, 2, 3, 3]


def test_the_sigterm_of_a_jobs_end_leaves_the_workers_alive_and_a_crash_does_not_wait_for_them(
    corpus: Corpus, tmp_path: Path
):
    body = """
os.killpg(0, signal.SIGTERM)
for _ in range(40):
    next(batches)
print("still fed", flush=True)
raise SystemError("crash")
"""
    start = time.monotonic()
    run = run_training(corpus, tmp_path, body)
    assert run.stdout.split("\n")[:2] == ["told to stop", "still fed"], run.stderr
    assert run.stderr.rstrip().endswith("SystemError: crash")
    assert time.monotonic() - start < 20


def test_a_killed_trainer_leaves_no_workers_behind(corpus: Corpus, tmp_path: Path):
    body = """
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    workers = run_training(corpus, tmp_path, body).stdout.split()  # returns when the last of them closes its output
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # a moment passes until they are reaped
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Broken(BatchDataset):
    def make(self, key: object) -> Batch:
        raise ZeroDivisionError(f"at {key}")


def test_a_fault_of_ours_in_a_worker_keeps_its_traceback_and_ends_the_workers():
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError, match=r"(?s)Traceback.*in make.*at 0") as error:
        next(stream(Broken(), range(9), 1))
    assert set(multiprocessing.active_children()) == before, error


def test_closing_the_stream_ends_the_workers(corpus: Corpus):
    before = len(multiprocessing.active_children())
    data = corpus.training(workers=2)
    batches = data.batches(data.initial_state())
    next(batches)
    assert len(multiprocessing.active_children()) == before + 2
    batches.close()
    assert len(multiprocessing.active_children()) == before


def test_training_data_needs_no_open_files_to_travel(corpus: Corpus):
    data = corpus.training()
    next(data.batches(data.initial_state()))
    copy: TrainingData = pickle.loads(pickle.dumps(data))
    assert copy.initial_state() == data.initial_state()
