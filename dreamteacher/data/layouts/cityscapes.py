"""Layouts of semantic segmentation: ADE20K, Cityscapes, BDD100K and DDPM-seg's four sets."""

from __future__ import annotations

from pathlib import Path

from dreamteacher.data.images import below
from dreamteacher.data.layouts.layout import (
    IGNORED,
    ImageFiles,
    Layout,
    MaskFiles,
    Part,
    images_below,
    pairs_by_name,
)
from dreamteacher.runtime.errors import UserError

ADE20K = Layout(
    what="ADE20K (ADEChallengeData2016)",
    tree="images/{training,validation}/*.jpg and annotations/{training,validation}/*.png",
    get="ADEChallengeData2016.zip from the MIT Scene Parsing Benchmark (150 classes; not the full ADE20K)",
    counts={"images": (20_210, 2_000), "masks": (20_210, 2_000)},
)
CITYSCAPES = Layout(
    what="Cityscapes",
    tree="leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
    get="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from the Cityscapes site",
    counts=dict.fromkeys(("images", "masks", "instances", "panoptic"), (2_975, 500)),
)
BDD100K = Layout(
    what="BDD100K",
    tree="images/{100k,10k}/{train,val}/*.jpg, labels/sem_seg/masks, labels/{ins_seg,pan_seg}/bitmasks/{train,val}/*.png",
    get="100K Images, 10K Images, and Semantic, Instance or Panoptic Segmentation from the BDD100K portal",
    counts={"images": (70_000, 10_000)} | dict.fromkeys(("masks", "instances", "panoptic"), (7_000, 1_000)),
)

# The 19 classes that count, in the order of their train ids, and their ids in the files.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# fmt: off
STREET = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
# fmt: on
# Value in *_labelIds.png -> train id; 34 ids, the other 15 do not count.
CITYSCAPES_TRAIN_IDS = dict.fromkeys(range(34), IGNORED) | {v: i for i, v in enumerate(_CITYSCAPES_IDS)}


def ade20k_images(root: Path, part: Part) -> ImageFiles:
    """The images of ADEChallengeData2016.

    Raises:
        UserError: there are none.
    """
    folder = f"images/{_ADE_PARTS[part]}"
    paths = images_below(ADE20K, root, folder)
    ADE20K.say_count("images", part, len(paths))
    return ImageFiles(folder=root / folder, paths=paths)


def ade20k(root: Path, part: Part) -> MaskFiles:
    """150 classes; 0 in the files is "other objects", which do not count, and k is class k - 1.

    Names come from objectInfo150.txt, which lies in the same archive; without it they are numbers.

    Source: CSAILVision/sceneparsing, README ("annotations masks contain labels ranging from 0 to 150").

    Raises:
        UserError: folders, images or masks are missing.
    """
    images, labels = f"images/{_ADE_PARTS[part]}", f"annotations/{_ADE_PARTS[part]}"
    pairs = _same_names(ADE20K, root, images, labels)
    ADE20K.say_count("masks", part, len(pairs))
    ids = {0: IGNORED} | {k: k - 1 for k in range(1, 151)}
    return MaskFiles(pairs=pairs, names=_ade_names(root / "objectInfo150.txt"), ids=ids)


_ADE_PARTS = {"train": "training", "val": "validation"}


def _ade_names(path: Path) -> tuple[str, ...]:
    """The first word for each class, in the fifth column of the table (Idx, Ratio, Train, Val, Name)."""
    if not path.is_file():
        return tuple(f"class {i}" for i in range(150))
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    names = tuple(row[4].split(",")[0].strip() for row in rows if len(row) == 5)
    if len(names) != 150:
        raise UserError(f"'{path}' names {len(names)} classes, not 150.", "Unpack it again, or remove it.")
    return names


def cityscapes_images(root: Path, part: Part) -> ImageFiles:
    """The left images of all cities of a part.

    Raises:
        UserError: there are none.
    """
    paths = images_below(CITYSCAPES, root, f"leftImg8bit/{part}")
    CITYSCAPES.say_count("images", part, len(paths))
    return ImageFiles(folder=root / "leftImg8bit" / part, paths=paths)


def cityscapes(root: Path, part: Part) -> MaskFiles:
    """The 19 classes of the benchmark, by train id; *_labelIds.png as downloaded, no conversion is needed.

    `layouts_files.label_fraction` draws 1/4, 1/8, 1/30 of the labels by a seed.

    Source: mcordts/cityscapesScripts, README and helpers/labels.py (ids 0 to 33, the train ids of 19 of
    them).

    Raises:
        UserError: folders, images or masks are missing.
    """
    pairs = cityscapes_pairs(root, part, "labelIds")
    CITYSCAPES.say_count("masks", part, len(pairs))
    return MaskFiles(pairs=pairs, names=STREET, ids=CITYSCAPES_TRAIN_IDS)


def cityscapes_pairs(root: Path, part: Part, kind: str) -> tuple[tuple[Path, Path], ...]:
    """(image, *_gtFine_KIND.png) of a part; kinds: labelIds, instanceIds.

    Raises:
        UserError: folders, images or label files are missing.
    """
    folder = f"gtFine/{part}"
    CITYSCAPES.need(root, f"leftImg8bit/{part}", folder)
    ends = ("_leftImg8bit.png", f"_gtFine_{kind}.png")
    found = (images_below(CITYSCAPES, root, f"leftImg8bit/{part}"), images_below(CITYSCAPES, root, folder))
    images, labels = (
        {below(root, p).split("/", 2)[2].removesuffix(end): p for p in paths if p.name.endswith(end)}
        for paths, end in zip(found, ends, strict=True)
    )
    if not images:
        raise CITYSCAPES.lacks(root, f"no image in leftImg8bit/{part} is named *{ends[0]}")
    return pairs_by_name(CITYSCAPES, root, images, labels, f"{folder} (*{ends[1]})")


def bdd100k_images(root: Path, part: Part) -> ImageFiles:
    """The 100K images, on which this method pretrains; not the 10K that have masks.

    Raises:
        UserError: there are none.
    """
    paths = images_below(BDD100K, root, f"images/100k/{part}")
    BDD100K.say_count("images", part, len(paths))
    return ImageFiles(folder=root / "images" / "100k" / part, paths=paths)


def bdd100k(root: Path, part: Part) -> MaskFiles:
    """Cityscapes' 19 classes by train id, 255 for unknown; the 10K images.

    Source: doc.bdd100k.com, "Data Download" and "Label Format" (current layout). Older archives (seg/labels,
    *_train_id.png) are not read, and older 10K images lack some of the labelled ones (bdd100k/bdd100k #127).

    Raises:
        UserError: folders, images or masks are missing.
    """
    pairs = _same_names(BDD100K, root, f"images/10k/{part}", f"labels/sem_seg/masks/{part}")
    BDD100K.say_count("masks", part, len(pairs))
    return MaskFiles(pairs=pairs, names=STREET, ids={i: i for i in range(19)} | {255: IGNORED})


def _same_names(layout: Layout, root: Path, images: str, labels: str) -> tuple[tuple[Path, Path], ...]:
    """Pairs of two flat folders whose files differ in their suffix alone."""
    layout.need(root, images, labels)
    one, two = ({p.stem: p for p in images_below(layout, root, folder)} for folder in (images, labels))
    return pairs_by_name(layout, root, one, two, labels)


def bdd100k_pairs(root: Path, part: Part, kind: str) -> tuple[tuple[Path, Path], ...]:
    """(image, RGBA bitmask) of a part; kinds: ins_seg, pan_seg.

    Raises:
        UserError: folders, images or bitmasks are missing.
    """
    return _same_names(BDD100K, root, f"images/10k/{part}", f"labels/{kind}/bitmasks/{part}")


# --- DDPM-seg -----------------------------------------------------------------------------------------------


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
# fmt: on


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
