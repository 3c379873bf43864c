"""Evaluation sees the whole split, the same each time, in equal batches on every rank."""

import io
from pathlib import Path

import pytest
import torch
from corpus import Corpus, Members, caption, jpeg, make_corpus
from PIL import Image

from data_pipelines.errors import DataError


@pytest.mark.parametrize(("batch_size", "dp_size"), [(164, 1), (10, 1), (16, 3), (7, 4), (100, 4)])
def test_every_rank_has_equal_batches_and_together_they_hold_the_whole_split(
    corpus: Corpus, batch_size: int, dp_size: int
):
    data = corpus.heldout()
    ranks = [list(data.batches(batch_size, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
    positions = [p for batch in zip(*ranks, strict=True) for part in batch for p in part.positions.tolist()]
    assert positions == [i % 164 for i in range(len(positions))]
    assert len(positions) - 164 < batch_size * dp_size


def test_a_sample_is_the_same_in_any_batch_and_at_any_time(corpus: Corpus):
    data = corpus.heldout()
    whole = next(data.batches(164))
    for batch in [*data.batches(9), *corpus.heldout(workers=1).batches(50)]:
        at = batch.positions
        assert all(torch.equal(whole.tensors()[name][at], tensor) for name, tensor in batch.tensors().items())


def test_records_tell_a_person_what_the_samples_are(corpus: Corpus):
    batch = next(corpus.heldout().batches(80, records=True))
    assert [record.key for record in batch.records] == [f"{i:05d}" for i in range(80)]
    assert [record.caption for record in batch.records] == [caption(i) for i in range(80)]
    assert batch.records[75].metadata == {"index": 75}


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
    seen, stored = (next(photos.heldout(exif_orientation=value).batches(8)).images for value in (True, False))
    assert torch.equal(seen, torch.rot90(stored, -1, (2, 3)))
    assert not torch.equal(seen, stored)
    data = [photos.training(exif_orientation=value, crop_scale=(1, 1)) for value in (True, False)]
    seen, stored = (next(iter(each.batches(each.initial_state()))).images for each in data)
    assert torch.equal(seen, torch.rot90(stored, -1, (2, 3)))


def test_no_held_out_manifest_is_an_error_that_names_the_key(corpus: Corpus):
    with pytest.raises(DataError, match=r"set data\.heldout"):
        corpus.heldout(heldout=None)
