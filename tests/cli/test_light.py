"""`VERB --help` and a mistyped flag wait for nothing slow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dreamteacher.cli.main import VERBS
from tests.places import ROOT

SLOW = ("torch", "torchvision", "timm", "diffusers", "PIL", "numpy", "safetensors", "tqdm")
HELP = """
import contextlib, io, sys
from dreamteacher.cli.main import VERBS, main
for verb in VERBS:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            main([verb, "--help"])
        except SystemExit as stop:
            assert stop.code == 0
    assert f"dreamteacher {verb}" in said.getvalue()
    slow = set(sys.argv[1:]) & set(sys.modules)
    assert not slow, (verb, slow)
    assert main([verb, "--no-such-setting"]) == 2
"""
MISTYPED = """
import sys
from dreamteacher.cli.main import main
assert main(["pretrain", "--bach-size", "4"]) == 2
assert main(["evaluate", "--preset", "coco-1x", "--labls", "4"]) == 2
slow = set(sys.argv[1:]) & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.parametrize(
    ("code", "slow"), [(HELP, SLOW), (MISTYPED, (*SLOW, "typeguard", "asyncio"))], ids=["help", "flag"]
)
def test_nothing_slow_is_imported(code: str, slow: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *slow], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Did you mean '--batch-size'?" in done.stderr or len(done.stderr.splitlines()) == 2 * len(VERBS)
