"""A run whose machine was lost goes on from the copies of its checkpoints in an object store."""

import shutil
import time

import pytest

from e2e.conftest import metrics, run, start, wait_for_step
from object_store import object_store


@pytest.mark.long
def test_a_run_whose_disk_is_lost_goes_on_from_the_store_on_another_layout(config):
    command = (
        "launch",
        "local",
        config.path,
        "checkpoint.mirror=s3://models/a",
        "checkpoint.every=8",
        "training.steps=20",
    )
    with object_store() as (client, _):
        client.create_bucket(Bucket="models")
        process = start(*command, "--nproc", 2)
        copied = 0
        while copied < 8:
            time.sleep(0.1)
            assert process.poll() is None, process.communicate()
            names = [found["Key"] for found in client.list_objects_v2(Bucket="models").get("Contents", [])]
            copied = max((int(name.split("-")[1]) for name in names if name.endswith("/COMMIT")), default=0)
        wait_for_step(process, config.output, copied + 4)
        process.kill()
        process.communicate()
        before = metrics(config.output)
        shutil.rmtree(config.output)

        again = run(*command, "engine.tensor_parallel=2", "--nproc", 2)
        assert again.code == 0, again.err
        assert "Fetching step-" in again.out
        assert "Resumed from" in again.out
        assert "Copied step 20 to s3://models/a." in again.out
        after = {step["step"]: step for step in metrics(config.output)}
        both = [step for step in before if step["step"] in after]
        assert both
        assert {step["batch_id"] for step in both} == {after[step["step"]]["batch_id"] for step in both}
        for step in both:
            assert after[step["step"]]["loss"] == pytest.approx(step["loss"], rel=1e-4)
        assert "nothing" not in again.out + again.err  # the secret key
