"""ImageNet-1k as it is downloaded."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from dreamteacher.data.layouts.layout import Layout
from dreamteacher.data.sources import ImageFiles, Part
from dreamteacher.runtime.errors import UserError, shorten

_WNID = re.compile(r"n\d{8}")
_DEVKIT = "ILSVRC2012_devkit_t12/data"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def _images(root: Path, part: Part) -> ImageFiles:
    """Images with labels; class ids follow the sorted WNIDs of train/, as in torchvision and timm.

    A flat val/ takes its labels from LOC_val_solution.csv (the Kaggle set: ImageId, "WNID x y x y ...") or
    from ILSVRC2012_devkit_t12/data (ILSVRC2012_validation_ground_truth.txt: line i is the ILSVRC id of image
    i; meta.mat: ILSVRC id -> WNID; needs scipy).

    Source: the devkit's readme.txt; torchvision.datasets.ImageNet reads the same files.

    Raises:
        UserError: parts are missing, inner tars were not unpacked, counts of images and labels differ.
    """
    inner = root / "ILSVRC" / "Data" / "CLS-LOC"
    data = inner if inner.is_dir() else root
    LAYOUT.need(data, "train", *(("val",) if part == "val" else ()))
    classes = tuple(
        sorted(p.name for p in (data / "train").iterdir() if _WNID.fullmatch(p.name) and p.is_dir())
    )
    packed = sorted(p.name for p in (data / "train").glob("n*.tar"))
    if packed:
        raise LAYOUT.lacks(data, f"{len(packed)} tars in train are not unpacked ({shorten(packed)})")
    if len(classes) < 2:
        raise LAYOUT.lacks(data, f"train has {len(classes)} WNID folders (n01440764 ...)")
    paths = LAYOUT.images_below(data, part)
    flat = part == "val" and all(path.parent == data / "val" for path in paths)
    if flat:
        wnids = _flat_classes(root, data, paths)
    else:
        wnids = [path.relative_to(data / part).parts[0] for path in paths]
    ids = {name: i for i, name in enumerate(classes)}
    strange = sorted({name for name in wnids if name not in ids})
    empty = sorted(set(classes) - set(wnids))
    if strange:
        raise LAYOUT.lacks(data, f"{part} has {len(strange)} classes that train has not ({shorten(strange)})")
    if empty:
        raise LAYOUT.lacks(
            data, f"{len(empty)} of {len(classes)} classes have no images in {part} ({shorten(empty)})"
        )
    LAYOUT.say_count("images", part, len(paths))
    return ImageFiles(folder=data / part, paths=paths, labels=[ids[name] for name in wnids], classes=classes)


def _flat_classes(root: Path, data: Path, paths: list[Path]) -> list[str]:
    """The WNIDs of val/ILSVRC2012_val_00000001.JPEG ..."""
    for place in (root, data):
        if (place / "LOC_val_solution.csv").is_file():
            known = _from_kaggle(place / "LOC_val_solution.csv")
            break
        if (place / _DEVKIT / _TRUTH).is_file():
            known = _from_devkit(place / _DEVKIT)
            break
    else:
        raise LAYOUT.lacks(
            data,
            f"val is flat and there is neither LOC_val_solution.csv nor {_DEVKIT}/{_TRUTH} to say what it shows",
        )
    unlabelled = [path.name for path in paths if path.stem not in known]
    if unlabelled or len(paths) != len(known):
        raise LAYOUT.lacks(
            data,
            f"val has {len(paths)} images for {len(known)} labels"
            + (f", {len(unlabelled)} of them without one ({shorten(unlabelled)})" if unlabelled else ""),
        )
    return [known[path.stem] for path in paths]


def _from_kaggle(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(not row.get("ImageId") or not row.get("PredictionString") for row in rows):
        raise UserError(f"'{path}' has not the columns ImageId and PredictionString.", "Copy it again.")
    return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}


def _from_devkit(folder: Path) -> dict[str, str]:
    wnids = _meta(folder / "meta.mat")
    lines = (folder / _TRUTH).read_text().split()
    try:
        return {f"ILSVRC2012_val_{i:08}": wnids[int(line)] for i, line in enumerate(lines, start=1)}
    except (ValueError, KeyError) as error:
        raise UserError(
            f"'{folder / _TRUTH}' holds {error}, which is no ILSVRC id.", "Unpack it again."
        ) from None


def _meta(path: Path) -> Mapping[int, str]:
    """ILSVRC id -> WNID of the synsets without children, which are the classes."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            "ImageNet's meta.mat needs the library 'scipy'.", "pip install 'dreamteacher[layouts]'"
        ) from None
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
        return {int(number): str(wnid) for number, wnid, children in rows if children == 0}
    except Exception as error:  # damaged MATLAB files fail in many ways
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(
            f"'{path}' cannot be read: {reason}.", "Unpack ILSVRC2012_devkit_t12 again."
        ) from None


LAYOUT = Layout(
    name="imagenet",
    what="ImageNet-1k (ILSVRC 2012)",
    tree="train/WNID/*.JPEG and val/*.JPEG (flat or in WNID folders), or the same in ILSVRC/Data/CLS-LOC",
    get="ILSVRC2012_img_train.tar (unpack its tars too) and ILSVRC2012_img_val.tar from image-net.org, or the Kaggle set",
    counts={"images": (1_281_167, 50_000)},
    images=_images,
)
