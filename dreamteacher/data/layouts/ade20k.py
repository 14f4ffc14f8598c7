"""ADE20K as it is downloaded."""

from __future__ import annotations

from pathlib import Path

from dreamteacher.data.layouts.layout import Layout
from dreamteacher.data.sources import IGNORED, ImageFiles, MaskFiles, Part
from dreamteacher.runtime.errors import UserError

_PARTS = {"train": "training", "val": "validation"}


def _images(root: Path, part: Part) -> ImageFiles:
    """The images of ADEChallengeData2016.

    Raises:
        UserError: there are none.
    """
    folder = f"images/{_PARTS[part]}"
    paths = LAYOUT.images_below(root, folder)
    LAYOUT.say_count("images", part, len(paths))
    return ImageFiles(folder=root / folder, paths=paths)


def _masks(root: Path, part: Part) -> MaskFiles:
    """150 classes; 0 in the files is "other objects", which do not count, and k is class k - 1.

    Names come from objectInfo150.txt, which lies in the same archive; without it they are numbers.

    Source: CSAILVision/sceneparsing, README ("annotations masks contain labels ranging from 0 to 150").

    Raises:
        UserError: folders, images or masks are missing.
    """
    images, labels = f"images/{_PARTS[part]}", f"annotations/{_PARTS[part]}"
    pairs = LAYOUT.same_names(root, images, labels)
    LAYOUT.say_count("masks", part, len(pairs))
    ids = {0: IGNORED} | {k: k - 1 for k in range(1, 151)}
    return MaskFiles(pairs=pairs, names=_names(root / "objectInfo150.txt"), ids=ids)


def _names(path: Path) -> tuple[str, ...]:
    """The first word for each class, in the fifth column of the table (Idx, Ratio, Train, Val, Name)."""
    if not path.is_file():
        return tuple(f"class {i}" for i in range(150))
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    names = tuple(row[4].split(",")[0].strip() for row in rows if len(row) == 5)
    if len(names) != 150:
        raise UserError(f"'{path}' names {len(names)} classes, not 150.", "Unpack it again, or remove it.")
    return names


LAYOUT = Layout(
    name="ade20k",
    what="ADE20K (ADEChallengeData2016)",
    tree="images/{training,validation}/*.jpg and annotations/{training,validation}/*.png",
    get="ADEChallengeData2016.zip from the MIT Scene Parsing Benchmark (150 classes; not the full ADE20K)",
    counts={"images": (20_210, 2_000), "masks": (20_210, 2_000)},
    images=_images,
    masks=_masks,
)
