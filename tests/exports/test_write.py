"""Exports load in plain timm, say where they come from, and are written whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamteacher.exports import write as export_module
from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.timm import load_snippet
from dreamteacher.exports.write import write_export
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime.errors import UserError

FAMILIES = ("resnet18", "resnet50", "convnext_tiny", "efficientnet_b0")

CONFIG = {
    "verb": "pretrain",
    "version": "0.1.0",
    "config": {
        "student": "resnet18",
        "teacher": "adm",
        "images": "data/birds",
        "dataset": "encoded",
        "size": [64, 96],
        "t": 50,
        "noise": "fresh",
        "epochs": 3,
        "batch_size": 16,
        "lr": 0.004,
    },
    "teacher": {"name": "adm-birds", "family": "adm", "licence": "MIT", "sha256": "ab" * 32},
    "data": {"images": 123, "skipped": 2, "classes": ["crow", "owl|barn"]},
}
METRICS = [
    {"step": 1, "images_seen": 16, "loss": 3.5, "mse/s4": 1.0, "at/s4": 0.25, "lr": 1e-3},
    {"step": 20, "rankme": 17.25, "knn": 0.5},
    {"step": 40, "images_seen": 640, "loss": 1.125, "mse/s4": 0.5, "r2/s4": 0.5, "cosine/s4": 0.75},
]
RESULT = {
    "method": "DreamTeacher",
    "student": "resnet18",
    "task": "linear",
    "metric": "accuracy",
    "labels": 10,
}
RESULTS = [
    RESULT | {"value": 0.5, "seed": 0},
    RESULT | {"value": 0.75, "seed": 1},
    RESULT | {"method": "random init", "value": 0.25, "labels": None, "seed": 0},
]


def trained(name: str) -> Student:
    """A student whose BatchNorm statistics and gains are not those of a new one."""
    student = create_student(name, seed=7)
    generator = torch.Generator().manual_seed(0)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
    return student.eval()


def make_run(folder: Path, name: str = "resnet18", **config: Any) -> Student:
    folder.mkdir(parents=True)
    student = trained(name)
    state = {k: v.contiguous() for k, v in student.model.state_dict().items()}
    save_file(state, folder / "backbone.safetensors", {"format": "dreamteacher-backbone", "student": name})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    for file, rows in (("metrics.jsonl", METRICS), ("results.jsonl", RESULTS)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return student


def images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def export(run: Path, out: Path | None = None, **settings: Any) -> Path:
    return write_export(ExportConfig(run=run, out=out, **settings))


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


RUN_CARDS = """
import os, pathlib, re, sys
from safetensors.torch import load_file
for folder in map(pathlib.Path, sys.argv[1:]):
    os.chdir(folder)
    code, = re.findall("```python\\n(.*?)```", pathlib.Path("README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    import torch
    expected = load_file("../expected.safetensors")
    with torch.no_grad():
        x = (expected.pop("images") - names["mean"]) / names["std"]
        call = re.search(r"indices=(\\[.*?\\])", code)[1]
        maps = names["model"].forward_intermediates(x, indices=eval(call), intermediates_only=True)
    assert len(maps) == len(expected) == len(names["maps"]) == 4
    for i, m in enumerate(maps):
        torch.testing.assert_close(m, expected[f"map{i}"], rtol=1e-4, atol=1e-4)
    assert names["vectors"].shape == (1, maps[-1].shape[1])
    # timm's own loader of such folders, with and without a new classifier
    import timm
    if folder.parent.name == "resnet50":
        continue  # as resnet18
    local = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert local.num_classes == 0
    for key, value in names["model"].state_dict().items():
        assert torch.equal(local.state_dict()[key], value), key
    if folder.parent.name in ("resnet18", "efficientnet_b0"):
        tuned = timm.create_model("local-dir:.", pretrained=True, num_classes=10).eval()
        assert tuned(x).shape == (2, 10)
        for key, value in names["model"].state_dict().items():
            assert torch.equal(tuned.state_dict()[key], value), key
assert "dreamteacher" not in sys.modules
print("all equal")
"""


@pytest.mark.slow
def test_the_card_of_every_family_loads_in_plain_timm(tmp_path: Path) -> None:
    folders = []
    for name in FAMILIES:
        student = make_run(tmp_path / name, name)
        folders.append(export(tmp_path / name))
        with torch.no_grad():
            maps = student(images())
        expected = {f"map{i}": m.contiguous() for i, m in enumerate(maps)} | {"images": images()}
        save_file(expected, tmp_path / name / "expected.safetensors")
    # -I and another working directory: the package in this repository cannot be imported by chance.
    command = [sys.executable, "-I", "-W", "error", "-c", RUN_CARDS, *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all equal"


def test_names_values_and_config_are_timms(tmp_path: Path) -> None:
    student = make_run(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "deep" / "out")
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model("resnet18", num_classes=0)
    state = load_file(out / "model.safetensors")
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(state[k], v) for k, v in student.model.state_dict().items())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["student"] == "resnet18"
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("resnet18", 0, 512)
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 96]
    assert config["pretrained_cfg"]["mean"] == list(model.pretrained_cfg["mean"])
    again = create_student("resnet18", init=str(out)).model.state_dict()
    assert all(torch.equal(again[k], v) for k, v in state.items())


def test_the_card_states_what_the_run_recorded(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    card = (export(tmp_path / "run") / "README.md").read_text()
    for line in (
        "| teacher | adm-birds |",
        "| teacher's licence | MIT |",
        "| images | data/birds |",
        "| number of images | 123 |",
        "| damaged images passed over | 2 |",
        "| classes of the images (not used to train) | crow, owl\\|barn |",
        "| size | 64 x 96 |",
        "| t | 50 |",
        "| lr | 0.004 |",
        "| loss | 1.125 |",
        "| rankme | 17.25 |",
        "| step | 40 |",
        "| s4 | 0.5 | 0.25 | 0.5 | 0.75 |",
        "| DreamTeacher | resnet18 | linear | accuracy | 10 | 0.6250 ± 0.1768 | 2 |",
        "| random init | resnet18 | linear | accuracy | all | 0.2500 | 1 |",
    ):
        assert line in card.splitlines(), line
    assert "the teacher's licence (MIT) may bind you" in card
    assert "not recorded" not in card
    assert str(tmp_path) not in card


def test_missing_facts_are_said_to_be_missing(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for file in ("config.json", "metrics.jsonl", "results.jsonl"):
        (tmp_path / "run" / file).unlink()
    card = (export(tmp_path / "run") / "README.md").read_text()
    for line in (
        "| teacher | not recorded |",
        "Pretraining metrics: not recorded.",
        "Evaluations: not recorded.",
    ):
        assert line in card.splitlines()
    assert "(not recorded) may bind you" in card


def test_the_student_may_be_named_in_the_config_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    save_file(load_file(tmp_path / "run" / "backbone.safetensors"), tmp_path / "run" / "backbone.safetensors")
    assert "# resnet18, pretrained" in (export(tmp_path / "run") / "README.md").read_text()
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError) as error:
        export(tmp_path / "run", tmp_path / "other")
    assert "says which student" in message(error)


def test_a_tagged_name_keeps_its_normalisation(tmp_path: Path) -> None:
    name = "efficientnet_b0.ra4_e3600_r224_in1k"
    mean = list(timm.create_model(name, num_classes=0).pretrained_cfg["mean"])
    assert mean != list(timm.create_model("efficientnet_b0", num_classes=0).pretrained_cfg["mean"])
    make_run(tmp_path / "run", name)
    config = json.loads((export(tmp_path / "run") / "config.json").read_text())
    assert config["architecture"] == "efficientnet_b0"
    assert config["pretrained_cfg"]["mean"] == mean
    assert f"mean = torch.tensor({mean})" in load_snippet("x", name)


def test_snippet_for_a_run_folder_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    names: dict[str, Any] = {}
    exec(load_snippet(tmp_path / "run", "resnet18", file="backbone.safetensors"), names)
    assert names["vectors"].shape == (1, 512)


def test_an_export_is_replaced_only_on_request_and_nothing_else_ever(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    out = export(tmp_path / "run")
    before = (out / "README.md").read_bytes()
    with pytest.raises(UserError) as error:
        export(tmp_path / "run")
    assert "holds an export already" in message(error)
    assert "--overwrite" in message(error)
    (out / "README.md").write_text("old")
    assert export(tmp_path / "run", overwrite=True) == out
    assert (out / "README.md").read_bytes() == before
    (out / "notes.txt").touch()
    with pytest.raises(UserError) as error:
        export(tmp_path / "run", overwrite=True)
    assert "holds other files (notes.txt)" in message(error)
    with pytest.raises(UserError) as error:
        export(tmp_path / "run", out / "README.md")
    assert "is a file" in message(error)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_write_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    make_run(tmp_path / "run")
    if earlier:
        export(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save_file", full)
    with pytest.raises(UserError) as error:
        export(tmp_path / "run", overwrite=True)
    assert "No space left" in message(error)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert (tmp_path / "run" / "export").exists() == earlier


def test_what_is_no_finished_run_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    done = export(tmp_path / "run")
    unfinished, broken = tmp_path / "unfinished", tmp_path / "broken"
    unfinished.mkdir()
    (unfinished / "checkpoint-00000010.safetensors").touch()
    make_run(broken)
    (broken / "config.json").write_text("{")
    for run, part in (
        (tmp_path / "none", "No run folder"),
        (unfinished, "has not finished"),
        (done, "is an export already"),
        (broken, "is not JSON"),
    ):
        with pytest.raises(UserError) as error:
            export(run, tmp_path / "out")
        assert part in message(error)
    make_run(tmp_path / "cut")
    save_file(
        {"conv1.weight": torch.zeros(1)}, tmp_path / "cut" / "backbone.safetensors", {"student": "resnet18"}
    )
    with pytest.raises(UserError) as error:
        export(tmp_path / "cut", tmp_path / "out")
    assert "does not fit resnet18" in message(error)
    assert not (tmp_path / "out").exists()


def test_config_defaults() -> None:
    config = ExportConfig(run=Path("runs/x"))
    assert (config.out, config.overwrite) == (None, False)
