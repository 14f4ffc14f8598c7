"""How each of the four sets of DDPM-seg's archive lies on the disk."""

from __future__ import annotations

from pathlib import Path

from dreamteacher.data.images import below
from dreamteacher.data.layouts.layout import Layout
from dreamteacher.data.sources import IGNORED, ImageFiles, MaskFiles, Part

_PARTS = {"train": "real/train", "val": "real/test"}


def few_labels(
    name: str, names: tuple[str, ...], *, images: tuple[int, int], background_counts: bool = True
) -> Layout:
    """The layout of one set: images with .npy masks; its validation part is real/test.

    Source: yandex-research/ddpm-segmentation, src/datasets.py (x.npy beside x.png), src/data_util.py
    (classes), experiments/*/ddpm.json (29 classes and ignore_label 0 for bedroom_28, else 255).

    Args:
        name: the folder in the archive.
        names: of the classes, in id order.
        images: for training and to test on.
        background_counts: 0 in the files is the first class; else it is no class, and k is class k - 1.
    """

    def read_images(root: Path, part: Part) -> ImageFiles:
        paths = layout.images_below(root, _PARTS[part])
        layout.say_count("images", part, len(paths))
        return ImageFiles(folder=root / _PARTS[part], paths=paths)

    def read_masks(root: Path, part: Part) -> MaskFiles:
        folder = _PARTS[part]
        layout.need(root, folder)
        pictures = {below(root / folder, p.with_suffix("")): p for p in layout.images_below(root, folder)}
        labels = {below(root / folder, p.with_suffix("")): p for p in sorted((root / folder).rglob("*.npy"))}
        pairs = layout.pairs_by_name(root, pictures, labels, f"{folder} (*.npy)")
        layout.say_count("masks", part, len(pairs))
        first = 0 if background_counts else 1
        ids = {0: IGNORED, 255: IGNORED} | {i + first: i for i in range(len(names))}
        return MaskFiles(pairs=pairs, names=names, ids=ids)

    layout = Layout(
        name=name,
        what=f"DDPM-seg's {name}",
        tree="real/{train,test}/*.png (or .jpg) with *.npy beside them",
        get=f"datasets.tar.gz of the repository yandex-research/ddpm-segmentation; the root is its folder {name}",
        counts={"images": images, "masks": images},
        images=read_images,
        masks=read_masks,
    )
    return layout
