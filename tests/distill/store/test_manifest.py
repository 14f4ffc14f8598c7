"""The manifest of a store: whatever is changed in it is refused or harmless."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamteacher.distill.store.files import MANIFEST, manifest_text, read_manifest
from dreamteacher.distill.store.items import (
    Level,
)
from tests.builders.pictures import refused
from tests.distill.store.test_store import plan_of


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("manifest")
    level = Level(name="s4", channels=20, stride=4, height=5, width=7, kept=6, storage="int8")
    plan = plan_of((level,), t=(50, 150))
    basis = "b" * 64 if plan.projected else None
    text = manifest_text(plan, basis, [("a" * 64, 100_000 + i) for i in range(plan.shards)])
    (folder / MANIFEST).write_text(text)
    return folder, text


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=5), PLAIN, max_size=3)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in inner for p in places_in(v, (*path, key)))]


@given(data_=st.data())
def test_a_mutated_manifest_is_refused_or_says_what_it_said(manifest, data_):
    folder, text = manifest
    truth = read_manifest(folder)
    facts = json.loads(text)
    place = data_.draw(st.sampled_from(places_in(facts)[1:]))
    holder = facts
    for key in place[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and data_.draw(st.booleans()):
        del holder[place[-1]]
    else:
        holder[place[-1]] = data_.draw(JSON)
    changed = folder.parent / "changed"
    changed.mkdir(exist_ok=True)
    (changed / MANIFEST).write_text(json.dumps(facts, indent=data_.draw(st.none() | st.integers(0, 3))))
    if json.dumps(facts, sort_keys=True) == json.dumps(json.loads(text), sort_keys=True):
        assert read_manifest(changed) == truth
    else:
        refused(lambda: read_manifest(changed))


@given(place=st.integers(0, 5000), byte=st.integers(0, 255))
def test_a_changed_byte_of_the_manifest_is_refused_or_harmless(manifest, place, byte):
    folder, text = manifest
    content = bytearray(text.encode())
    content[place % len(content)] = byte
    changed = folder.parent / "changed"
    changed.mkdir(exist_ok=True)
    (changed / MANIFEST).write_bytes(content)
    try:
        same = json.loads(content) == json.loads(text)
    except ValueError:
        same = False
    if same:
        assert read_manifest(changed) == read_manifest(folder)
    else:
        refused(lambda: read_manifest(changed))


def test_a_manifest_of_another_version_says_so(manifest, tmp_path):
    _, text = manifest
    facts = json.loads(text)
    del facts["sha256"]
    facts["version"] = 9
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (tmp_path / MANIFEST).write_text(json.dumps(facts | {"sha256": digest}))
    refused(lambda: read_manifest(tmp_path), "version 9", "version of dreamteacher that wrote it")
    refused(lambda: read_manifest(tmp_path / "none"), "no finished features", "--out folder")
