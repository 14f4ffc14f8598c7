"""Recipes of the paper's teachers, interpreters and pretrainings (arXiv 2307.07487, appendix, Table 16 and text)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dreamteacher.distill.config import Mode, PretrainConfig, TrainInterpreterConfig
from dreamteacher.recipes_row import DATA, Places, Recipe
from dreamteacher.teachers.training.config import PresetName, TrainTeacherConfig

WORKERS = 16  # processes that decode, for a machine with a GPU
# Of ImageNet: teacher -> (name in recipes, what is not stated of it).
GENERATORS = {
    "adm": ("adm-imagenet-256-uncond", ""),
    "sd": (
        "sd-1.4",
        "T, prompt, layers and input size are not stated: T 150, empty prompt, images enlarged x2",
    ),
    "icgan": (
        "icgan-256",
        "layers are not stated; it draws like images of a bank, which `get-teacher` makes",
    ),
    "biggan": ("bigbigan-128", "layers and size are not stated: 128 x 128, so there is no map at stride 32"),
}
# Label-efficient sets: images, labelled images, teacher.
SETS = {
    "bedroom": ("lsun/bedroom", "bedroom_28", "adm-lsun-bedroom"),
    "ffhq": ("ffhq", "ffhq_34", "adm-ffhq"),
    "cat": ("lsun/cat", "cat_15", "adm-lsun-cat"),
    "horse": ("lsun/horse", "horse_21", "adm-lsun-horse"),
}
VARIANTS: tuple[tuple[str, Mode], ...] = (
    ("resnet101", "mixed"),
    ("convnext_base", "mixed"),
    ("convnext_base", "feature"),
    ("convnext_base", "label"),
)
TIMESTEPS = (50, 150, 250, 350)
_SHORT = "the ablations' length is not stated: 600 epochs, as for the other rows"
# Ablations in the domain of BDD100K: name -> (teacher, what, changed settings, note).
ABLATIONS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    **{
        f"t{t}": ("adm", f"features at T = {t}", {"t": (t,)}, _SHORT) for t in TIMESTEPS if t != 50
    },
    "ddim": ("adm", "deterministic encoding (DDIM inversion)", {"noise": "inversion"}, f"10 steps of DDIM; {_SHORT}"),
    "mse": ("stylegan2", "without attention transfer", {"at_weight": 0.0}, f"the teacher is not stated; {_SHORT}"),
    "at": (
        "stylegan2", "attention transfer alone", {"at_weight": 1e5},
        f"the MSE keeps a weight of 1e-5 beside it, which AdamW hardly sees; the teacher is not stated; {_SHORT}",
    ),
}  # fmt: skip


def _row(
    name: str, what: str, make: Callable[[Places], Any], data: str, teacher: str, *needs: str, note: str = ""
) -> Recipe:
    return Recipe(
        name=name, table="pretraining", what=what, make=make, data=(data,), teacher=teacher, needs=needs, note=note
    )  # fmt: skip


def train_teacher(preset: PresetName) -> Recipe:
    """A generator of BDD100K, which the authors trained and never released (Table 16)."""
    name = f"teacher-{preset}"

    def make(places: Places) -> TrainTeacherConfig:
        return TrainTeacherConfig(
            images=places.at("bdd100k"), out=places.run(name), preset=preset, workers=WORKERS
        )

    return _row(name, f"the preset {preset} on BDD100K", make, "bdd100k", preset)


def pretrain_imagenet(student: str, generator: str) -> Recipe:
    """ImageNet at 256 x 256: LAMB 4e-3, batch 2048, 200 epochs, 30 of warm-up; T = 150."""
    name = f"pretrain-imagenet-{student}-{generator}"
    teacher, note = GENERATORS[generator]
    encoded = generator in ("adm", "sd")

    def make(places: Places) -> PretrainConfig:
        source: dict[str, Any] = {"images": places.at("imagenet"), "t": (150,)}
        samples: dict[str, Any] = {"dataset": "synthesized", "samples": DATA["imagenet"].images}
        return PretrainConfig(
            out=places.run(name), teacher=teacher, student=student, optimizer="lamb", lr=4e-3, batch_size=2048,
            accumulate=8 if student == "resnet50" else 16, epochs=200, warmup_epochs=30, workers=WORKERS,
            **(source if encoded else samples),
        )  # fmt: skip

    if not encoded:
        note += "; samples of an epoch are not stated: as many as ImageNet has images"
    note += "; " * bool(note) + "the main text implies a learning rate of 1.6e-3"
    return _row(name, f"{student} on ImageNet, taught by {teacher}", make, "imagenet", teacher, note=note)


def pretrain_bdd100k(generator: str, variant: str = "") -> Recipe:
    """BDD100K: AdamW 4e-3, batch 256, 600 epochs, 30 of warm-up; 128 x 256 and T = 50 (ADM), 512 x 1024 (StyleGAN2)."""
    before = f"teacher-{generator}-bdd100k"
    name = f"pretrain-bdd100k-resnet50-{generator}{variant and '-'}{variant}"
    _, what, changes, note = ABLATIONS.get(variant, ("", "", {}, ""))

    def make(places: Places) -> PretrainConfig:
        source: dict[str, Any] = {"images": places.at("bdd100k"), "t": (50,)}
        samples: dict[str, Any] = {
            "dataset": "synthesized",
            "samples": DATA["bdd100k"].images,
            "accumulate": 8,
        }
        settings = {**(source if generator == "adm" else samples), **changes}
        return PretrainConfig(
            out=places.run(name), teacher=str(places.run(before)), epochs=600, warmup_epochs=30, workers=WORKERS,
            **settings,
        )  # fmt: skip

    if generator == "stylegan2" and not note:
        note = "samples of an epoch are not stated: as many as BDD100K has images"
    return _row(
        name, f"resnet50 on BDD100K, taught by its {generator}{what and ', '}{what}", make, "bdd100k",
        f"{generator}-bdd100k", before, note=note,
    )  # fmt: skip


def train_interpreter(short: str) -> Recipe:
    """The interpreter of a label-efficient set: AdamW 4e-3, 100 epochs, 20 of warm-up; T = 50."""
    _, labelled, teacher = SETS[short]
    name = f"interpreter-{short}"

    def make(places: Places) -> TrainInterpreterConfig:
        return TrainInterpreterConfig(
            images=places.at(labelled), out=places.run(name), teacher=teacher, t=(50,)
        )

    note = "its batch size is not stated: 4"
    return _row(
        name, f"{teacher}'s interpreter of {DATA[labelled].labels} images", make, labelled, teacher, note=note
    )


def pretrain_label_efficient(short: str, student: str, mode: Mode) -> Recipe:
    """LSUN and FFHQ at 256 x 256: AdamW 4e-3, batch 256, 100 epochs, 20 of warm-up; T = 50."""
    images, _, teacher = SETS[short]
    name = f"pretrain-{short}-{student}-{mode}"
    before = () if mode == "feature" else (f"interpreter-{short}",)

    def make(places: Places) -> PretrainConfig:
        return PretrainConfig(
            images=places.at(images), out=places.run(name), teacher=teacher, student=student, mode=mode, t=(50,),
            interpreter=places.run(before[0]) if before else None, accumulate=2, workers=WORKERS,
        )  # fmt: skip

    note = "" if short == "ffhq" else "how many images of LSUN were used is not stated: all"
    what = f"{student} on {DATA[images].title}, {mode}, taught by {teacher}"
    return _row(name, what, make, images, teacher, *before, note=note)


def pretraining_recipes() -> Iterator[Recipe]:
    """All of them, each after what it needs."""
    yield train_teacher("adm-bdd100k")
    yield train_teacher("stylegan2-bdd100k")
    for generator in GENERATORS:
        yield pretrain_imagenet("resnet50", generator)
    yield pretrain_imagenet("convnext_base", "adm")
    yield pretrain_bdd100k("adm")
    yield pretrain_bdd100k("stylegan2")
    for variant, (generator, *_) in ABLATIONS.items():
        yield pretrain_bdd100k(generator, variant)
    for short in SETS:
        yield train_interpreter(short)
        for student, mode in VARIANTS:
            yield pretrain_label_efficient(short, student, mode)
