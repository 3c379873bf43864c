"""What a run says and what ends it shows no secret."""

import subprocess
import sys

from pretrain.screen import say

SIGNED = "https://host/a.tar?X-Amz-Signature=hunter22"


def test_a_line_shows_no_secret(capsys):
    say(f"step 3: replaced 007 of shard {SIGNED}: empty caption")
    assert capsys.readouterr().out == "step 3: replaced 007 of shard https://host/a.tar?...: empty caption\n"


def test_a_traceback_shows_no_secret():
    code = f"""
import sys
from pretrain import config
from pretrain.__main__ import main
def load_config(*_):
    raise RuntimeError(f"404, url=URL({SIGNED!r})")
config.load_config = load_config
sys.argv = ["pretrain", "train", "x.yaml"]
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "RuntimeError: 404, url=URL(" in ended.stderr
    assert "hunter22" not in ended.stderr.replace(code, "")
