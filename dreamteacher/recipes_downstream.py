"""Recipes of the paper's downstream numbers, and the numbers of other methods that stand beside them.

Source: arXiv 2307.07487, tables and appendix. Baselines that are ImageNet-supervised or untrained are recipes too;
other methods' numbers are listed as the paper prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dreamteacher.downstream.presets import preset_config
from dreamteacher.recipes_pretraining import ABLATIONS, SETS, TIMESTEPS, VARIANTS, WORKERS
from dreamteacher.recipes_row import DATA, Config, Places, Recipe

Numbers = tuple[tuple[str, float], ...]
RN50, CONVNEXT = "pretrain-imagenet-resnet50-adm", "pretrain-imagenet-convnext_base-adm"
BDD = "pretrain-bdd100k-resnet50-"


class Beside(NamedTuple):
    """A number of a method that is not ours: the table, the method, what is measured and how much."""

    table: str
    method: str
    expected: Numbers


def _numbers(names: str, *values: float) -> Numbers:
    return tuple(zip(names.split(", "), values, strict=True))


def _ap(box: float, mask: float) -> Numbers:
    return _numbers("box AP, mask AP", box, mask)


def _fractions(*values: float) -> Numbers:
    return _numbers("mIoU of 1/4, 1/8, 1/30", *values)


def _row(
    name: str, table: str, what: str, expected: Numbers, preset: str, data: str, begin: str, *,
    student: str = "resnet50", note: str = "", **settings: Any,
) -> Recipe:  # fmt: skip
    """A row that evaluates a pretraining (`begin` is its recipe), or `begin` = random or imagenet."""
    needs = () if begin in ("random", "imagenet") else (begin,)

    def make(places: Places) -> Config:
        return preset_config(
            preset, student=student, init=str(places.run(begin)) if needs else begin, out=places.run(name),
            workers=WORKERS, **_data(preset, data, places), **settings,
        )  # fmt: skip

    return Recipe(
        name=name, table=table, what=what, expected=expected, make=make, data=(data,), needs=needs, note=note
    )  # fmt: skip


def _data(preset: str, data: str, places: Places) -> dict[str, Path]:
    if preset in ("imagenet-a2", "imagenet-convnext", "imagenet-linear"):
        return {"train": places.at(data)}
    if preset == "readout":
        root = places.data / data
        names = {"images": "train", "masks": "train-masks", "test_images": "test", "test_masks": "test-masks"}
        return {key: root / name for key, name in names.items()}
    return {"images": places.at(data)}


def _imagenet() -> Iterator[Recipe]:
    fine, frozen = "ImageNet, fine-tuned", "ImageNet, frozen"
    top1 = "top-1"
    yield _row(
        "imagenet-resnet50-adm", fine, "ResNet-50, ADM", ((top1, 80.2),), "imagenet-a2", "imagenet", RN50
    )
    yield _row(
        "imagenet-convnext_base-adm", fine, "ConvNeXt-B, ADM", ((top1, 83.9),), "imagenet-convnext", "imagenet", CONVNEXT,
        student="convnext_base",
    )  # fmt: skip
    yield _row(
        "linear-resnet50-adm", frozen, "ResNet-50, ADM, linear probe", ((top1, 63.9),), "imagenet-linear", "imagenet", RN50
    )  # fmt: skip
    yield _row(
        "readout-resnet50-adm", frozen, "ResNet-50, ADM, foreground and background", (("read-out", 79.3),), "readout",
        "fgbg", RN50, binary_masks=True,
        note="the masks are not stated: images and black and white masks in train, train-masks, test, test-masks",
    )  # fmt: skip


def _coco() -> Iterator[Recipe]:
    rn50, convnext = "COCO, ResNet-50, Mask R-CNN", "COCO, ConvNeXt-B, Cascade Mask R-CNN"
    yield _row("coco-resnet50-adm", rn50, "1x, ADM", _ap(44.1, 40.1), "coco-1x", "coco", RN50)
    yield _row("coco-resnet50-adm-2x", rn50, "2x, ADM", _ap(45.1, 40.8), "coco-2x", "coco", RN50)
    yield _row(
        "coco-resnet50-supervised",
        rn50,
        "1x, ImageNet-supervised",
        _ap(38.9, 35.4),
        "coco-1x",
        "coco",
        "imagenet",
    )
    for begin, how, numbers in (
        (CONVNEXT, "adm", _ap(52.5, 45.2)),
        ("imagenet", "supervised", _ap(51.2, 44.3)),
    ):
        yield _row(
            f"coco-convnext_base-{how}", convnext, f"1x, {_HOW[how]}", numbers, "coco-cascade-1x", "coco", begin,
            student="convnext_base", note="only the 12 epochs are stated: the rest is ConvNeXt's own",
        )  # fmt: skip
    for generator, numbers in (
        ("sd", _ap(43.3, 39.4)),
        ("icgan", _ap(40.0, 36.5)),
        ("biggan", _ap(40.7, 36.9)),
    ):
        yield _row(
            f"coco-resnet50-{generator}", "generators, COCO", f"1x, {_HOW[generator]}", numbers, "coco-1x", "coco",
            f"pretrain-imagenet-resnet50-{generator}",
        )  # fmt: skip


_HOW = {
    "adm": "ADM", "sd": "Stable Diffusion 1.4", "icgan": "ICGAN", "biggan": "unconditional BigGAN",
    "stylegan2": "StyleGAN2", "supervised": "ImageNet-supervised", "random": "random init",
}  # fmt: skip


def _ade20k() -> Iterator[Recipe]:
    note = "optimizer, crops and auxiliary head are not stated: MMSegmentation's usual ones"
    rows = (("adm", 42.5), ("supervised", 40.9), ("sd", 41.4), ("icgan", 41.2), ("biggan", 40.8))
    for how, miou in rows:
        begin = "imagenet" if how == "supervised" else f"pretrain-imagenet-resnet50-{how}"
        table = "ADE20K, ResNet-50" if how in ("adm", "supervised") else "generators, ADE20K"
        yield _row(
            f"ade20k-resnet50-{how}", table, f"UPerNet, {_HOW[how]}", (("mIoU", miou),), "ade20k", "ade20k", begin, note=note
        )  # fmt: skip


def _bdd100k() -> Iterator[Recipe]:
    ours = "BDD100K, ImageNet pretraining"
    yield _row(
        "bdd100k-instance-resnet50-adm-imagenet",
        ours,
        "instances, ADM",
        _ap(28.3, 24.8),
        "bdd100k-instance",
        "bdd100k",
        RN50,
    )
    name = "bdd100k-instance-resnet50-supervised"
    yield _row(
        name,
        ours,
        "instances, ImageNet-supervised",
        _ap(26.1, 20.2),
        "bdd100k-instance",
        "bdd100k",
        "imagenet",
    )
    inside = "BDD100K, in-domain"
    rows = {"adm": (_ap(26.7, 22.9), 60.3, 21.8), "stylegan2": (_ap(25.1, 21.4), 59.7, 21.5)}
    for generator, (ap, miou, pq) in rows.items():
        begin, what = BDD + generator, _HOW[generator]
        for task, numbers in (("instance", ap), ("semantic", (("mIoU", miou),)), ("panoptic", (("PQ", pq),))):
            name = f"bdd100k-{task}-resnet50-{generator}"
            yield _row(name, inside, f"{task}, {what}", numbers, f"bdd100k-{task}", "bdd100k", begin)
    for task, numbers in (("semantic", (("mIoU", 61.1),)), ("panoptic", (("PQ", 22.4),))):
        name = f"bdd100k-{task}-resnet50-supervised"
        yield _row(
            name, inside, f"{task}, ImageNet-supervised", numbers, f"bdd100k-{task}", "bdd100k", "imagenet"
        )


def _cityscapes() -> Iterator[Recipe]:
    rows = {
        "adm": (BDD + "adm", 77.5, (63.9, 60.0, 50.0)),
        "supervised": ("imagenet", 78.7, (71.3, 65.4, 54.4)),
        "random": ("random", 70.9, (41.8, 40.7, 36.7)),
    }
    table = "Cityscapes, after BDD100K"
    note = "which generator taught it is not stated: ADM; optimizer, crops and batch are usual ones"
    for how, (begin, whole, parts) in rows.items():
        more = note if how == "adm" else note.partition("; ")[2]
        name, what = f"cityscapes-resnet50-{how}", f"UPerNet, {_HOW[how]}"
        yield _row(
            name,
            table,
            f"{what}, all labels",
            (("mIoU", whole),),
            "cityscapes",
            "cityscapes",
            begin,
            note=more,
        )
        yield _row(
            f"{name}-fractions", table, f"{what}, 744, 372, 100 labels", _fractions(*parts), "cityscapes-fractions",
            "cityscapes", begin, note=more,
        )  # fmt: skip


def _label_efficient() -> Iterator[Recipe]:
    ours = {
        ("resnet101", "mixed"): (49.9, 59.4, 56.7, 65.9),
        ("convnext_base", "mixed"): (54.8, 61.2, 58.6, 67.6),
        ("convnext_base", "feature"): (53.1, 61.1, 58.2, 64.7),
        ("convnext_base", "label"): (54.6, 61.3, 58.4, 64.4),
        ("convnext_base", "supervised"): (41.0, 59.2, 47.3, 56.0),
    }
    note = "batch size and learning rate are not stated: ours"
    for place, (short, (_, labelled, _)) in enumerate(SETS.items()):
        for student, how in (*VARIANTS, ("convnext_base", "supervised")):
            begin = "imagenet" if how == "supervised" else f"pretrain-{short}-{student}-{how}"
            yield _row(
                f"label-efficient-{short}-{student}-{how}", "label-efficient", f"{labelled}, {student}, {_HOW.get(how, how)}",
                (("mIoU", ours[student, how][place]),), "label-efficient", labelled, begin, student=student,
                mask_counts=(DATA[labelled].labels,), neck=how in ("mixed", "label"), note=note,
            )  # fmt: skip


def _ablations() -> Iterator[Recipe]:
    def row(name: str, what: str, numbers: Numbers, begin: str, note: str) -> Recipe:
        return _row(
            f"ablation-{name}", "ablations, BDD100K instances", what, numbers, "bdd100k-instance", "bdd100k", begin,
            note=note,
        )  # fmt: skip

    short = (
        "length and teacher of the ablations are not stated; the main rows do better with the same settings"
    )
    by_t = dict(
        zip(TIMESTEPS, (_ap(23.8, 20.4), _ap(23.9, 20.6), _ap(24.4, 21.1), _ap(23.4, 20.1)), strict=True)
    )
    for t, numbers in by_t.items():
        begin = BDD + ("adm" if t == 50 else f"adm-t{t}")
        yield row(f"t{t}", f"T = {t}", numbers, begin, short)
    yield row("stochastic", "fresh noise", _ap(24.3, 21.1), BDD + "adm", f"T is not stated: 50; {short}")
    yield row("ddim", "DDIM inversion", _ap(23.4, 20.8), BDD + "adm-ddim", f"T is not stated: 50; {short}")
    yield row("mse", "MSE alone", _ap(23.6, 20.3), BDD + "stylegan2-mse", ABLATIONS["mse"][3])
    yield row("at", "attention transfer alone", _ap(22.3, 19.3), BDD + "stylegan2-at", ABLATIONS["at"][3])
    yield row("mse-at", "both losses", _ap(25.0, 21.6), BDD + "stylegan2", short)
    yield row(
        "fpn-ppm",
        "FPN and PPM",
        _ap(25.1, 21.4),
        BDD + "stylegan2",
        "the numbers are those of the StyleGAN2 row",
    )
    missing = (
        ("fpn", "FPN alone", 23.6, 20.3),
        ("fpn-attention", "FPN and attention", 23.9, 20.7),
        ("pafpn", "PaFPN", 24.0, 20.8),
    )
    for name, what, box, mask in missing:
        yield Recipe(
            name=f"ablation-{name}", table="ablations, BDD100K instances", what=f"regressor: {what}",
            expected=_ap(box, mask), make=None, data=("bdd100k",), note="the regressor is FPN with PPM, and no other",
        )  # fmt: skip


def downstream_recipes() -> Iterator[Recipe]:
    """All of them, by table."""
    for rows in (_coco, _imagenet, _ade20k, _bdd100k, _cityscapes, _label_efficient, _ablations):
        yield from rows()


def _beside() -> Iterator[Beside]:
    yield Beside("COCO, ResNet-50, Mask R-CNN", "SparK, 1x", _ap(41.6, 37.7))
    yield Beside("COCO, ConvNeXt-B, Cascade Mask R-CNN", "SparK", _ap(51.9, 44.6))
    for method, top1 in (("SparK, ResNet-50", 80.6), ("BYOL, ResNet-50", 80.0), ("SparK, ConvNeXt-B", 84.8)):
        yield Beside("ImageNet, fine-tuned", method, (("top-1", top1),))
    for method, top1 in (("BYOL", 71.7), ("SwAV", 70.4), ("MoCo v2", 67.5), ("SparK", 54.1)):
        yield Beside("ImageNet, frozen", f"{method}, linear probe", (("top-1", top1),))
    yield Beside("ImageNet, frozen", "DenseCL", (("read-out", 76.5),))
    methods = ("SimCLR", "MoCo v2", "BYOL", "PixPro", "SparK")
    for method, miou in zip(methods, (39.9, 40.9, 41.6, 41.6, 40.5), strict=True):
        yield Beside("ADE20K, ResNet-50", method, (("mIoU", miou),))
    boxes, masks = (24.5, 26.9, 26.2, 27.2, 25.7), (20.6, 22.9, 22.6, 23.1, 22.4)
    for method, box, mask in zip(methods, boxes, masks, strict=True):
        yield Beside("BDD100K, ImageNet pretraining", method, _ap(box, mask))
    for method, numbers in (("BYOL", (23.9, 20.0, 58.4, 20.9)), ("SparK", (24.4, 20.6, 56.9, 20.2))):
        yield Beside("BDD100K, in-domain", method, _numbers("box AP, mask AP, mIoU, PQ", *numbers))
    for method, numbers in (("BYOL", (73.7, 54.3, 49.9, 44.4)), ("SparK", (75.7, 61.2, 56.0, 45.3))):
        yield Beside("Cityscapes, after BDD100K", method, (("mIoU", numbers[0]), *_fractions(*numbers[1:])))
    for method, numbers in (
        ("MAE, ViT-L", (45.0, 58.8, 52.4, 63.4)), ("DatasetGAN", (31.3, 57.0, 36.5, 45.4)),
        ("DatasetDDPM", (47.9, 56.0, 47.6, 60.8)), ("DDPM-seg", (49.4, 59.1, 53.7, 65.0)),
    ):  # fmt: skip
        yield Beside("label-efficient", method, _numbers(", ".join(SETS), *numbers))


BESIDE: tuple[Beside, ...] = tuple(_beside())
