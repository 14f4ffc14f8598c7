"""Images with instances: folders of instance PNGs or COCO JSON, checked before training, of any mixture of sizes.

The mask of an object is kept as its bounding part, so that a picture with hundreds of objects takes the
memory of their areas; it is laid into the whole picture only at the resolution that is trained at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from dreamteacher.data.coco.annotations import CocoImage, Rle, instance_mask, read_coco
from dreamteacher.data.draws import check_draw
from dreamteacher.data.images import (
    BadImageError,
    Size,
    below,
    nearest,
    read_header,
    read_image,
    read_mask,
    to_float,
)
from dreamteacher.data.layouts.table import InstanceFiles, instance_files, layout_of
from dreamteacher.data.masks.pairs import find_pairs
from dreamteacher.data.split import Split, halved
from dreamteacher.downstream.task import Budgets
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.threads import helpers, in_threads

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig

# Batches that are decoded ahead of the one that is trained on.
_AHEAD = 2


class Mask(NamedTuple):
    """Where the pixels of an object lie: the part of the picture that holds them, bool h x w, and its place."""

    top: int
    left: int
    pixels: Tensor

    def whole(self, size: Size) -> Tensor:
        """The mask in a picture of `size`: bool H x W."""
        full = torch.zeros(size, dtype=torch.bool)
        height, width = self.pixels.shape
        full[self.top : self.top + height, self.left : self.left + width] = self.pixels
        return full


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The objects of one image, or what was found in it."""

    boxes: Tensor  # float32 K x 4: left, top, right, bottom in pixels, right > left, bottom > top
    labels: Tensor  # int64 K, 1 for the first class: torchvision's detectors keep 0 for the background
    masks: tuple[Mask, ...]
    crowd: tuple[
        bool, ...
    ] = ()  # regions of many objects, which are neither trained on nor counted; (): no such
    scores: Tensor | None = None  # float32 K, of what was found; None: this is the truth
    outlines: tuple[
        Any, ...
    ] = ()  # K segmentations in COCO's format, if any: the score draws polygons its own way


@dataclass(frozen=True, kw_only=True)
class InstanceSet:
    """Images with their objects, decoded when they are asked for."""

    images: Sequence[Path | Tensor]  # a tensor is uint8 3 x H x W
    sizes: Sequence[Size]  # height and width of each
    counts: Sequence[int]  # objects of each, crowds left out
    truth: Callable[[int], Instances]  # index -> the objects of that image
    classes: tuple[str, ...]  # label 1 is the first

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """uint8 3 x H x W; a UserError where the file is damaged."""
        image = self.images[index]
        if isinstance(image, Tensor):
            return image
        try:
            return read_image(image, None)
        except BadImageError as error:
            raise UserError(f"The image '{image}' cannot be read: {error.reason}.", "Replace it.") from error

    def take(self, index: Tensor) -> InstanceSet:
        """Some of them (int64 K), in this order."""
        chosen = index.tolist()
        names = "images", "sizes", "counts"
        lists: dict[str, Any] = {name: [getattr(self, name)[i] for i in chosen] for name in names}
        return replace(self, **lists, truth=lambda i: self.truth(chosen[i]))

    def shown(self) -> InstanceSet:
        """The images that show an object; nothing is learned from a batch without any."""
        return self.take(torch.tensor([i for i, count in enumerate(self.counts) if count], dtype=torch.int64))


def checked(data: Split[InstanceSet]) -> Split[InstanceSet]:
    """The same; a UserError where the parts have different classes, or one shows no object."""
    if data.pool.classes != data.test.classes:
        differ = sorted(set(data.pool.classes) ^ set(data.test.classes)) or ["their order"]
        raise UserError(
            f"The classes of the training and the test instances differ: {shorten(differ)}.",
            "Give both files the same categories.",
        )
    for part, name in ((data.pool, "training"), (data.test, "test")):
        if not any(part.counts):
            raise UserError(
                f"None of the {len(part)} {name} images shows an object.",
                "Give images with instances: without them there is nothing to learn or to score.",
            )
    return data


def load_instances(images: Path, instances: Path) -> InstanceSet:
    """Images and their objects; everything that is wrong is found here, and counted.

    `instances` is a COCO JSON file whose file names start from `images` (annotations without extent are left
    out, which is said on stderr); or a folder with one PNG per image, of its size and under its name, where
    pixel values (up to 16 bits) are 0 for the background and k for the k-th object. All objects of such a
    folder are of one class; images without a PNG are left out.
    """
    images, instances = Path(images), Path(instances)
    if not instances.exists():
        raise UserError(
            f"There are no instances at '{instances}'.",
            "Give a COCO JSON file, or a folder of instance PNGs.",
        )
    return _load_folder(images, instances) if instances.is_dir() else _load_coco(images, instances)


def load_detection(config: EvaluateConfig, budgets: Budgets) -> Split[InstanceSet]:
    """Training and test images with instances: of a layout, of `load_instances`, or two halves of one."""
    images, instances = config.images, config.instances
    assert images is not None
    if layout_of(images) is not None or instances is None:
        test = instance_files(config.test_images or images, "val")
        data = Split(pool=_of_layout(instance_files(images)), test=_of_layout(test))
    else:
        pool = load_instances(images, instances)
        if config.test_instances is None:
            data = halved(pool)
        else:
            test_images = config.test_images or images
            data = Split(pool=pool, test=load_instances(test_images, config.test_instances))
    check_draw(len(checked(data).pool.shown()), budgets)
    return data


def _of_layout(files: InstanceFiles) -> InstanceSet:
    """The images of one part of a layout; each label file is decoded once, to count what it shows."""

    def image(i: int) -> CocoImage:
        try:
            size = read_header(files.images[i]).size
        except BadImageError as error:
            raise UserError(f"'{error.path}' cannot be read: {error.reason}.", "Replace it.") from None
        return CocoImage(id=i, path=files.images[i], size=size, annotations=files.read(i))

    def counted(i: int) -> tuple[Size, int]:
        found = image(i)
        return found.size, _count(found)

    found = in_threads(counted, range(len(files.images)), 2, "reading instances")
    return InstanceSet(
        images=files.images,
        sizes=[size for size, _ in found],
        counts=[count for _, count in found],
        truth=lambda index: instances_of_coco(image(index)),
        classes=files.names,
    )


def _load_coco(images: Path, path: Path) -> InstanceSet:
    everything = read_coco(path, images, skip_degenerate=True)
    return InstanceSet(
        images=[image.path for image in everything.images],
        sizes=[image.size for image in everything.images],
        counts=[_count(image) for image in everything.images],
        truth=lambda index: instances_of_coco(everything.images[index]),
        classes=everything.names,
    )


def _count(image: CocoImage) -> int:
    return sum(not a.crowd for a in image.annotations)


def _load_folder(images: Path, folder: Path) -> InstanceSet:
    pairs, _ = find_pairs(images, folder)
    if not pairs:
        raise UserError(f"No image of '{images}' has a PNG in '{folder}'.", "Name image and PNG alike.")

    def load(pair: tuple[Path, Path]) -> tuple[Size, Instances] | str:
        name = below(folder, pair[1])
        try:
            size, mask = read_header(pair[0]).size, read_header(pair[1])
            if mask.format not in ("PNG", "TIFF", "BMP") or not (mask.mode in "1LP" or mask.mode[0] == "I"):
                return f"{name} has no numbers of objects ({mask.format}, {mask.mode})"
            if size != mask.size:
                return f"{name} is {_by(mask.size)}, its image {_by(size)}"
            return size, instances_of_ids(read_mask(pair[1], None))
        except BadImageError as error:
            return f"{error.path} ({error.reason})"

    found = in_threads(load, pairs, 2, "reading instances")
    if wrong := [each for each in found if isinstance(each, str)]:
        raise UserError(
            f"{len(wrong)} of {len(pairs)} instance PNGs in '{folder}' cannot be used: {shorten(wrong)}.",
            "Save the number of each pixel's object as grey PNG, 8 or 16 bits, at the size of the image.",
        )
    good = [each for each in found if not isinstance(each, str)]
    return InstanceSet(
        images=[image for image, _ in pairs],
        sizes=[size for size, _ in good],
        counts=[len(objects.masks) for _, objects in good],
        truth=lambda index: good[index][1],
        classes=("object",),
    )


def _by(size: Size) -> str:
    return f"{size[1]} x {size[0]}"


def cut_mask(full: Tensor) -> Mask:
    """The bounding part of a bool mask H x W; nothing where it is empty."""
    rows, columns = full.any(1).nonzero().flatten(), full.any(0).nonzero().flatten()
    if not len(rows):
        return Mask(0, 0, torch.zeros(0, 0, dtype=torch.bool))
    top, left = int(rows[0]), int(columns[0])
    return Mask(top, left, full[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].clone())


def instances_of_ids(ids: Tensor) -> Instances:
    """The objects of a picture of their numbers (int64 H x W, 0 = background), in the order of their numbers.

    Example:
        >>> found = instances_of_ids(torch.tensor([[0, 7, 7], [2, 0, 7]]))
        >>> found.boxes.tolist()
        [[0.0, 1.0, 1.0, 2.0], [1.0, 0.0, 3.0, 2.0]]
    """
    rows, columns = ids.nonzero(as_tuple=True)
    numbers, which = ids[rows, columns].unique(return_inverse=True)
    ends = []
    for place in (columns, rows):
        for how in ("amin", "amax"):
            ends.append(torch.zeros_like(numbers).scatter_reduce(0, which, place, how, include_self=False))
    left, right, top, bottom = ends
    boxes = torch.stack([left, top, right + 1, bottom + 1], dim=1)
    masks = [
        Mask(y0, x0, ids[y0:y1, x0:x1] == number)
        for number, (x0, y0, x1, y1) in zip(numbers.tolist(), boxes.tolist(), strict=True)
    ]
    return Instances(boxes=boxes.float(), labels=torch.ones_like(numbers), masks=tuple(masks))


def instances_of_coco(image: CocoImage) -> Instances:
    """The annotations of an image; boxes are the file's own, cut at the border of the image."""
    height, width = image.size
    boxes = torch.tensor([a.box for a in image.annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
    return Instances(
        boxes=boxes,
        labels=torch.tensor([a.label + 1 for a in image.annotations], dtype=torch.int64),
        masks=tuple(cut_mask(instance_mask(a, image.size)) for a in image.annotations),
        crowd=tuple(a.crowd for a in image.annotations),
        outlines=tuple(
            {"size": list(a.segmentation.size), "counts": list(a.segmentation.counts)}
            if isinstance(a.segmentation, Rle)
            else [list(polygon) for polygon in a.segmentation or ()]
            for a in image.annotations
        ),
    )


class Example(NamedTuple):
    """An image (float32 3 x H x W in [0, 1]) and its objects as torchvision's detectors take them."""

    image: Tensor
    target: dict[str, Tensor]


class Draw(NamedTuple):
    """What is random about an example: which image, how long its shorter side becomes, whether it is mirrored."""

    image: int
    short: int
    mirror: bool


def scaled_size(size: Size, short: int, longest: int) -> Size:
    """`size` scaled so that the shorter side is `short`, or less where the longer would exceed `longest`.

    Example:
        >>> scaled_size((480, 640), 800, 1333), scaled_size((100, 300), 200, 400)
        ((800, 1067), (133, 400))
    """
    scale = min(short / min(size), longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def scaled_image(image: Tensor, size: Size) -> Tensor:
    """uint8 3 x H x W -> float32 in [0, 1] of another size, bilinear and antialiased."""
    return to_float(resize(image, list(size), antialias=True))


def example(data: InstanceSet, draw: Draw, longest: int) -> Example:
    """One image of a set as it is trained on, its longer side bound by `longest`; crowds are left out."""
    image, truth, have = data.image(draw.image), data.truth(draw.image), data.sizes[draw.image]
    size = scaled_size(have, draw.short, longest)
    keep = [i for i in range(len(truth.masks)) if not (truth.crowd and truth.crowd[i])]
    scale = torch.tensor([size[1] / have[1], size[0] / have[0]]).repeat(2)
    boxes = truth.boxes[keep] * scale
    masks = scaled_masks([truth.masks[i] for i in keep], have, size)
    scaled = scaled_image(image, size)
    if draw.mirror:
        scaled, masks = scaled.flip(2), masks.flip(2)
        boxes = torch.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], dim=1)
    return Example(scaled, {"boxes": boxes, "labels": truth.labels[keep], "masks": masks})


def scaled_masks(masks: Sequence[Mask], have: Size, size: Size) -> Tensor:
    """Masks of a picture of size `have` in the scaled picture: uint8 K x H x W, nearest neighbour."""
    result = torch.zeros(len(masks), *size, dtype=torch.uint8)
    ys, xs = (nearest(old, new) for old, new in zip(have, size, strict=True))
    for whole, (top, left, pixels) in zip(result, masks, strict=True):
        rows, columns = (
            slice(*torch.searchsorted(places, torch.tensor([first, first + length])).tolist())
            for places, first, length in zip((ys, xs), (top, left), pixels.shape, strict=True)
        )
        whole[rows, columns] = pixels[(ys[rows] - top)[:, None], xs[columns] - left]
    return result


def example_batches(
    make: Callable[[Draw], Example], draws: Sequence[Sequence[Draw]], workers: int
) -> Iterator[list[Example]]:
    """The batches of these draws, in order; the next ones are made in threads meanwhile."""
    waiting: deque[list[Future[Example]]] = deque()
    with helpers(workers) as pool:
        for batch in draws:
            waiting.append([pool.submit(make, draw) for draw in batch])
            if len(waiting) > _AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
