"""FFHQ as it is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from dreamteacher.data.images import below
from dreamteacher.data.layouts.layout import Layout
from dreamteacher.data.sources import ImageFiles, Part
from dreamteacher.runtime.errors import shorten


def _images(root: Path, part: Part) -> ImageFiles:
    """All 70,000 images, for either part: StyleGAN's authors trained on all.

    Source: NVlabs/ffhq-dataset, README (folders of a thousand, five-digit names, numbered without gaps).

    Raises:
        UserError: no images, other names than NNNNN/NNNNN.png, gaps in the numbers.
    """
    LAYOUT.need(root)
    inner = [name for name in ("images1024x1024", "thumbnails128x128") if (root / name).is_dir()]
    folder = root / inner[0] if inner else root
    paths = LAYOUT.images_below(folder, ".")
    names = [below(folder, path) for path in paths]
    strange = [name for name in names if not re.fullmatch(r"\d{5}/\d{5}\.png", name)]
    if strange:
        raise LAYOUT.lacks(
            folder, f"{len(strange)} of {len(names)} images have other names ({shorten(strange)})"
        )
    numbers = {int(name[6:11]) for name in names}
    gaps = [f"{i - i % 1000:05}/{i:05}.png" for i in range(max(numbers)) if i not in numbers]
    if gaps:
        raise LAYOUT.lacks(folder, f"{len(gaps)} of {max(numbers) + 1} images are missing ({shorten(gaps)})")
    LAYOUT.say_count("images", part, len(paths))
    return ImageFiles(folder=folder, paths=paths)


LAYOUT = Layout(
    name="ffhq",
    what="FFHQ",
    tree="images1024x1024/00000/00000.png ... (or thumbnails128x128, or the numbered folders themselves)",
    get="images1024x1024 or thumbnails128x128 of NVlabs' ffhq-dataset",
    counts={"images": (70_000, 70_000)},
    images=_images,
    parts=("train",),
)
