"""A public data set is added by one file and one line: the toy of docs/data.md, used through the command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

import dreamteacher
from tests.builders.pictures import noise

PACKAGE = Path(dreamteacher.__file__).parent
PAGE = PACKAGE.parent / "docs" / "data.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("## Another public data set")[2]
FILE, LINE = re.findall(r"```(?:python|text)\n(.*?)```", SECTION, re.DOTALL)


def toys(root: Path) -> Path:
    for part in ("train", "val"):
        for i in range(4):
            for kind in ("images", "masks"):
                (root / part / kind).mkdir(parents=True, exist_ok=True)
            noise(i, 32, 32).save(root / part / "images" / f"{i}.png")
            mask = torch.ones(1, 32, 32, dtype=torch.uint8)
            mask[:, :8], mask[:, 16:] = 0, 2
            to_pil_image(mask).save(root / part / "masks" / f"{i}.png")
    return root


def test_one_file_and_one_line(tmp_path: Path) -> None:
    copy = tmp_path / "package" / "dreamteacher"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    (copy / "weights").symlink_to(PACKAGE / "weights")
    (copy / "data" / "layouts" / "toy.py").write_text(FILE)
    table = copy / "data" / "layouts" / "table.py"
    line = '    "imagenet": "dreamteacher.data.layouts.imagenet",\n'
    assert table.read_text().count(line) == 1
    table.write_text(table.read_text().replace(line, line + LINE))
    root = toys(tmp_path / "toys")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dreamteacher", *words, "--device", "cpu"]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    small = ("--student", "test_resnet", "--size", "32", "32")
    done = run(
        "pretrain", "--images", f"toy:{root}", "--out", "run", *small, "--batch-size", "2", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    assert "images 4 " in done.stdout
    done = run(
        "evaluate", "--images", f"toy:{root}", *small, "--tasks", "segment-linear", "--mask-counts", "2", "--seeds", "0"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "segment-linear" in done.stdout
    shutil.rmtree(root / "val" / "masks")
    done = run("evaluate", "--images", f"toy:{root}", *small, "--tasks", "segment-linear")
    assert done.returncode == 2
    assert "is not the toy as it is downloaded: there is no val/masks" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
