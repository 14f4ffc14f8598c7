"""The recipes: heads are complete, commands parse and are checked on miniatures, costs are counted anew, scripts behave."""

from __future__ import annotations

import doctest
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher.cli.main import main
from dreamteacher.data.layouts.table import instance_files
from dreamteacher.distill.config import PretrainConfig, TrainInterpreterConfig
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.detection.config import PRESETS as DETECT
from dreamteacher.downstream.detection.model import build_detector
from dreamteacher.downstream.detection.train import INSTANCES
from dreamteacher.downstream.evaluate import check_config, evaluate
from dreamteacher.downstream.presets import PRESETS, preset_config
from dreamteacher.downstream.segmentation.few_masks import SegmentationHead
from dreamteacher.downstream.segmentation.semantic import ReadoutHead
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.runtime.errors import UserError
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.cost import measure
from dreamteacher.teachers.published.known import KNOWN
from dreamteacher.teachers.training import diffusion as train_diffusion
from dreamteacher.teachers.training import stylegan2 as train_stylegan2
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.train import PRESETS as TEACHERS
from tests.builders import layouts as miniature
from tests.builders.layouts import bitmask, photo, save

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import check  # noqa: E402
import cost  # noqa: E402
import page  # noqa: E402

SCRIPTS = {path.stem: path for path in page.scripts()}
HEADS = {name: page.read_head(path) for name, path in SCRIPTS.items()}
# What can be run: a script, or a script with a set.
CASES = [(name, s) for name in SCRIPTS for s in (check.SETS if check.takes_set(SCRIPTS[name]) else ("",))]
DATA, RUNS = Path("data"), Path("runs")


@functools.cache
def commands(name: str, label_set: str = "", data: Path = DATA, runs: Path = RUNS) -> list[list[str]]:
    """What a script would run."""
    return check.commands(SCRIPTS[name], *filter(None, [label_set]), data=data, runs=runs)


@functools.cache
def read(words: tuple[str, ...]) -> cost.Config:
    """A command's config: most commands belong to several recipes."""
    return check.read_command(*words)


def configs(name: str, label_set: str, data: Path) -> list[cost.Config]:
    """The configs of a recipe, the steps before it first."""
    return [read(tuple(w)) for w in commands(name, label_set, data) if w[0] != "get-teacher"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of each data set, under its name. Do not write into it."""
    root = tmp_path_factory.mktemp("data")
    miniature.imagenet(root / "imagenet")
    miniature.coco(root / "coco")
    miniature.ade20k(root / "ade20k")
    miniature.cityscapes(root / "cityscapes")
    bdd(root / "bdd100k")
    for name, (*_, classes) in {
        "bedroom_28": (28,),
        "ffhq_34": (34,),
        "cat_15": (15,),
        "horse_21": (21,),
    }.items():
        first = int(name == "bedroom_28")
        meaning = {k + first: k for k in range(classes)} | {255: 255}
        miniature.ddpm_seg(root / name, meaning)
    for category in ("bedroom", "cat", "horse"):
        photo(root / "lsun" / category / "a" / "b" / "ab.webp")
    for i in range(2):
        photo(root / "ffhq" / "images1024x1024" / "00000" / f"{i:05}.png", i)
        for part in ("train", "test"):
            photo(root / "fgbg" / part / f"{i}.png", i)
            photo(root / "fgbg" / f"{part}-masks" / f"{i}.png", i)
    return root


def bdd(root: Path) -> None:
    """As `test_layouts.bdd100k`, with objects and segments."""
    miniature.bdd100k(root)
    for part in ("train", "val"):
        for i in range(2):
            things, kinds = [(0, 3, 1), (3, 0, 2), (1, 2, 4)], [(0, 0, 0), (7, 0, 2), (30, 0, 4), (35, 0, 7)]
            save(root / "labels" / "ins_seg" / "bitmasks" / part / f"{i}.png", bitmask(i, things)[0])
            save(root / "labels" / "pan_seg" / "bitmasks" / part / f"{i}.png", bitmask(i, kinds)[0])


# --- heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_heads_are_complete(name: str) -> None:
    head = HEADS[name]
    kind = page.ROW if "Table" in head else page.STEP
    fields = [*kind, *page.ALWAYS, *(key for key in page.SOMETIMES if key in head)]
    assert list(head) == fields
    assert head["Status"] in page.STATUSES
    assert head.get("Table", page.TABLES[0]) in page.TABLES
    assert os.access(SCRIPTS[name], os.X_OK)
    usage = f"bash recipes/{name}.sh {'|'.join(check.SETS)} [SETTING ...]"
    assert head.get("Usage", usage) == usage
    assert ('label_efficient "$@"' in SCRIPTS[name].read_text()) == ("Usage" in head)
    if kind == page.ROW and "Usage" in head:
        assert re.findall(r"(\w+) \d", head["Paper"]) == list(check.SETS)


def test_every_number_of_the_paper_is_there() -> None:
    """The tables of section 9 of the method, counted and looked up by hand."""
    others = page.read_csv("other_rows.csv")
    assert {row["status"] for row in others} == set(page.WITHOUT_SCRIPT)
    rows = [(head["Table"], head["Paper"]) for head in HEADS.values() if "Table" in head]
    rows += [(row["table"], row["paper"]) for row in others]
    listed = {(table, float(number)) for table, paper in rows for number in re.findall(r"\d+\.\d", paper)}
    tables = {
        "COCO, ResNet-50, Mask R-CNN": [38.9, 35.4, 41.6, 37.7, 44.1, 40.1, 45.1, 40.8],
        "COCO, ConvNeXt-B, Cascade Mask R-CNN": [51.2, 44.3, 51.9, 44.6, 52.5, 45.2],
        "ImageNet, fine-tuned": [80.6, 80.0, 80.2, 84.8, 83.9],
        "ImageNet, frozen": [71.7, 70.4, 67.5, 63.9, 54.1, 79.3, 76.5],
        "ADE20K, ResNet-50": [40.9, 39.9, 41.6, 40.5, 42.5],
        "BDD100K, ImageNet pretraining": [
            26.1, 20.2, 24.5, 26.9, 26.2, 27.2, 25.7, 20.6, 22.9, 22.6, 23.1, 22.4, 28.3, 24.8,
        ],
        "BDD100K, in-domain": [
            61.1, 22.4, 23.9, 20.0, 58.4, 20.9, 24.4, 20.6, 56.9, 20.2, 25.1, 21.4, 59.7, 21.5, 26.7, 22.9, 60.3, 21.8,
        ],
        "label-efficient": [
            41.0, 59.2, 47.3, 56.0, 45.0, 58.8, 52.4, 63.4, 31.3, 57.0, 36.5, 45.4, 47.9, 47.6, 60.8, 49.4, 59.1, 53.7,
            65.0, 49.9, 59.4, 56.7, 65.9, 54.8, 61.2, 58.6, 67.6, 53.1, 61.1, 58.2, 64.7, 54.6, 61.3, 58.4, 64.4,
        ],
        "generators, ADE20K": [40.8, 41.2, 41.4],
        "generators, COCO": [40.7, 36.9, 40.0, 36.5, 43.3, 39.4],
        "Cityscapes, after BDD100K": [
            70.9, 41.8, 40.7, 36.7, 73.7, 54.3, 49.9, 44.4, 75.7, 61.2, 56.0, 45.3, 77.5, 63.9, 60.0, 50.0, 78.7, 71.3,
            65.4, 54.4,
        ],
        "ablations, BDD100K instances": [
            23.6, 20.3, 23.9, 20.7, 24.0, 20.8, 25.1, 21.4, 22.3, 19.3, 25.0, 21.6, 23.4, 24.3, 21.1, 23.8, 20.4, 20.6,
            24.4, 20.1,
        ],
    }  # fmt: skip
    assert listed == {(table, number) for table, numbers in tables.items() for number in numbers}
    assert set(tables) == set(page.TABLES)
    missing = {row["row"] for row in others if row["status"] == "not implemented"}
    assert missing == {"regressor: FPN alone", "regressor: FPN and attention", "regressor: PaFPN"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_needs_and_places(name: str) -> None:
    """The head names the data sets and teachers of the commands; a run lies under the name of its recipe."""
    data, teachers = page.needs(HEADS[name])
    assert set(data) <= set(cost.DATA_SETS)
    found, fetched = set(), set()
    for label_set in check.SETS if "Usage" in HEADS[name] else ("",):
        for words in commands(name, label_set):
            found |= {s for word in words for s in cost.DATA_SETS if re.search(rf"(^|:)data/{s}(/|$)", word)}
            fetched |= {words[1]} if words[0] == "get-teacher" else set()
            used = words[words.index("--teacher") + 1] if "--teacher" in words else ""
            assert used in {"", *fetched} or used.startswith("runs/teacher-")
        assert words[words.index("--out") + 1] == f"runs/{name}{label_set and '-'}{label_set}"
    assert (found, fetched) == (set(data), set(teachers))
    assert fetched <= set(KNOWN)


def test_settings_of_the_paper(data: Path) -> None:
    """Section 6, by hand."""

    def pretraining(name: str, label_set: str = "") -> PretrainConfig:
        config = configs(name, label_set, data)[-1]
        assert isinstance(config, PretrainConfig)
        return config

    imagenet = pretraining("pretrain-imagenet-resnet50-adm")
    assert (imagenet.optimizer, imagenet.lr, imagenet.weight_decay) == ("lamb", 4e-3, 0.05)
    assert (imagenet.batch_size, imagenet.epochs, imagenet.warmup_epochs) == (2048, 200, 30)
    assert imagenet.t == (150,)
    bdd = pretraining("pretrain-bdd100k-resnet50-adm")
    assert (bdd.optimizer, bdd.lr, bdd.batch_size, bdd.epochs, bdd.warmup_epochs) == (
        "adamw",
        4e-3,
        256,
        600,
        30,
    )
    assert bdd.t == (50,)
    assert cost.shape_of("runs/teacher-adm-bdd100k").size == (128, 256)
    assert cost.shape_of("runs/teacher-stylegan2-bdd100k").size == (512, 1024)
    lsun = pretraining("pretrain-label-efficient-convnext_base-mixed", "cat")
    assert (lsun.optimizer, lsun.lr, lsun.batch_size, lsun.epochs, lsun.warmup_epochs) == (
        "adamw",
        4e-3,
        256,
        100,
        20,
    )
    assert (lsun.t, lsun.tau, lsun.label_weight, lsun.at_weight, lsun.betas) == (
        (50,),
        4.0,
        1.0,
        10.0,
        (0.9, 0.95),
    )
    for t in (150, 250, 350):
        assert pretraining(f"pretrain-bdd100k-resnet50-adm-t{t}").t == (t,)


# --- scripts ------------------------------------------------------------------------------------------------


def test_a_script() -> None:
    """From the teacher to the number, in folders with blanks, settings at the end."""
    found = check.commands(
        SCRIPTS["bdd100k-panoptic-resnet50-adm"], "--device", "a b", data=Path("/my data"), runs=Path("my runs")
    )  # fmt: skip
    assert [words[0] for words in found] == ["train-teacher", "pretrain", "evaluate"]
    for words in found:
        assert words[words.index("--images") + 1] == "bdd100k:/my data/bdd100k"
    teacher, pretrain, last = found
    assert pretrain[pretrain.index("--teacher") + 1] == teacher[teacher.index("--out") + 1]
    assert (
        last[last.index("--init") + 1]
        == pretrain[pretrain.index("--out") + 1]
        == "my runs/pretrain-bdd100k-resnet50-adm"
    )
    assert last[-2:] == ["--device", "a b"]
    assert "--device" not in teacher + pretrain
    bank = commands("ade20k-resnet50-icgan")[0]
    assert bank[:4] == ["get-teacher", "icgan-256", "--bank-images", "data/imagenet/train"]


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """An environment with a `dreamteacher` that writes down its arguments; it knows no fetched teachers."""
    program = tmp_path / "bin" / "dreamteacher"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n[ "$2" != fails ] && [ "$1" != "$FAILS" ]\n'
    )
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    return {"PATH": path, "RUNS": str(tmp_path / "runs"), "DATA": "data", "SAID": str(tmp_path / "said")}


def run(name: str, *arguments: str, env: dict[str, str], code: int = 0) -> list[str]:
    """Runs a script with the stub; returns what it was called with, without values that begin with a folder."""
    said = Path(env["SAID"])
    said.unlink(missing_ok=True)
    done = subprocess.run(["bash", str(SCRIPTS[name]), *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return said.read_text().splitlines() if said.exists() else []


def test_what_is_there_is_not_run_again(stub: dict[str, str]) -> None:
    name, runs = "label-efficient-convnext_base-mixed", Path(stub["RUNS"])

    def verbs() -> list[str]:
        return [line.split()[0] for line in run(name, "cat", "--seeds", "1", env=stub)]

    fetch_and = ["get-teacher", "train-interpreter", "get-teacher", "pretrain", "evaluate"]
    assert verbs() == fetch_and
    interpreter = runs / "interpreter-label-efficient-cat"
    interpreter.mkdir(parents=True)
    assert verbs() == fetch_and  # begun, and not ended
    (interpreter / "interpreter.json").touch()
    assert verbs() == fetch_and[2:]
    backbone = runs / "pretrain-label-efficient-convnext_base-mixed-cat"
    backbone.mkdir()
    (backbone / "backbone.safetensors").touch()
    assert verbs() == ["evaluate"]
    assert run(name, "cat", "--seeds", "1", env=stub)[0].endswith(
        "label-efficient-convnext_base-mixed-cat --seeds 1"
    )


def test_a_failure_ends_a_script(stub: dict[str, str]) -> None:
    said = run("coco-resnet50-adm", env={**stub, "FAILS": "pretrain"}, code=1)
    assert [line.split()[0] for line in said] == ["get-teacher", "pretrain"]


def test_a_dry_run_of_the_last_step_is_one_of_all(stub: dict[str, str]) -> None:
    for name, arguments in (("coco-resnet50-icgan", ()), ("label-efficient-convnext_base-label", ("horse",))):
        said = [line for line in run(name, *arguments, "--dry-run", env=stub) if not line.startswith("list ")]
        assert len(said) > 2
        assert all(line.endswith(" --dry-run") for line in said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["coco-resnet50-admn"], ["no recipe 'coco-resnet50-admn'", "Did you mean 'coco-resnet50-adm'?"]),
        (["label-efficient-resnet101-mixed"], ["no label-efficient set", "bedroom, ffhq, cat or horse"]),
        (["label-efficient-resnet101-mixed", "dog"], ["'dog'", "label-efficient-resnet101-mixed.sh cat"]),
        (["ade20k-resnet50-supervised", "--data", "/nowhere"], ["ADE20K", "/nowhere/ade20k"]),
    ],
)  # fmt: skip
def test_errors_of_a_check(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 3
    for word in words:
        assert word in error


# --- commands on miniatures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "label_set"), CASES)
def test_a_check(name: str, label_set: str, data: Path) -> None:
    """Every command parses; its data are there, its networks can be made."""
    found = configs(name, label_set, data)
    for config in found:
        assert check.check(config)
    if isinstance(found[-1], EvaluateConfig):
        student = {"resnet50", "resnet101", "convnext_base"} & set(re.split("[-.]", name))
        assert {str(found[-1].student)} == (student or {"resnet50"})
        before = [config for config in found[:-1] if isinstance(config, PretrainConfig)]
        assert all(config.student == found[-1].student for config in before)


def test_a_whole_check(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "label-efficient-convnext_base-mixed"
    assert check.main([name, "cat", "--data", str(data), "--runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    for step in (
        "interpreter-label-efficient-cat",
        "pretrain-label-efficient-convnext_base-mixed-cat",
        f"{name}-cat",
    ):
        assert f"  {step}: " in out
    for words in (
        "2.2 GB to fetch",
        "of 1,657,266 published",
        "about 270 H100-hours",
        "segment-finetune",
        "once '",
    ):
        assert words in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "label_set"),
    [
        ("pretrain-imagenet-resnet50-adm", ""),
        ("pretrain-bdd100k-resnet50-adm-ddim", ""),
        ("pretrain-label-efficient-convnext_base-feature", "horse"),
    ],
)
def test_a_dry_run(
    name: str, label_set: str, data: Path, image_folder: Path, tiny_teacher: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`--dry-run` itself, one of each kind, with a tiny teacher and student in place of the large ones."""
    words = commands(name, label_set, data)[-1]
    small = "--student test_resnet --t 100 --batch-size 2 --accumulate 1 --width 16 --device cpu --workers 0 --dry-run"
    images = ["--images", str(image_folder)] if "--images" in words else []
    places = ["--teacher", str(tiny_teacher), "--out", str(tmp_path / "run"), *images]
    assert main([*words, *small.split(), *places]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_presets() -> None:
    for name, preset in PRESETS.items():
        config = preset_config(name)
        assert (config.seeds, len(config.tasks), config.preset) == ((0,), 1, name)
        assert preset.what
    with pytest.raises(UserError, match="preset_config"):
        evaluate(EvaluateConfig(preset="coco-1x", tasks=("knn",), train=Path(), test=Path(), init="imagenet"))


# --- whole runs, cut down -----------------------------------------------------------------------------------


def test_a_dry_run_of_evaluate(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [
        "--preset",
        "ade20k",
        "--images",
        f"ade20k:{data}/ade20k",
        "--init",
        "random",
        "--student",
        "test_resnet",
    ]
    assert main(["evaluate", *recipe, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert (
        "dry run: nothing was trained or written; test_resnet (random) on semantic" in capsys.readouterr().out
    )
    assert not (tmp_path / "run").exists()


def test_detection_on_a_layout(data: Path) -> None:
    """Objects of BDD100K's bitmasks, as the layout reads them."""
    source = Path(f"bdd100k:{data}/bdd100k")
    found, files = INSTANCES.load(EvaluateConfig(images=source), ()), instance_files(source, "val")
    assert (found.pool.classes, len(found.pool), len(found.test)) == (files.names, 2, 2)
    for i in range(2):
        truth, read = found.test.truth(i), files.read(i)
        assert truth.labels.tolist() == [a.label + 1 for a in read]
        assert truth.crowd == tuple(a.crowd for a in read)
        assert found.test.counts[i] == sum(not a.crowd for a in read)
        assert [int(mask.pixels.sum()) for mask in truth.masks] == [int(a.area) for a in read]
        assert found.test.sizes[i] == tuple(found.test.image(i).shape[1:])
    config = EvaluateConfig(tasks=("detect",), images=source, instances=data)
    with pytest.raises(UserError, match="comes with its instances"):
        check_config(config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "--preset", "coco-1", "--init", "random"], ["no preset 'coco-1'", "Did you mean 'coco-1x'?"]),
        (["evaluate", "--preset", "ade20k", "--student", "resnet18", "--tasks", "knn", "--train", "{data}/imagenet/train",
          "--test", "{data}/imagenet/train"], ["'ade20k' is one of semantic", "tasks are knn"]),
    ],
)  # fmt: skip
def test_errors_of_presets(
    arguments: list[str], words: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("{data}", str(data)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 3
    for word in words:
        assert word in error


def test_a_setting_that_comes_later_wins() -> None:
    _, *words = commands("coco-resnet50-adm")[-1]
    config = check.read_command("evaluate", *words, "--detect.steps", "3", "--student", "test_resnet")
    assert isinstance(config, EvaluateConfig)
    assert (config.detect.steps, config.detect.lr, config.student) == (3, 2.5e-4, "test_resnet")
    assert check.read_command("evaluate", "--preset=coco-2x") == preset_config("coco-2x")


def test_a_recipe_runs_cut_down(
    data: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of a label-efficient row, with a tiny teacher and few steps, up to its number."""
    name = "label-efficient-convnext_base-mixed"
    small = {
        "train-interpreter": "--epochs 1 --warmup-epochs 0 --width 16 --t 100",
        "pretrain": "--student test_resnet --epochs 4 --warmup-epochs 0 --batch-size 2 --accumulate 1 --width 16 --t 100",
        "evaluate": "--student test_resnet --segment.steps 2 --mask-counts 2 --size 64 64 --workers 0",
    }
    for words in commands(name, "cat", data, tmp_path):
        if words[0] == "get-teacher":
            continue
        more = [*small[words[0]].split(), "--device", "cpu", "--precision", "float32"]
        if words[0] != "evaluate":
            more += ["--teacher", str(tiny_teacher)]
        if words[0] == "pretrain":  # LSUN's miniature is one image
            more += ["--images", str(data / "imagenet" / "train"), "--workers", "0"]
        assert main([*words, *more]) == 0, capsys.readouterr().err
    rows = (tmp_path / f"{name}-cat" / "results.jsonl").read_text()
    assert '"metric": "miou"' in rows


# --- cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_costs_of_the_heads(name: str, data: Path) -> None:
    """What the head says is what the settings cost."""
    sets = check.SETS if "Usage" in HEADS[name] else ("",)
    assert HEADS[name]["Cost"] == check.cost_line([configs(name, s, data) for s in sets])


def gmacs(run: object) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()  # type: ignore[operator]
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", cost.GMACS["backbone"])
def test_operations_are_counted_anew(name: str) -> None:
    levels = [FeatureSpec(f"s{s}", c, s) for s, c in KNOWN["adm-imagenet-256-uncond"].shape.levels.items()]
    with torch.device("meta"):
        student = create_student(name).eval()
        images = torch.empty(1, 3, 256, 256)
        regressor = FeatureRegressor(student.specs, levels).eval()
        upernet, auxiliary = (
            SegmentationHead(student.specs, 150, 512).eval(),
            ReadoutHead(student.specs, 150, -2).eval(),
        )
        detector = build_detector(student, DETECT["coco-1x"], classes=80, cascade=False).eval()
    maps = student(images)
    assert gmacs(lambda: student(images)) == pytest.approx(cost.GMACS["backbone"][name], abs=0.01)
    sizes = [(256 // s.stride, 256 // s.stride) for s in levels]
    assert gmacs(lambda: regressor(maps, sizes)) == pytest.approx(cost.GMACS["regressor"][name], abs=0.01)
    if name not in cost.GMACS["upernet"]:
        return
    heads = gmacs(lambda: upernet(maps, (256, 256))) + gmacs(lambda: auxiliary(maps, (256, 256)))
    assert heads == pytest.approx(cost.GMACS["upernet"][name], abs=0.01)
    named = {s.name: m for s, m in zip(student.specs, maps, strict=True)}
    pyramid = detector.backbone.fpn(named)
    counted = gmacs(lambda: detector.backbone.fpn(named)) + gmacs(
        lambda: detector.rpn.head(list(pyramid.values()))
    )
    assert counted == pytest.approx(cost.GMACS["pyramid"][name], abs=0.01)
    heads, meta = detector.roi_heads, torch.device("meta")
    box = gmacs(lambda: heads.box_predictor(heads.box_head(torch.empty(512, 256, 7, 7, device=meta))))
    mask = gmacs(lambda: heads.mask_predictor(heads.mask_head(torch.empty(128, 256, 14, 14, device=meta))))
    assert (box, mask) == (pytest.approx(cost.BOX_HEAD, abs=0.01), pytest.approx(cost.MASK_HEAD, abs=0.01))


@pytest.mark.parametrize("name", cost.TRAINED)
def test_trained_teachers_are_measured_anew(name: str) -> None:
    preset = TEACHERS[name]
    if isinstance(preset, train_diffusion.DiffusionPreset):
        found = measure("diffusion", train_diffusion.network_spec(preset, preset.size, 3, "linear"))
    else:
        assert isinstance(preset, train_stylegan2.StyleGan2Preset)
        found = measure("stylegan2", train_stylegan2.network_spec(preset, preset.size, 3))
    assert (preset.size, found.levels) == (cost.TRAINED[name].size, cost.TRAINED[name].levels)
    assert found.full == pytest.approx(cost.TRAINED[name].gmacs_full, abs=0.01)
    assert found.needed == pytest.approx(cost.TRAINED[name].gmacs_levels, abs=0.01)


def test_hours_by_hand(data: Path) -> None:
    """ADM's four levels are 486.49 GMACs, three passes of a ResNet-50 and its regressor are what is trained."""
    images = 200 * 1_281_167
    trained = 6e9 * (cost.GMACS["backbone"]["resnet50"] + cost.GMACS["regressor"]["resnet50"]) / 75e12
    expected = images * (2e9 * 486.49 / 250e12 + trained) / 3600
    assert cost.gpu_hours(configs("pretrain-imagenet-resnet50-adm", "", data)[-1]) == pytest.approx(
        expected, rel=1e-6
    )
    # 90,000 steps of 16 pictures, the mean shorter side 688 (of 480 to 896), the longer one 4/3 of it.
    pixels = 688 * 917 / 65_536
    one = (
        (cost.GMACS["backbone"]["resnet50"] + cost.GMACS["pyramid"]["resnet50"]) * pixels
        + cost.BOX_HEAD
        + cost.MASK_HEAD
    )
    found = cost.gpu_hours(configs("coco-resnet50-adm", "", data)[-1])
    assert found == pytest.approx(90_000 * 16 * 6e9 * one / 75e12 / 3600, rel=1e-6)
    last = [configs(name, label_set, data)[-1] for name, label_set in CASES]
    assert all(cost.gpu_hours(config) > 0 for config in last)
    assert {type(config) for config in last} == {
        PretrainConfig,
        TrainTeacherConfig,
        TrainInterpreterConfig,
        EvaluateConfig,
    }


def test_the_plan_of_large_runs_assumes_the_same_speeds() -> None:
    spec = importlib.util.spec_from_file_location("plan", ROOT / "benchmarks" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    plan = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = plan
    spec.loader.exec_module(plan)
    assert (plan.DENOISER_SPEED, plan.BACKBONE_SPEED) == (cost.DENOISER_SPEED, cost.BACKBONE_SPEED)


# --- the page -----------------------------------------------------------------------------------------------


def test_page_is_made_of_the_heads() -> None:
    text = page.page()
    if os.environ.get("DREAMTEACHER_WRITE_DOCS"):
        page.PAGE.write_text(text, encoding="utf-8")
    assert page.PAGE.read_text(encoding="utf-8") == text, "`python recipes/page.py` writes it anew"
    for name in SCRIPTS:
        assert f"[{name}](../recipes/{name}.sh)" in text


@pytest.mark.parametrize("module", [cost, page, check])
def test_examples_run(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
