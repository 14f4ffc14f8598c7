"""`import dreamteacher as dt`: what a notebook does, with strings, numbers and PIL pictures, and Ctrl-C in it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dreamteacher as dt
from dreamteacher.data import batches
from dreamteacher.data.pictures import to_batch
from dreamteacher.face.arguments import CONFIGS, in_arguments, make_config
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.run_folder import read_rows
from tests.places import ROOT

# --- the notebook session ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(image_folder: Path) -> str:
    return str(image_folder)


@pytest.fixture(scope="module")
def settings(photos: str, tiny_teacher: Path) -> dict[str, Any]:
    """A pretraining that takes seconds, in a notebook's words."""
    return {
        "images": photos, "teacher": str(tiny_teacher), "student": "test_resnet", "size": 64, "t": 50, "width": 8,
        "batch_size": 4, "epochs": 2, "warmup_epochs": 0, "log_every": 1, "save_every": 2, "probe_every": 0,
        "device": "cpu", "precision": "float32", "workers": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dt.Run:
    return dt.pretrain(out=str(tmp_path_factory.mktemp("face") / "x"), verbose=False, **settings)


def test_a_pretraining_is_a_run_with_what_comes_next(
    run: dt.Run, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        repr(run) == f"Run('{run.path}': test_resnet taught by {run.settings['teacher']}, step 8, finished)"
    )
    assert run.report.is_file()
    assert run.settings["size"] == [64, 64]
    assert run.last("loss") == read_rows(run.path / "metrics.jsonl")[-1]["loss"]
    backbone = run.backbone()
    assert isinstance(backbone, dt.Student)
    assert backbone.name == "test_resnet"

    scores = run.evaluate(train=photos, test=photos, size=64, tasks="knn", labels=2, seeds=0, verbose=False)
    assert repr(scores) == f"Evaluation({len(scores.rows)} rows: knn)"
    assert "knn" in scores.table()
    assert repr(scores.table()) == str(scores.table())
    assert scores.values("knn", "accuracy") == [r["value"] for r in scores.rows if r["metric"] == "accuracy"]
    assert len((scores + scores).rows) == 2 * len(scores.rows)

    exported = run.export(str(tmp_path / "export"), format="timm", verbose=False)
    assert repr(exported) == f"Export('{tmp_path / 'export'}')"
    assert "timm.create_model" in exported.card
    again = dt.create_student("test_resnet", init=str(exported.path))
    for a, b in zip(again.state_dict().values(), backbone.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    assert dt.export(run, out=tmp_path / "other", overwrite=True).path == tmp_path / "other"
    assert dt.report(run, image_count=0) == run.report
    assert capsys.readouterr().out == f"Export: {tmp_path / 'other'}\nReport: {run.report}\n"
    assert repr(dt.Run("runs/none")) == "Run('runs/none': not made yet)"


def test_pictures_of_every_kind_have_features(tiny_teacher: Path, photos: str) -> None:
    teacher = dt.load_teacher(str(tiny_teacher), t=50)
    path = next(Path(photos).rglob("*.png"))
    with Image.open(path) as picture:
        picture.load()
    from_path = teacher.features(str(path))
    assert [tuple(m.shape[1:]) for m in from_path] == [
        (s.channels, 64 // s.stride, 64 // s.stride) for s in teacher.specs
    ]
    images = to_batch(path, (64, 64))
    for given in (path, picture, images, (images[0] * 255).to(torch.uint8), [str(path)]):
        for a, b in zip(from_path, teacher.features(given), strict=True):
            assert torch.equal(a, b)
    generator = torch.Generator().manual_seed(0)
    for a, b in zip(from_path, teacher.encode(images, generator=generator), strict=True):
        assert torch.equal(a, b)  # the default is a generator with seed 0
    both = teacher.features([path, Image.new("RGB", (200, 90))], size=32)
    assert both[0].shape[0] == 2
    assert tuple(both[0].shape[2:]) == (32 // teacher.specs[0].stride,) * 2
    sheet = dt.show_features(teacher, [path, picture])
    assert sheet.size == ((1 + len(teacher.specs)) * 66 - 2, 2 * 66 - 2)
    assert dt.show_features(dt.create_student("test_resnet"), path, size=64).height == 64
    assert len(dt.load_images(photos, 32)) == 16
    assert "chest-xray-64" in dt.list_teachers()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("no.png", "'no.png' is no picture: missing file"),
        (3.5, "A float is no picture"),
        ([], "no picture in an empty list"),
        (torch.zeros(5, 8, 8), r"A tensor of shape \(5, 8, 8\) is no picture"),
        (torch.full((3, 8, 8), 2.0), "run from 2 to 2"),
        (torch.full((3, 8, 8), float("nan")), "run from nan"),
        (Image.new("F", (8, 8)), "mode F"),
    ],
)
def test_what_is_no_picture(wrong: Any, words: str) -> None:
    with pytest.raises(dt.UserError, match=words) as error:
        to_batch(wrong, (8, 8))
    assert len(str(error.value).splitlines()) <= 3


def test_a_tensor_covers_its_size_as_a_picture_does() -> None:
    values = torch.linspace(0, 255, 48 * 96).reshape(1, 48, 96).to(torch.uint8).expand(3, -1, -1)
    picture = Image.frombytes("RGB", (96, 48), bytes(values.permute(1, 2, 0).flatten().tolist()))
    from_tensor, from_picture = to_batch(values, (16, 16)), to_batch(picture, (16, 16))
    assert (from_tensor - from_picture).abs().max() < 2 / 255


# --- the other verbs, each once ------------------------------------------------------------------------------


def test_features_and_labels(
    settings: dict[str, Any], tiny_teacher: Path, photos: str, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"device": "cpu", "precision": "float32", "verbose": False}
    features = dt.make_features(
        images=photos, out=str(tmp_path / "features"), teacher=str(tiny_teacher), t=50, keep="all", flip=False,
        workers=1, **common,
    )  # fmt: skip
    assert repr(features) == f"Features('{tmp_path / 'features'}')"
    run = features.pretrain(out=tmp_path / "stored", flip=False, verbose=False, **settings)
    assert run.last("step") == 8

    interpreter = dt.train_interpreter(
        images=photos, out=tmp_path / "interpreter", teacher=str(tiny_teacher), epochs=1, warmup_epochs=0, width=8,
        labels=2, t=50, **common,
    )  # fmt: skip
    assert isinstance(interpreter.load(), dt.Interpreter)
    labels = interpreter.make_labels(images=photos, out=tmp_path / "labels", **common)
    assert len(labels.rows) == 16
    assert labels.page.is_file()


def test_teachers(photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamteacher.teachers.training import train
    from tests.teachers.training.test_train import TINY

    monkeypatch.setitem(train.PRESETS, "cpu-64", TINY)
    teacher = dt.train_teacher(
        images=photos, out=str(tmp_path / "teacher"), steps=2, batch_size=2, device="cpu", verbose=False
    )
    assert repr(teacher).startswith(f"TeacherFolder('{tmp_path / 'teacher'}': diffusion, licence")
    assert teacher.report.is_file()
    assert isinstance(teacher.load(t=50), dt.Teacher)
    found = dt.inspect(
        teacher=teacher, images=photos, out=tmp_path / "looks", t=50, count=16, labels=1, show=1, device="cpu", verbose=False
    )  # fmt: skip
    assert found.page.is_file()
    assert f"at t {found.rows[0].t}" in repr(found)
    with pytest.raises(dt.UserError, match=r"^(?!.*--)"):
        dt.get_teacher("adm-imagenet-265", verbose=False)


def test_the_dry_run_of_a_verb_makes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    run = dt.pretrain(out=tmp_path / "x", dry_run=True, verbose=False, **settings)
    assert repr(run).endswith("not made yet)")
    assert list(tmp_path.iterdir()) == []


# --- arguments -----------------------------------------------------------------------------------------------


def test_values_become_what_the_config_wants() -> None:
    config = make_config(
        "pretrain", dt.PretrainConfig, None,
        {"out": "x", "images": Path("y"), "size": 64, "t": range(10, 40, 10), "lr": 1, "label": {"epochs": 3},
         "teacher": Path("runs/teacher"), "betas": [0.8, 0.9]},
    )  # fmt: skip
    assert (config.out, config.images, config.size, config.t) == (
        Path("x"),
        Path("y"),
        (64, 64),
        (10, 20, 30),
    )
    assert (config.lr, config.label.epochs, config.teacher, config.betas) == (
        1.0,
        3,
        "runs/teacher",
        (0.8, 0.9),
    )
    changed = make_config("pretrain", dt.PretrainConfig, config, {"size": None, "seed": torch.tensor(3)})
    assert changed == dataclasses.replace(config, size=None, seed=3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": "x", "bach_size": 4}, "pretrain has no argument 'bach_size'. Did you mean 'batch_size'?"),
        ({}, "pretrain needs out."),
        ({"out": "x", "lr": "fast"}, "pretrain takes a number for lr, not 'fast'."),
        ({"out": "x", "batch_size": 4.5}, "pretrain takes a whole number for batch_size, not '4.5'."),
        ({"out": "x", "flip": 1}, "pretrain takes True or False for flip, not '1'."),
        ({"out": "x", "size": (1, 2, 3)}, "pretrain takes 2 values or None for size, not '(1, 2, 3)'."),
        ({"out": "x", "optimizer": "adamm"}, "for optimizer, not 'adamm'. Did you mean 'adamw'?"),
        (
            {"out": "x", "label": {"epoch": 3}},
            "pretrain's label has no argument 'epoch'. Did you mean 'epochs'?",
        ),
        ({"out": 5}, "pretrain takes a path for out, not '5'."),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(dt.UserError) as error:
        dt.pretrain(**settings)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert "--" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("Use --batch-size 8, or add images.", "Use batch_size=8, or add images."),
        ("Use --size 64 96, or leave --size out.", "Use size=(64, 96), or leave size out."),
        ("Add --overwrite, or choose another --out.", "Add overwrite=True, or choose another out."),
        ("Leave out --no-flip.", "Leave out flip=False."),
        ("Use --dataset encoded or synthesized.", 'Use dataset="encoded" or synthesized.'),
        ("Lower --lr (now 0.1), set --clip 1.", "Lower lr (now 0.1), set clip=1."),
        ("Set --finetune-full.drop-path 0.", "Set finetune_full.drop_path=0."),
        ("--lr 1e-3 is it.", "lr=1e-3 is it."),
        ("name its files by --file FOLDER.", "name its files by file=FOLDER."),
        ("Give the --out folder of `dreamteacher pretrain --x 1`.", "Give the out folder of `dreamteacher pretrain --x 1`."),
        ("Look at `--psi 0.5`.", "Look at `psi=0.5`."),
        ("check that (--rdzv-endpoint).", "check that (rdzv_endpoint)."),
        ("nothing -- but this", "nothing -- but this"),
    ],
)  # fmt: skip
def test_errors_speak_of_arguments(flags: str, arguments: str) -> None:
    assert in_arguments(flags) == arguments


def test_an_error_of_a_verb_speaks_of_arguments(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(dt.UserError) as error:
        dt.pretrain(out=tmp_path / "x", **{**settings, "batch_size": 64})
    assert "Use batch_size=4, or add images." in str(error.value)
    with pytest.raises(dt.UserError, match=r"Use size=\(64, 64\)"):
        dt.pretrain(out=tmp_path / "x", **{**settings, "size": 70})
    with pytest.raises(dt.UserError, match="Give a size of multiples of 32"):
        dt.load_teacher(settings["teacher"]).features(torch.zeros(3, 64, 64), size=70)
    assert list(tmp_path.iterdir()) == []


# --- what is offered -----------------------------------------------------------------------------------------


def test_the_face_is_lazy_and_whole() -> None:
    code = """
    import sys
    import dreamteacher as dt
    assert not {"torch", "tyro"} & set(sys.modules)
    assert {"pretrain", "Run", "UserError", "show_features"} <= set(dir(dt))
    dt.UserError, dt.FeatureSpec, dt.PretrainConfig, dt.pretrain, dt.Run
    assert "torch" not in sys.modules
    missing = [name for name in dir(dt) if getattr(dt, name, None) is None and not name.startswith("__")]
    assert not missing, missing
    try:
        dt.pretrian
    except AttributeError as error:
        assert "no attribute 'pretrian'" in str(error)
    else:
        raise AssertionError
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_what_editors_see_is_what_there_is() -> None:
    text = (ROOT / "dreamteacher" / "__init__.py").read_text()
    seen = {line.rpartition(" as ")[2]: line for line in text.splitlines() if line.startswith("    from ")}
    assert set(seen) == set(dt._PLACES)
    for name, module in dt._PLACES.items():
        assert seen[name].strip() == f"from dreamteacher.{module} import {name} as {name}"
    assert (ROOT / "dreamteacher" / "py.typed").exists()


def test_every_verb_shows_its_settings_as_keywords() -> None:
    verbs = ["pretrain", "train_teacher", "train_interpreter", "get_teacher", "make_features", "make_labels",
             "evaluate", "export", "report", "inspect"]  # fmt: skip
    for verb, config in zip(verbs, CONFIGS, strict=True):
        shown = set(inspect.signature(getattr(dt, verb)).parameters)
        assert shown >= {f.name for f in dataclasses.fields(config)} - {"name"}, verb
        assert "verbose" in shown


# --- Ctrl-C --------------------------------------------------------------------------------------------------


def test_an_interrupt_is_a_keyboard_interrupt_and_the_same_call_resumes(
    run: dt.Run, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    original = batches.batches

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        for batch in original(*args, **kwargs):
            if batch.step == 5:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(batches, "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dt.pretrain(out=tmp_path / "x", verbose=False, **{**settings, "save_every": 100})
    saved = checkpoint.latest(tmp_path / "x")
    assert saved is not None  # every hundredth step would be saved: this one is for the interrupt
    assert not (tmp_path / "x" / "backbone.safetensors").exists()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = dt.pretrain(out=tmp_path / "x", verbose=False, **settings)
    assert resumed.metrics == run.metrics
    for a, b in zip(
        resumed.backbone().state_dict().values(), run.backbone().state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


SCRIPT = """
import json, sys
import dreamteacher as dt
settings = json.loads(sys.argv[1])
try:
    print(dt.pretrain(**settings))
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(3)
"""


@pytest.mark.slow
def test_ctrl_c_in_a_program_without_the_command_line(
    run: dt.Run, settings: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "x"
    long = {**settings, "out": str(out), "epochs": 200, "save_every": 10_000}
    command = [sys.executable, "-c", SCRIPT, json.dumps(long)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )  # fmt: skip
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None and len(read_rows(out / "metrics.jsonl")) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 3, error
    assert said.splitlines()[-1] == "interrupted"
    saved = checkpoint.latest(out)
    assert saved is not None
    before = read_rows(out / "metrics.jsonl")
    step = before[-1]["step"]
    assert saved in (checkpoint.checkpoint_path(out, step), checkpoint.checkpoint_path(out, step + 1))
