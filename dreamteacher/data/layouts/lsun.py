"""LSUN's databases of images."""

from __future__ import annotations

from pathlib import Path

from dreamteacher.data.images import below, find_images
from dreamteacher.data.layouts.layout import Layout
from dreamteacher.data.sources import ImageFiles, Part
from dreamteacher.runtime.errors import UserError


def _images(root: Path, part: Part) -> ImageFiles:
    """Exported images, all of them; folders named CATEGORY_train (and _val) become classes and parts.

    LSUN is released as one LMDB per category, which is not read here: `data.py export` (fyu/lsun) writes the
    images as they are, under folders of the first six letters of their keys or flat.

    Raises:
        UserError: there is an LMDB and no images; nothing at all.
    """
    LAYOUT.need(root)
    if (root / "data.mdb").exists() or any(root.glob("*_lmdb/data.mdb")):
        raise LAYOUT.lacks(root, "it holds the LMDB (data.mdb), not images")
    try:
        paths = find_images(root)
    except UserError:
        raise LAYOUT.lacks(root, "there are no images") from None
    places = [below(root, path).split("/") for path in paths]
    if part == "val" or any(place[0].endswith("_val") for place in places):
        kept = [i for i, place in enumerate(places) if place[0].endswith("_val") == (part == "val")]
        paths, places = [paths[i] for i in kept], [places[i] for i in kept]
        if not paths:
            raise LAYOUT.lacks(root, f"there are no images for {part} (folders CATEGORY_{part})")
    names = [place[0].removesuffix(f"_{part}") for place in places]
    classes = tuple(sorted(set(names)))
    # Folders of one letter are the beginnings of keys, not categories.
    if len(classes) < 2 or any(len(place) == 1 or len(place[0]) == 1 for place in places):
        return ImageFiles(folder=root, paths=paths)
    ids = {name: i for i, name in enumerate(classes)}
    return ImageFiles(folder=root, paths=paths, labels=[ids[name] for name in names], classes=classes)


LAYOUT = Layout(
    name="lsun",
    what="LSUN with its images exported",
    tree="a folder of images, or one such folder per category",
    get="CATEGORY_train_lmdb from the LSUN site, and `data.py export` of the repository fyu/lsun",
    counts={},
    images=_images,
)
