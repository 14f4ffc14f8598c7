"""Recipes: every one is dry-run on miniatures, its commands give its settings back, its cost is counted anew."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher.cli import main as cli
from dreamteacher.cli.main import main
from dreamteacher.data.layouts.table import instance_files
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.train_interpreter import TrainInterpreterConfig
from dreamteacher.downstream.detection.config import PRESETS as DETECT
from dreamteacher.downstream.detection.data import load_detection
from dreamteacher.downstream.detection.model import build_detector
from dreamteacher.downstream.evaluate import EvaluateConfig, check_config, evaluate
from dreamteacher.downstream.presets import PRESETS, preset_config
from dreamteacher.downstream.segmentation.few_masks import SegmentationHead
from dreamteacher.downstream.segmentation.semantic import FCNHead
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.recipes import RECIPES, find_recipe, hours, recipe_lines, script, steps
from dreamteacher.recipes_cost import BOX_HEAD, GMACS, MASK_HEAD, TRAINED, gpu_hours, shape_of
from dreamteacher.recipes_downstream import BESIDE
from dreamteacher.recipes_page import page
from dreamteacher.recipes_row import DATA, VERBS, Places, command_line
from dreamteacher.runtime.errors import UserError
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.known import KNOWN
from dreamteacher.teachers.published.cost import measure
from dreamteacher.teachers.training import diffusion, stylegan2
from dreamteacher.teachers.training.train import PRESETS as TEACHERS
from dreamteacher.teachers.training.train import TrainTeacherConfig
from tests.builders import layouts as miniature
from tests.builders.layouts import bitmask, photo, save
from tests.places import ROOT

PAGE = ROOT / "docs" / "reproducing.md"
OURS = [name for name, recipe in RECIPES.items() if recipe.make is not None]
PLACES = Places(data=Path("data"), out=Path("runs"))


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


# --- rows ---------------------------------------------------------------------------------------------------


def test_every_number_of_the_paper_is_there() -> None:
    """The tables of section 9 of the method, counted and looked up by hand."""
    listed = {(r.table, number) for r in RECIPES.values() for _, number in r.expected}
    listed |= {(b.table, number) for b in BESIDE for _, number in b.expected}
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
    missing = {name for name, recipe in RECIPES.items() if recipe.status == "not implemented"}
    assert missing == {"ablation-fpn", "ablation-fpn-attention", "ablation-pafpn"}


def test_names_teachers_and_data_exist() -> None:
    assert list(RECIPES) == list(dict.fromkeys(RECIPES))
    for position, recipe in enumerate(RECIPES.values()):
        assert all(list(RECIPES).index(before) < position for before in recipe.needs)
        assert not recipe.teacher or recipe.teacher in {*KNOWN, *TRAINED}
        assert set(recipe.data) <= set(DATA)


def test_settings_of_the_paper() -> None:
    """Section 6, by hand."""

    def pretraining(name: str) -> PretrainConfig:
        config = find_recipe(name).config(PLACES)
        assert isinstance(config, PretrainConfig)
        return config

    imagenet = pretraining("pretrain-imagenet-resnet50-adm")
    assert (imagenet.optimizer, imagenet.lr, imagenet.weight_decay) == ("lamb", 4e-3, 0.05)
    assert (imagenet.batch_size, imagenet.epochs, imagenet.warmup_epochs, imagenet.t) == (
        2048,
        200,
        30,
        (150,),
    )
    bdd = pretraining("pretrain-bdd100k-resnet50-adm")
    assert (bdd.optimizer, bdd.lr, bdd.batch_size, bdd.epochs, bdd.warmup_epochs) == (
        "adamw",
        4e-3,
        256,
        600,
        30,
    )
    assert (bdd.t, shape_of("adm-bdd100k").size, shape_of("stylegan2-bdd100k").size) == (
        (50,),
        (128, 256),
        (512, 1024),
    )
    lsun = pretraining("pretrain-cat-convnext_base-mixed")
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
    assert [pretraining(f"pretrain-bdd100k-resnet50-adm-t{t}").t for t in (150, 250, 350)] == [
        (150,),
        (250,),
        (350,),
    ]


# --- commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_command_gives_its_settings_back(name: str) -> None:
    """What is printed, parsed by the command line itself, is the recipe's config."""
    config = RECIPES[name].config(PLACES)
    program, verb, *words = command_line(config)
    assert (program, verb) == ("dreamteacher", VERBS[type(config)])
    assert cli.parse(type(config), verb, words, default=cli._preset(verb, words)) == config


def test_a_setting_that_comes_later_wins() -> None:
    words = command_line(find_recipe("coco-resnet50-adm").config(PLACES))[2:]
    cut = [*words, "--detect.steps", "3", "--student", "test_resnet"]
    config = cli.parse(EvaluateConfig, "evaluate", cut, default=cli._preset("evaluate", cut))
    assert (config.detect.steps, config.detect.lr, config.student) == (3, 2.5e-4, "test_resnet")
    again = ["--preset=coco-2x"]
    assert cli.parse(
        EvaluateConfig, "evaluate", again, default=cli._preset("evaluate", again)
    ) == preset_config("coco-2x")


def test_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "bdd100k-panoptic-resnet50-adm", "--data", "/my data", "--out", "here"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert [words[:2] for words in commands] == [
        ["dreamteacher", v] for v in ("train-teacher", "pretrain", "evaluate")
    ]
    for words in commands:
        assert words[words.index("--images") + 1] == "bdd100k:/my data/bdd100k"
    assert commands[1][commands[1].index("--teacher") + 1] == commands[0][commands[0].index("--out") + 1]
    assert commands[2][commands[2].index("--init") + 1] == commands[1][commands[1].index("--out") + 1]
    assert "PQ 21.8; ours: not run" in lines[1]
    bank = script(find_recipe("ade20k-resnet50-icgan"), PLACES)
    assert any(
        line.startswith("dreamteacher get-teacher icgan-256 --bank-images data/imagenet/train")
        for line in bank
    )
    assert any("CC BY-NC 4.0" in line for line in bank)


def test_list_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "recipes"]) == 0
    assert capsys.readouterr().out.splitlines() == recipe_lines()
    head, *rows = recipe_lines()
    assert len(rows) == len(RECIPES) + len(BESIDE)
    assert head.split()[0] == "recipe"
    (row,) = [line for line in rows if line.startswith("ade20k-resnet50-adm ")]
    assert row.endswith("not run")
    assert "mIoU 42.5" in row
    assert sum(line.endswith("not implemented") for line in rows) == 3


@pytest.mark.parametrize("name", OURS)
def test_a_dry_run(name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", name, "--dry-run", "--data", str(data), "--out", str(tmp_path / "runs")]) == 0
    out, err = capsys.readouterr()
    assert "error" not in err
    assert f"{name}: " in out
    for step in steps(RECIPES[name]):
        assert f"  {step.name}: " in out
        assert f"about {hours(gpu_hours(step))} H100-hours" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe", "coco-resnet50-admn"], ["no recipe 'coco-resnet50-admn'", "Did you mean 'coco-resnet50-adm'?"]),
        (["recipe"], ["needs a name", "list recipes"]),
        (["recipe", "ablation-pafpn"], ["is not implemented here", "FPN with PPM"]),
        (["recipe", "ade20k-resnet50-supervised", "--dry-run", "--data", "/nowhere"], ["ADE20K", "/nowhere/ade20k"]),
        (["evaluate", "--preset", "coco-1", "--init", "random"], ["no preset 'coco-1'", "Did you mean 'coco-1x'?"]),
        (["evaluate", "--preset", "ade20k", "--student", "resnet18", "--tasks", "knn", "--train", "{data}/imagenet/train",
          "--test", "{data}/imagenet/train"], ["'ade20k' is one of semantic", "tasks are knn"]),
    ],
)  # fmt: skip
def test_errors(
    arguments: list[str], words: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("{data}", str(data)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 3
    for word in words:
        assert word in error


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
    found, files = load_detection(source, None, None, None), instance_files(source, "val")
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


def test_a_recipe_runs_cut_down(
    data: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed commands of a label-efficient row, with a tiny teacher and few steps, up to its number."""
    recipe, places = find_recipe("label-efficient-cat-convnext_base-mixed"), Places(data=data, out=tmp_path)
    small = {
        "train-interpreter": "--epochs 1 --warmup-epochs 0 --width 16 --t 100",
        "pretrain": "--student test_resnet --epochs 4 --warmup-epochs 0 --batch-size 2 --accumulate 1 --width 16 --t 100",
        "evaluate": "--student test_resnet --segment.steps 2 --mask-counts 2 --size 64 64 --workers 0",
    }
    for step in steps(recipe):
        words = command_line(step.config(places))
        more = [*small[words[1]].split(), "--device", "cpu", "--precision", "float32"]
        if words[1] != "evaluate":
            more += ["--teacher", str(tiny_teacher)]
        if words[1] == "pretrain":  # LSUN's miniature is one image
            more += ["--images", str(data / "imagenet" / "train"), "--workers", "0"]
        assert main([*words[1:], *more]) == 0, capsys.readouterr().err
    rows = (places.run(recipe.name) / "results.jsonl").read_text()
    assert '"metric": "miou"' in rows


# --- cost ---------------------------------------------------------------------------------------------------


def gmacs(run: object) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()  # type: ignore[operator]
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", GMACS["backbone"])
def test_operations_are_counted_anew(name: str) -> None:
    levels = [FeatureSpec(f"s{s}", c, s) for s, c in KNOWN["adm-imagenet-256-uncond"].shape.levels.items()]
    with torch.device("meta"):
        student = create_student(name).eval()
        images = torch.empty(1, 3, 256, 256)
        regressor = FeatureRegressor(student.specs, levels).eval()
        upernet, auxiliary = (
            SegmentationHead(student.specs, 150, 512).eval(),
            FCNHead(student.specs, 150, -2).eval(),
        )
        detector = build_detector(student, DETECT["coco-1x"], classes=80, cascade=False).eval()
    maps = student(images)
    assert gmacs(lambda: student(images)) == pytest.approx(GMACS["backbone"][name], abs=0.01)
    sizes = [(256 // s.stride, 256 // s.stride) for s in levels]
    assert gmacs(lambda: regressor(maps, sizes)) == pytest.approx(GMACS["regressor"][name], abs=0.01)
    if name not in GMACS["upernet"]:
        return
    heads = gmacs(lambda: upernet(maps, (256, 256))) + gmacs(lambda: auxiliary(maps, (256, 256)))
    assert heads == pytest.approx(GMACS["upernet"][name], abs=0.01)
    named = {s.name: m for s, m in zip(student.specs, maps, strict=True)}
    pyramid = detector.backbone.fpn(named)
    counted = gmacs(lambda: detector.backbone.fpn(named)) + gmacs(
        lambda: detector.rpn.head(list(pyramid.values()))
    )
    assert counted == pytest.approx(GMACS["pyramid"][name], abs=0.01)
    heads, meta = detector.roi_heads, torch.device("meta")
    box = gmacs(lambda: heads.box_predictor(heads.box_head(torch.empty(512, 256, 7, 7, device=meta))))
    mask = gmacs(lambda: heads.mask_predictor(heads.mask_head(torch.empty(128, 256, 14, 14, device=meta))))
    assert (box, mask) == (pytest.approx(BOX_HEAD, abs=0.01), pytest.approx(MASK_HEAD, abs=0.01))


@pytest.mark.parametrize("name", TRAINED)
def test_trained_teachers_are_measured_anew(name: str) -> None:
    preset = TEACHERS[name]
    if isinstance(preset, diffusion.DiffusionPreset):
        found = measure("diffusion", diffusion.network_spec(preset, preset.size, 3, "linear"))
    else:
        assert isinstance(preset, stylegan2.StyleGan2Preset)
        found = measure("stylegan2", stylegan2.network_spec(preset, preset.size, 3))
    assert (preset.size, found.levels) == (TRAINED[name].size, TRAINED[name].levels)
    assert found.full == pytest.approx(TRAINED[name].gmacs_full, abs=0.01)
    assert found.needed == pytest.approx(TRAINED[name].gmacs_levels, abs=0.01)


def test_hours_by_hand() -> None:
    """ADM's four levels are 486.49 GMACs, three passes of a ResNet-50 and its regressor are what is trained."""
    images = 200 * 1_281_167
    trained = 6e9 * (GMACS["backbone"]["resnet50"] + GMACS["regressor"]["resnet50"]) / 75e12
    expected = images * (2e9 * 486.49 / 250e12 + trained) / 3600
    assert gpu_hours(find_recipe("pretrain-imagenet-resnet50-adm")) == pytest.approx(expected, rel=1e-6)
    # 90,000 steps of 16 pictures, the mean shorter side 688 (of 480 to 896), the longer one 4/3 of it.
    pixels = 688 * 917 / 65_536
    one = (GMACS["backbone"]["resnet50"] + GMACS["pyramid"]["resnet50"]) * pixels + BOX_HEAD + MASK_HEAD
    found = gpu_hours(find_recipe("coco-resnet50-adm"))
    assert found == pytest.approx(90_000 * 16 * 6e9 * one / 75e12 / 3600, rel=1e-6)
    for name, recipe in RECIPES.items():
        assert (gpu_hours(recipe) > 0) == (recipe.make is not None), name
    kinds = {type(recipe.config(PLACES)) for recipe in RECIPES.values() if recipe.make is not None}
    assert kinds == {PretrainConfig, TrainTeacherConfig, TrainInterpreterConfig, EvaluateConfig}


# --- the page -----------------------------------------------------------------------------------------------


def test_page_is_made_of_the_recipes() -> None:
    text = page()
    if os.environ.get("DREAMTEACHER_WRITE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.is_file(), "DREAMTEACHER_WRITE_DOCS=1 writes it"
    assert PAGE.read_text() == text, (
        "DREAMTEACHER_WRITE_DOCS=1 python -m pytest tests/test_recipes.py rewrites it"
    )
    for name in RECIPES:
        assert f"`{name}`" in text or RECIPES[name].make is None
