"""Exports load in the libraries they are for: the cards' own code is run, names follow from rules written here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from dreamteacher.cli import main as cli
from dreamteacher.exports import onnx as exports_onnx
from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.format import Exported, find_format, formats_for
from dreamteacher.exports.formats import FORMATS
from dreamteacher.exports.hub import LICENCES
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime.errors import UserError
from tests.exports.test_write import CONFIG, export, make_run, message
from tests.places import ROOT

ATTO = ((2, 2, 6, 2), (40, 80, 160, 320))
# A network of each kind, and the formats whose card is run for it (the graph is exported once: it takes a while).
RUN = {
    "resnet18": ("torchvision", "smp", "hub"),
    "convnext_atto": ("torchvision", "smp", "onnx"),
    "efficientnet_b0": ("smp",),
}


def random_vectors(student: Student) -> None:
    """Gains, shifts, layer scales and statistics that are far from those of a new network."""
    generator = torch.Generator().manual_seed(1)
    for value in student.model.state_dict().values():
        if value.ndim == 1 and value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Student, Path]]:
    """Every network with its run folder; in it one folder per format, and the maps it has to give."""
    made = {}
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for name, formats in RUN.items():
        folder = tmp_path_factory.mktemp("runs") / name
        student = make_run(folder, name)
        random_vectors(student)
        state = {k: v.contiguous() for k, v in student.model.state_dict().items()}
        save_file(state, folder / "backbone.safetensors", {"student": name})
        for format in formats:
            export(folder, folder / format, format=format)
        with torch.no_grad():
            maps = student(images)
        expected = {f"map{i}": m.contiguous() for i, m in enumerate(maps)} | {"images": images}
        save_file(expected, folder / "expected.safetensors")
        made[name] = (student, folder)
    return made


def exported(format: str, student: Student) -> Exported:
    return find_format(format).make(student, {}, ExportConfig(run=Path("run"), format=format))


def meta(name: str) -> Student:
    """A student without values: its names and shapes."""
    with torch.device("meta"):
        return Student(name, timm.create_model(name, num_classes=0))


# --- the cards' code, in a process that never saw this package ------------------------------------------------

RUN_CARDS = """
import os, pathlib, re, sys
import torch
from safetensors.torch import load_file
for folder in map(pathlib.Path, sys.argv[1:]):
    os.chdir(folder)
    code, = re.findall("```python\\n(.*?)```", pathlib.Path("README.md").read_text(), re.DOTALL)
    expected = load_file("../expected.safetensors")
    images = expected.pop("images")
    ours = "IMAGES.numpy()" if folder.name == "onnx" else "IMAGES"
    code, replaced = re.subn(r"^images = .*$", "images = " + ours, code, flags=re.MULTILINE)
    assert replaced == 1
    names = {"IMAGES": images}
    exec(code, names)
    assert len(names["maps"]) == len(expected) == 4
    for i, found in enumerate(map(torch.as_tensor, names["maps"])):
        worst = expected[f"map{i}"].abs().max().item()
        torch.testing.assert_close(found, expected[f"map{i}"], rtol=1e-4, atol=1e-4 * max(1, worst))
    if "masks" in names:
        assert names["masks"].shape == (2, 2, 64, 96)
    if folder.name == "hub":  # as if it had been downloaded
        import timm
        model = timm.create_model("hf-hub:me/birds", pretrained=True)
        assert tuple(model.pretrained_cfg["input_size"]) == (3, 64, 96)
        for key, value in model.state_dict().items():
            assert torch.equal(value, names["model"].state_dict()[key]), key
assert "dreamteacher" not in sys.modules
print("all equal")
"""


def test_the_card_of_every_format_gives_the_students_maps(
    runs: dict[str, tuple[Student, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--me--birds"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(runs["resnet18"][1] / "hub")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folders = [
        str(folder / format)
        for name, (_, folder) in runs.items()
        for format in RUN[name]
        if format in ("torchvision", "smp", "onnx", "hub")
    ]
    assert len(folders) == 7
    command = [sys.executable, "-I", "-W", "error", "-c", RUN_CARDS, *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all equal"


def snippet(folder: Path) -> str:
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


# --- names by rule --------------------------------------------------------------------------------------------


def convnext_names(depths: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """(timm, torchvision) of every tensor of a ConvNeXt without its last norm."""
    layers = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5"}
    for end in ("weight", "bias"):
        for stage, depth in enumerate(depths):
            for i in (0, 1):
                own = f"stages.{stage}.downsample.{i}" if stage else f"stem.{i}"
                yield f"{own}.{end}", f"features.{2 * stage}.{i}.{end}"
            for block in range(depth):
                own, other = f"stages.{stage}.blocks.{block}", f"features.{2 * stage + 1}.{block}"
                for ours, theirs in layers.items():
                    yield f"{own}.{ours}.{end}", f"{other}.{theirs}.{end}"
                if end == "weight":
                    yield f"{own}.gamma", f"{other}.layer_scale"


def test_convnext_names(runs: dict[str, tuple[Student, Path]]) -> None:
    student, folder = runs["convnext_atto"]
    state = student.model.state_dict()
    expected = {other: state[own] for own, other in convnext_names(ATTO[0])}
    expected |= {f"classifier.0.{end}": state[f"head.norm.{end}"] for end in ("weight", "bias")}
    found = load_file(folder / "torchvision" / "model.safetensors")
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert torch.equal(found[key].flatten(), value.flatten()), key
        # timm's small ConvNeXts have 1x1 convolutions where torchvision has Linear
        linear = any(part in key for part in ("block.3", "block.5"))
        dims = 2 if linear and key.endswith("weight") else 3 if "layer_scale" in key else value.ndim
        assert found[key].ndim == dims, key


# --- torchvision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_base", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_has_every_name_and_shape(name: str) -> None:
    made = exported("torchvision", meta(name))
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    theirs = {k: v.shape for k, v in theirs.items() if not k.startswith(("fc.", "classifier.2."))}
    assert {k: v.shape for k, v in made.tensors.items()} == theirs
    assert f"model = {name}(weights=None)" in made.snippet


# --- ONNX -----------------------------------------------------------------------------------------------------


def test_the_graph_takes_any_batch_and_size(runs: dict[str, tuple[Student, Path]]) -> None:
    student, folder = runs["convnext_atto"]
    assert sorted(p.name for p in (folder / "onnx").iterdir()) == ["README.md", "model.onnx"]
    graph = onnx.load(folder / "onnx" / "model.onnx")
    onnx.checker.check_model(graph)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]
    assert "Opset 18" in (folder / "onnx" / "README.md").read_text()
    (images,) = graph.graph.input
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == [
        "batch",
        3,
        "height",
        "width",
    ]
    assert {p.key: p.value for p in graph.metadata_props}["student"] == "convnext_atto"
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["s4", "s8", "s16", "s32"]
    generator = torch.Generator().manual_seed(3)
    for shape in ((1, 3, 64, 64), (3, 3, 45, 70), (2, 3, 160, 96)):
        images = torch.rand(shape, generator=generator)
        with torch.no_grad():
            expected = student(images)
        for found, wanted in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
            tolerance = 1e-4 * max(1, wanted.abs().max().item())
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=tolerance)


def test_a_graph_that_differs_is_not_handed_out() -> None:
    maps = [torch.ones(1, 2, 3, 3)]
    exports_onnx._compare([maps[0].numpy()], maps)
    for wrong in (maps[0] * 1.01, maps[0][:, :1], maps[0] * float("nan")):
        with pytest.raises(UserError) as error:
            exports_onnx._compare([wrong.numpy()], maps)
        assert "differ from torch's" in message(error)


def test_without_its_libraries_the_graph_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        export(tmp_path / "none", format="onnx")
    assert "pip install 'dreamteacher[onnx]'" in message(error)


# --- the hub's folder -----------------------------------------------------------------------------------------


def test_the_hubs_card(runs: dict[str, tuple[Student, Path]], tmp_path: Path) -> None:
    folder = runs["resnet18"][1]
    files = sorted(p.name for p in (folder / "hub").iterdir())
    assert files == ["LICENSE.md", "README.md", "config.json", "model.safetensors"]
    card = huggingface_hub.ModelCard.load(folder / "hub" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["license_link"]) == ("other", "LICENSE.md")
    assert re.fullmatch(r"[a-z0-9.-]+", data["license_name"])
    assert (data["library_name"], data["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert {"timm", "dreamteacher"} <= set(data["tags"])
    assert "datasets" not in data  # a folder of images is no dataset of the hub
    terms = (folder / "hub" / "LICENSE.md").read_text()
    assert "(adm-birds): MIT" in terms
    assert "(data/birds)" in terms
    assert "hf-hub:OWNER/NAME" in card.text
    config = json.loads((folder / "hub" / "config.json").read_text())
    assert timm.is_model(config["architecture"])

    out = export(
        folder, tmp_path / "hub", format="hub", licence="cc-by-nc-4.0", datasets=("me/birds", "null")
    )
    data = huggingface_hub.ModelCard.load(out / "README.md").data.to_dict()
    assert (data["license"], data["datasets"]) == ("cc-by-nc-4.0", ["me/birds", "null"])
    assert not (out / "LICENSE.md").exists()
    assert "license_name" not in data


def test_what_the_hub_would_refuse_is_refused_here(runs: dict[str, tuple[Student, Path]]) -> None:
    folder = runs["resnet18"][1]
    for settings, part in (
        ({"format": "hub", "licence": "Apache-2.0"}, "Did you mean 'apache-2.0'?"),
        ({"format": "hub", "datasets": ("data/birds/all",)}, "is called 'data/birds/all'"),
        ({"format": "smp", "licence": "mit"}, "Add --format hub"),
        ({"datasets": ("me/birds",)}, "the format is timm"),
    ):
        with pytest.raises(UserError) as error:
            export(folder, folder / "never", **settings)
        assert part in message(error)
    assert not (folder / "never").exists()
    assert len(LICENCES) == len(set(LICENCES))


# --- what does not fit, folders, the command ------------------------------------------------------------------


def test_a_format_without_the_network_names_those_that_have_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "mobilenetv3_small_100")
    for format in ("torchvision",):
        with pytest.raises(UserError) as error:
            export(tmp_path / "run", format=format)
        assert f"The format {format} has no mobilenetv3_small_100" in message(error)
        assert "Formats that know it: timm, smp, onnx, hub." in message(error)
    assert not (tmp_path / "run" / "export").exists()
    # resnet50's names and shapes, but blurred: only its name tells it apart
    assert formats_for(meta("resnetblur50")) == ["timm", "smp", "onnx", "hub"]
    assert formats_for(meta("resnet50.a1_in1k")) == list(FORMATS)
    assert formats_for(meta("convnextv2_atto")) == ["timm", "smp", "onnx", "hub"]
    assert formats_for(meta("tf_efficientnet_b0")) == ["timm", "smp", "hub"]


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        export(tmp_path, format="torchvison")
    assert "Did you mean 'torchvision'?" in message(error)
    with pytest.raises(UserError) as error:
        cli.run("export", ["--run", str(tmp_path), "--format", "torchvison"])
    assert "Did you mean 'torchvision'?" in message(error)


def test_one_format_replaces_another_on_request(
    runs: dict[str, tuple[Student, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = runs["resnet18"][1], tmp_path / "out"
    export(folder, out, format="hub")
    with pytest.raises(UserError) as error:
        export(folder, out, format="smp")
    assert "holds an export already" in message(error)
    cli.run("export", ["--run", str(folder), "--out", str(out), "--overwrite", "--format", "smp"])
    assert capsys.readouterr().out == f"Export: {out}\n"
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.safetensors"]
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: segmentation-models-pytorch\ntags: [smp, ")
    assert f"| teacher's licence | {CONFIG['teacher']['licence']} |" in card  # type: ignore[index]
    # a ResNet's names there are timm's, so even `init` reads it
    again = create_student("resnet18", init=str(out)).model.state_dict()
    assert all(torch.equal(again[k], v) for k, v in runs["resnet18"][0].model.state_dict().items())


def test_the_table_names_what_is_there() -> None:
    for name, place in FORMATS.items():
        assert find_format(name).name == name
        assert place == f"dreamteacher.exports.{name}:FORMAT"


TOY = """
from pathlib import Path

import torch

from dreamteacher.exports.format import Exported, Format


def write(student, file):
    torch.save(sum(p.numel() for p in student.parameters()), file)


FORMAT = Format(
    name="toy",
    takes="networks with a layer1",
    knows=lambda student: hasattr(student.model, "layer1"),
    make=lambda student, facts, config: Exported(
        tensors={}, install="toys", snippet="import toys", notes="A toy.", files={"toy.txt": student.name}
    ),
    write=write,
    weights="model.toy",
    files=("toy.txt",),
)
"""
USE = """
import sys
from dreamteacher.exports.formats import FORMATS
FORMATS["toy"] = "toy:FORMAT"
from dreamteacher.cli.main import main
run = sys.argv[1]
assert main(["export", "--run", run, "--format", "tyo"]) == 2
assert main(["export", "--run", run, "--format", "toy"]) == 0
assert main(["export", "--run", run, "--format", "toy"]) == 2
assert main(["export", "--run", run, "--format", "toy", "--overwrite"]) == 0
"""


def test_a_format_is_added_by_one_file_and_one_line(
    runs: dict[str, tuple[Student, Path]], tmp_path: Path
) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    folder = tmp_path / "run"
    student = make_run(folder, "resnet18")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(folder)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Export: {folder / 'export'}") == 2
    assert "Did you mean 'toy'?" in done.stderr
    assert "holds an export already" in done.stderr
    files = {p.name: p for p in (folder / "export").iterdir()}
    assert sorted(files) == ["README.md", "model.toy", "toy.txt"]
    assert files["toy.txt"].read_text() == "resnet18"
    assert torch.load(files["model.toy"], weights_only=True) == sum(p.numel() for p in student.parameters())
    assert "pip install toys" in files["README.md"].read_text()
