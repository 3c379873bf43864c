"""Evaluation sees the whole split, the same each time, in equal batches on every rank."""

import io
import json
from pathlib import Path

import pytest
import torch
from corpus import Corpus, Members, caption, jpeg, make_corpus
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.stream.heldout import Examined, HeldoutData


@pytest.mark.parametrize(("batch_size", "dp_size"), [(164, 1), (10, 1), (16, 3), (7, 4), (100, 4)])
def test_every_rank_has_equal_batches_and_together_they_hold_the_whole_split(
    corpus: Corpus, batch_size: int, dp_size: int
):
    data = corpus.heldout()
    ranks = [list(data.batches(batch_size, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
    positions = [p for batch in zip(*ranks, strict=True) for part in batch for p in part.tensors["positions"].tolist()]
    assert positions == [i % 164 for i in range(len(positions))]
    assert len(positions) - 164 < batch_size * dp_size


def test_a_sample_is_the_same_in_any_batch_and_at_any_time(corpus: Corpus):
    data = corpus.heldout()
    whole = next(data.batches(164))
    for batch in [*data.batches(9), *corpus.heldout(workers=1).batches(50)]:
        at = batch.tensors["positions"]
        assert all(torch.equal(whole.tensors[name][at], tensor) for name, tensor in batch.tensors.items())


def test_records_tell_a_person_what_the_samples_are(corpus: Corpus):
    batch = next(corpus.heldout().batches(80, records=True))
    assert [record.key for record in batch.records] == [f"{i:05d}" for i in range(80)]
    assert [record.caption for record in batch.records] == [caption(i) for i in range(80)]
    assert batch.records[75].metadata == {"index": 75}


def test_json_that_cannot_be_read_beside_a_good_caption_costs_the_metadata_alone(tmp_path: Path, tokenizer_path: Path):
    """Training and the examination take such a sample, and so does an evaluation that asks for records."""
    data = make_corpus(tmp_path, tokenizer_path, (9,), lambda i, m: m | {"json": b"[]"} if i == 5 else m).heldout()
    data.examine()
    assert not data.bad
    records = next(data.batches(9, records=True)).records
    assert [record.metadata for record in records[4:7]] == [{"index": 4}, {}, {"index": 6}]
    assert records[5].caption == caption(5)


def test_a_held_out_sample_that_cannot_be_used_is_an_error(tmp_path: Path, tokenizer_path: Path):
    spoilt = make_corpus(tmp_path, tokenizer_path, (9,), lambda i, m: m | {"jpg": b"x"} if i == 5 else m)
    with pytest.raises(DataError, match=r"Held-out sample 00005 in shard .*: image cannot be decoded: .*Mend it or"):
        list(spoilt.heldout().batches(3))


def test_images_are_turned_as_exif_says_unless_the_config_says_that_they_are_already(
    tmp_path: Path, tokenizer_path: Path
):
    def turned(index: int, members: Members) -> Members:
        image, exif, out = Image.open(io.BytesIO(jpeg(index, 24, 24))), Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        image.save(out, "PNG", exif=exif)
        return {name: content for name, content in members.items() if name != "jpg"} | {"png": out.getvalue()}

    photos = make_corpus(tmp_path, tokenizer_path, (32,), turned)
    seen, stored = (
        next(photos.heldout(exif_orientation=value).batches(8)).tensors["images"] for value in (True, False)
    )
    assert torch.equal(seen, torch.rot90(stored, -1, (2, 3)))
    assert not torch.equal(seen, stored)
    data = [photos.training(exif_orientation=value, crop_scale=(1, 1)) for value in (True, False)]
    seen, stored = (next(iter(each.batches(each.initial_state()))).tensors["images"] for each in data)
    assert torch.equal(seen, torch.rot90(stored, -1, (2, 3)))


def test_no_held_out_manifest_is_an_error_that_names_the_key(corpus: Corpus):
    with pytest.raises(DataError, match=r"set data\.heldout"):
        corpus.heldout(heldout=None)


def spoil_some(index: int, sample: Members) -> Members:
    if index == 5:
        return sample | {"jpg": b"no image"}
    if index == 6:
        return sample | {"json": json.dumps({"captions": ["one", " ", "two red circles"]}).encode(), "txt": b""}
    if index == 70:
        return sample | {"json": b'{"captions": ['}
    return sample


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("spoilt"), tokenizer_path, (70, 33), spoil_some)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (3, 0)])
def test_every_caption_is_a_pair_and_what_is_bad_is_counted_and_left_out(spoilt: Corpus, ranks: int, workers: int):
    data = spoilt.heldout(workers=workers)
    others = [examined_share(data, rank, ranks) for rank in range(1, ranks)]
    data.examine(0, ranks, lambda share: [share, *others])
    assert len(data) == 103 - 2 + 1
    assert [(bad.key, bad.shard) for bad in data.bad] == [
        ("00005", str(spoilt.folder / "00000.tar")),
        ("00070", str(spoilt.folder / "00001.tar")),
    ]
    assert data.complaint().startswith("2 of 103 held-out samples cannot be used and are left out; the first is sample")
    batch = next(data.batches(102, records=True))
    assert [record.key for record in batch.records[4:8]] == ["00004", "00006", "00006", "00007"]
    assert [record.caption for record in batch.records[5:7]] == ["one", "two red circles"]
    assert batch.tensors["image_ids"][5] == batch.tensors["image_ids"][6]
    assert batch.tensors["caption_ids"][5] != batch.tensors["caption_ids"][6]
    assert batch.tensors["positions"].tolist() == list(range(102))


def examined_share(data: HeldoutData, rank: int, ranks: int) -> Examined:
    """What one rank of several finds."""
    found: list[Examined] = []
    with pytest.raises(StopIteration):
        data.examine(rank, ranks, lambda share: found.append(share) or [[]] * ranks)
    return found[0]


def test_a_split_without_one_usable_sample_is_an_error_at_the_start(tmp_path: Path, tokenizer_path: Path):
    nothing = make_corpus(tmp_path, tokenizer_path, (3,), lambda i, m: m | {"jpg": b"x"})
    with pytest.raises(
        DataError, match=r"None of the 3 held-out samples of .* can be used; the first is sample 00000 in"
    ):
        nothing.heldout().examine()
