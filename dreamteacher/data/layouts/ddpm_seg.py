"""DDPM-seg's few labelled images."""

from __future__ import annotations

from pathlib import Path

from dreamteacher.data.images import below
from dreamteacher.data.layouts.layout import Layout, images_below, pairs_by_name
from dreamteacher.data.sources import IGNORED, ImageFiles, MaskFiles, Part


def _ddpm_seg(name: str, train: int, test: int) -> Layout:
    return Layout(
        what=f"DDPM-seg's {name}",
        tree="real/{train,test}/*.png (or .jpg) with *.npy beside them",
        get=f"datasets.tar.gz of the repository yandex-research/ddpm-segmentation; the root is its folder {name}",
        counts={"images": (train, test), "masks": (train, test)},
    )


DDPM_SEG = {
    "bedroom_28": _ddpm_seg("bedroom_28", 40, 20),
    "ffhq_34": _ddpm_seg("ffhq_34", 20, 20),
    "cat_15": _ddpm_seg("cat_15", 30, 20),
    "horse_21": _ddpm_seg("horse_21", 30, 30),
}


_DDPM_PARTS = {"train": "real/train", "val": "real/test"}


# fmt: off
_DDPM_NAMES = {
    "bedroom_28": (
        "bed", "bed footboard", "bed headboard", "bed side rail", "carpet", "ceiling",
        "chandelier or fan blade", "curtain", "cushion", "floor", "table, nightstand or dresser",
        "top of table", "picture or mirror", "pillow", "lamp column", "lamp shade", "wall", "window",
        "curtain rod", "window frame", "chair", "picture frame", "plinth", "door or door frame", "pouf",
        "wardrobe", "plant", "things on table",
    ),
    "ffhq_34": (
        "background", "head", "cheek", "chin", "ear", "ear helix", "ear lobule", "eye bottom lid",
        "eyelashes", "iris", "pupil", "sclera", "tear duct", "eye top lid", "eyebrow", "forehead", "frown",
        "hair", "sideburns", "jaw", "moustache", "inferior lip", "oral commissure", "superior lip", "teeth",
        "neck", "nose", "ala of nose", "nose bridge", "nose tip", "nostril", "philtrum", "temple", "wrinkles",
    ),
    "cat_15": (
        "background", "back", "belly", "chest", "leg", "paw", "head", "ear", "eye", "mouth", "tongue", "nose",
        "tail", "whiskers", "neck",
    ),
    "horse_21": (
        "background", "person", "back", "barrel", "bridle", "chest", "ear", "eye", "forelock", "head", "hoof",
        "leg", "mane", "muzzle", "neck", "nostril", "tail", "thigh", "saddle", "shoulder", "leg protection",
    ),
}


def ddpm_seg_images(name: str, root: Path, part: Part) -> ImageFiles:
    """The images of a set's part ("val" is its real/test).

    Raises:
        UserError: there are none.
    """
    paths = images_below(DDPM_SEG[name], root, _DDPM_PARTS[part])
    DDPM_SEG[name].say_count("images", part, len(paths))
    return ImageFiles(folder=root / _DDPM_PARTS[part], paths=paths)


def ddpm_seg(name: str, root: Path, part: Part) -> MaskFiles:
    """Images with .npy masks; "val" is real/test. Bedroom's background, 0 in the files, does not count.

    Source: yandex-research/ddpm-segmentation, src/datasets.py (x.npy beside x.png), src/data_util.py
    (classes), experiments/*/ddpm.json (29 classes and ignore_label 0 for bedroom_28, else 255).

    Raises:
        UserError: folders, images or masks are missing.
    """
    layout, folder = DDPM_SEG[name], _DDPM_PARTS[part]
    layout.need(root, folder)
    images = {below(root / folder, p.with_suffix("")): p for p in images_below(layout, root, folder)}
    labels = {below(root / folder, p.with_suffix("")): p for p in sorted((root / folder).rglob("*.npy"))}
    pairs = pairs_by_name(layout, root, images, labels, f"{folder} (*.npy)")
    layout.say_count("masks", part, len(pairs))
    names = _DDPM_NAMES[name]
    first = 1 if name == "bedroom_28" else 0
    ids = {0: IGNORED, 255: IGNORED} | {i + first: i for i in range(len(names))}
    return MaskFiles(pairs=pairs, names=names, ids=ids)
