"""Every family of teachers behind the one contract: the checks pass, a student learns from it, damage is named.

Tiny random networks: every family's own, and further kinds (tests/builders/teachers.py).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dreamteacher.cli import main as cli
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.cost import measure
from dreamteacher.teachers.registry import FAMILIES, family_of, load_teacher, read_card
from dreamteacher.testing import check_teacher, tiny_teacher
from tests.builders.teachers import TINY, build


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_and_the_families_agree(name, tmp_path):
    family = family_of(name)
    assert (family.name, family.spec.family) == (name, name)
    assert sorted(family.convert) == sorted(FAMILIES[name].kinds)
    assert read_card(Path(build(name, tmp_path / "teacher")))["family"] == name
    teacher = tiny_teacher(name)
    assert teacher.family == name
    (first, spec), (again, _) = family.tiny(), family.tiny()
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    cost = measure(name, spec)
    assert cost.levels == {s.stride: s.channels for s in teacher.specs}
    assert set(cost.modes) == teacher.modes


def test_the_table_loads_no_network_library():
    code = (
        "import sys; from dreamteacher.teachers import registry; from dreamteacher.teachers.published import config, known;"
        "registry.families_by_kind(); print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", [*TINY, "module"])
def test_contract_and_a_student(kind, image_folder, tmp_path, capsys):
    name = build(kind, tmp_path / "teacher")
    teacher = load_teacher(name)
    check_teacher(teacher)
    before = [p.clone() for p in teacher.parameters()]
    mode = "encode" if "encode" in teacher.modes else "sample"
    teacher.keep_only(mode)
    check_teacher(teacher)
    assert teacher.modes == {mode}
    height, width = teacher.size
    command = [
        "pretrain", "--teacher", name, "--student", "test_resnet", "--out", str(tmp_path / "run"), "--width",
        "8", "--batch-size", "8", "--warmup-epochs", "0", "--log-every", "1", "--device", "cpu",
        "--precision", "float32",
    ]  # fmt: skip
    if mode == "encode":
        command += ["--images", str(image_folder), "--epochs", "2"]
    else:
        command += ["--dataset", "synthesized", "--samples", "16", "--epochs", "2"]
    assert cli.main([*command, "--size", str(height), str(width)]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert teacher.licence in said
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = [spec.name for spec in teacher.specs]
    assert all(math.isfinite(row[f"r2/{level}"]) for row in rows for level in names)
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["teacher"]
    assert facts["family"] == teacher.family
    assert facts["licence"] == teacher.licence
    assert list(facts["levels"]) == names
    with safe_open(tmp_path / "run" / "backbone.safetensors", "pt") as file:
        assert file.metadata()["teacher"] == teacher.name
    again = load_teacher(name)
    assert all(map(torch.equal, before, again.parameters()))
    assert isinstance(teacher.specs[0], FeatureSpec)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("fault", ["cut", "altered", "keys", "network", "setting"])
def test_damage_is_named_in_three_lines(kind, fault, tmp_path):
    folder = Path(build(kind, tmp_path / "teacher"))
    weights, card = folder / "teacher.safetensors", json.loads((folder / "teacher.json").read_text())
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        del card["sha256"]
    elif fault == "altered":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(bytes(content))
    elif fault == "keys":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        save_file(dict(list(tensors.items())[1:]), weights)
        del card["sha256"]
    elif fault == "network":
        card["network"] = {"surely": "not"}
    else:
        card["family"] = "dreams"
    (folder / "teacher.json").write_text(json.dumps(card))
    with pytest.raises(UserError) as caught:
        load_teacher(str(folder))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3
    assert all(len(line) < 300 for line in lines)
