"""Damaged and hostile files, a few hundred of each kind: read or refused, nothing else; `benchmarks/fuzz` has 10,000s."""

from __future__ import annotations

import contextlib
import csv
import json
import runpy
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreamteacher.data.images import read_image
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError
from tests.places import BENCHMARKS

FUZZ = BENCHMARKS / "fuzz"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def fuzz() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FUZZ)
        found = runpy.run_path(str(FUZZ / "run.py"), run_name="fuzz")
    for name in ("damaged_files", "damaged_pictures"):
        sys.modules.pop(name, None)
    return found


def outcomes(fuzz: dict[str, Any], case: Any, count: int) -> Counter[str]:
    with warnings.catch_warnings():  # Pillow and torch speak of what they then refuse
        warnings.simplefilter("ignore")
        found = [fuzz["one"](case, number)[:2] for number in range(count)]
    bad = [outcome for _, outcome in found if outcome not in fuzz["GOOD"]]
    assert not bad
    return Counter(outcome for _, outcome in found)


def test_damaged_pictures_are_read_or_refused(fuzz: dict[str, Any], tmp_path: Path) -> None:
    counts = outcomes(fuzz, fuzz["image_case"](tmp_path, 1), 400)
    assert counts.total() == 400
    assert min(counts["read"], counts["refused"]) > 80


def test_the_bombs_are_sound_pictures(fuzz: dict[str, Any], tmp_path: Path) -> None:
    pictures = fuzz["damaged_pictures"]
    for mode, seen in (("RGBA", 255), ("I;16", 0)):
        (tmp_path / "x").write_bytes(pictures.bomb(mode, 60))
        assert torch.equal(read_image(tmp_path / "x", None), torch.full((3, 60, 60), seen, dtype=torch.uint8))
        assert torch.equal(read_image(tmp_path / "x", None), fuzz["_pixels"](tmp_path / "x"))
    assert set(pictures.BOMBS) < set(range(10_000))


KINDS = (
    "checkpoint", "weights, safetensors", "weights, torch", "StyleGAN2 pickle", "teacher.json", "features.json",
    "stored features", "run folder", "interpreter.json", "tar shard", "archive",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(fuzz: dict[str, Any], kind: str, tmp_path: Path) -> None:
    counts = outcomes(fuzz, fuzz["file_case"](tmp_path, 1, kind), 40)
    assert counts["refused"] > 4


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("teacher.json", 556), ("teacher.json", 650), ("features.json", 563), ("tar shard", 633), ("tar shard", 44),
        ("archive", 114), ("run folder", 17),
    ],
)  # fmt: skip
def test_what_was_once_a_defect(fuzz: dict[str, Any], kind: str, number: int, tmp_path: Path) -> None:
    case = fuzz["file_case"](tmp_path, 0, kind)
    outcomes(fuzz, lambda _: case(number), 1)


def test_every_kind_is_tried(fuzz: dict[str, Any]) -> None:
    assert set(fuzz["damaged_files"].KINDS) == set(KINDS)


def test_a_case_that_fails_is_told(fuzz: dict[str, Any], tmp_path: Path) -> None:
    """The harness itself: exceptions, code that ran and processes that die are counted as what they are."""
    box = fuzz["damaged_files"].Sandbox(tmp_path)
    assert not box.touched()
    box.canary.touch()
    assert box.touched()
    _, outcome, _ = fuzz["one"](lambda _: {}["x"], 0)
    assert outcome.startswith("wrong: KeyError")


@pytest.mark.parametrize("name", ["images", "files"])
def test_the_committed_counts_are_ten_thousand_without_a_defect(name: str) -> None:
    rows = list(csv.DictReader((FUZZ / f"{name}.csv").read_text().splitlines()))
    total = {key: sum(int(row[key]) for row in rows) for key in rows[0] if key in {
        "made", "read", "refused", "wrong", "crashed", "hung", "touched"}}  # fmt: skip
    assert total["made"] == total["read"] + total["refused"] == 10_000
    facts = parse_json((FUZZ / "environment.json").read_text())[name]
    assert {k: facts[k] for k in total} == total
    assert max(float(row["slowest_ms"]) for row in rows) < 20_000


@settings(max_examples=150)
@given(header=JSON, body=st.binary(max_size=64), lie=st.integers(-2, 2))
def test_any_header_of_a_checkpoint_is_an_error(
    header: Any, body: bytes, lie: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", max(0, len(text) + lie)) + text + body)
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert len(str(error.value).splitlines()) <= 3
    with contextlib.suppress(UserError):
        assert all(type(v) is Tensor for v in checkpoint.read_state_dict(path).values())


@settings(max_examples=200)
@given(text=st.text(max_size=40) | JSON.map(json.dumps), depth=st.sampled_from([0, 3, 100_000]))
def test_parse_json_gives_values_or_value_errors(text: str, depth: int) -> None:
    with contextlib.suppress(ValueError):
        parse_json("[" * depth + text + "]" * depth)
