"""Secrets do not reach messages: URLs that are signed or name a password, clients' errors, keys of the environment."""

import json

import pytest

from data_pipelines.errors import DataError
from data_pipelines.redaction import redacted
from data_pipelines.shards.problems import Exclusions, Problem, write_problems
from data_pipelines.storage.addresses import shown

SECRET = "s3cr3tV4lue/with+signs"
SIGNED = f"https://bucket.s3.amazonaws.com/a/00000.tar?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature={SECRET}"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (SIGNED, "https://bucket.s3.amazonaws.com/a/00000.tar?..."),
        (f"https://user:{SECRET.replace('/', '')}@host/a.tar", "https://host/a.tar"),
        (f"https://{SECRET.replace('/', '')}@host/a.tar", "https://host/a.tar"),
        (f"https:/user:{SECRET.replace('/', '')}@host/a.tar", "https:/host/a.tar"),  # what a Path makes of it
        (f"https:/host/a.tar?sig={SECRET}", "https:/host/a.tar?..."),
        (f"//user:{SECRET.replace('/', '')}@host/a", "//host/a"),
        (f"gs://bucket/a?X-Goog-Signature={SECRET}", "gs://bucket/a?..."),
        (f"https://account.blob.core.windows.net/c/a.tar?sv=2024&sig={SECRET}", None),
        (f"abfs://c@account.dfs.core.windows.net/a?sig={SECRET}", None),
        (f"404, message='Not Found', url=URL('{SIGNED}')", None),
        (f"Cannot connect to host h:443 ssl:default [None] /a.tar?X-Amz-Signature={SECRET}&x=1", None),
        (f"a.tar&X-Amz-Security-Token={SECRET}", "a.tar&X-Amz-Security-Token=..."),
        (f"a.tar?AWSAccessKeyId=abc&Signature={SECRET}&Expires=1", None),
        (f"{{'Authorization': 'Bearer {SECRET}'}}", "{'Authorization': 'Bearer ...'}"),
        (f"Authorization: Basic {SECRET}", None),
        (f"<CIMultiDict('Cookie': 'session={SECRET}')>", None),
        (f"X-Amz-Security-Token: {SECRET}", None),
        (f"client(aws_access_key_id='AKIAABCDEFGHIJKLMNOP', aws_secret_access_key='{SECRET}')", None),
        (f'{{"key": "AKIAABCDEFGHIJKLMNOP", "secret": "{SECRET}"}}', '{"key": "AKIA...", "secret": "..."}'),
        (f"storage_options: {{password: {SECRET}, user: me}}", None),
        (f"session_token={SECRET}", "session_token=..."),
        (f"DefaultEndpointsProtocol=https;connection_string={SECRET}", None),
    ],
)
def test_a_secret_is_taken_out_of_text(text, left):
    found = redacted(text)
    for part in SECRET.split("/"):
        assert part not in found
    if left is not None and "Bearer" not in text:
        assert found == left
    assert redacted(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "unknown key training.stepps: did you mean 'steps'?",
        "data.tokenizer: a/tokenizer.model -> b/tokenizer.model",
        "add them with pad_token='[PAD]', cls_token='[CLS]'",
        "runs/a@b/step-000000001 holds 3 tokens: 1 is [SEP]",
        "s3://bucket/a/00000.tar, https://host:8080/a%3Fb.tar and /data/a?b.tar",
        "step 20/400  loss 8.7756 (contrastive 3.553)  lr 4.00e-04",
        "Shard https://host/a.tar cannot be read (the server answered 404 Not Found): see that its URL is right.",
    ],
)
def test_other_text_stays_as_it_is(text):
    assert redacted(text) == text


def test_what_secret_variables_hold_is_named_by_the_variable(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("SSH_KEY", "/root/.ssh/id_ed25519")  # a path is no secret
    monkeypatch.setenv("MY_TOKEN", "short")
    text = "401 for hf_abcdefghij, signed by wJalrXUtnFEMI; short; /root/.ssh/id_ed25519"
    assert redacted(text) == "401 for $HF_TOKEN, signed by $AWS_SECRET_ACCESS_KEY; short; /root/.ssh/id_ed25519"


def test_an_error_for_the_user_shows_no_secret_whoever_wrote_it():
    assert SECRET not in str(DataError(f"Shard {SIGNED} cannot be read: mend it."))


def test_a_list_of_problems_names_signed_shards_without_the_signature_and_still_excludes_them(tmp_path):
    twin = SIGNED.replace("/a/", "/b/")
    write_problems(tmp_path / "bad.jsonl", [Problem(SIGNED, "007", "empty caption")])
    text = (tmp_path / "bad.jsonl").read_text()
    assert SECRET not in text
    assert json.loads(text)["shard"] == shown(SIGNED)
    renewed = SIGNED.replace(SECRET, "another")
    assert Exclusions.load(tmp_path / "bad.jsonl", [twin, renewed]).keys == [set(), {"007"}]
