"""COCO-style annotations: read strictly, checked against the image files, drawn as masks of instances."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dreamteacher.data.coco.run_lengths import Rle, decode_counts, polygon_mask, rle_mask
from dreamteacher.data.images import BadImage, BadImageError, Header, Size, read_header
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.threads import in_threads

Box: TypeAlias = tuple[float, float, float, float]
Polygons: TypeAlias = tuple[tuple[float, ...], ...]

_FARTHEST = 1e7  # pixels: products of coordinates stay exact enough, and no image is that large
_LARGEST = 2**53


@dataclass(frozen=True, kw_only=True)
class CocoAnnotation:
    """One object, or one crowd of objects.

    Args:
        id: as in the file.
        label: its class: an index from 0 into the names of the set.
        box: left, top, width, height in pixels.
        area: in pixels, as the file says, or else counted.
        crowd: a region of many objects.
        segmentation: polygons (x1, y1, x2, y2, ...; their union is the object), run lengths, or None where
            only boxes were asked for.
    """

    id: int
    label: int
    box: Box
    area: float
    crowd: bool
    segmentation: Polygons | Rle | None


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """One image file and what is on it.

    Args:
        id: as in the file.
        path: where the image is.
        size: (height, width), the file's own.
        annotations: in the order of the file; may be none.
    """

    id: int
    path: Path
    size: Size
    annotations: tuple[CocoAnnotation, ...]


@dataclass(frozen=True, kw_only=True)
class CocoSet:
    """Images with annotations.

    Args:
        images: in the order of the file.
        names: of the classes, in the order of the file's category ids.
        category_ids: the file's category id of each class.
        left_out: degenerate annotations that were left out.
    """

    images: tuple[CocoImage, ...]
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    left_out: int = 0


def read_coco(path: Path, images: Path, *, masks: bool = True, skip_degenerate: bool = False) -> CocoSet:
    """Reads a JSON file with `images`, `annotations` and `categories`, and checks all of it.

    Args:
        path: the JSON file.
        images: the folder that its file names start from.
        masks: segmentations are needed. False: boxes are needed, and segmentations are not looked at.
        skip_degenerate: annotations without extent (lines, empty masks, outside of the image) are left out,
            which is said on stderr. COCO 2017 has a few. False: they are an error.

    Raises:
        UserError: no such file, not JSON, missing or wrong keys, ids that are taken or not listed, image
            files that are missing or of another size, polygons and run lengths that are none. It counts and
            lists them.
    """
    path, images = Path(path), Path(images)
    content = _load_json(path)
    categories = sorted(_each(path, content, "categories", _category), key=lambda pair: pair[0])
    _refuse_twice(path, "categories", [str(number) for number, _ in categories], "id")
    _refuse_twice(path, "categories", [name for _, name in categories], "name")
    listed = _each(path, content, "images", lambda record: _image(record, images))
    _refuse_twice(path, "images", [str(image.id) for image in listed], "id")
    _refuse_twice(path, "images", [str(image.path.relative_to(images)) for image in listed], "file name")
    _check_files(path, images, listed)

    labels = {number: label for label, (number, _) in enumerate(categories)}
    sizes = {image.id: image.size for image in listed}
    degenerate: list[str] = []

    def parse(record: dict[str, Any]) -> tuple[int, CocoAnnotation] | None:
        try:
            return _annotation(record, sizes, labels, masks)
        except _DegenerateError as flaw:
            if not skip_degenerate:
                raise _FlawError(f"{flaw.kind} (degenerate)", flaw.detail) from None
            degenerate.append(str(record["id"]))
            return None

    found = [pair for pair in _each(path, content, "annotations", parse) if pair is not None]
    _refuse_twice(path, "annotations", [str(annotation.id) for _, annotation in found], "id")
    if degenerate:
        print(
            f"{len(degenerate)} of {len(degenerate) + len(found)} annotations in '{path}' have no extent and "
            f"are left out: {shorten(degenerate)}",
            file=sys.stderr,
        )
    of_image: dict[int, list[CocoAnnotation]] = {image.id: [] for image in listed}
    for image_id, annotation in found:
        of_image[image_id].append(annotation)
    return CocoSet(
        images=tuple(replace(image, annotations=tuple(of_image[image.id])) for image in listed),
        names=tuple(name for _, name in categories),
        category_ids=tuple(labels),
        left_out=len(degenerate),
    )


def instance_mask(annotation: CocoAnnotation, size: Size) -> Tensor:
    """The object as bool H x W, at the size of its image.

    A pixel belongs to a polygon if its centre lies inside (even-odd rule), and to the object if it belongs to
    one of its polygons. pycocotools first rounds the corners to a fifth of a pixel, so it may differ where a
    centre is closer than that to an edge.

    Raises:
        ValueError: the annotation has only a box, or is of an image of another size.
    """
    match annotation.segmentation:
        case None:
            raise ValueError("the annotation was read without its segmentation")
        case Rle() as rle:
            if rle.size != tuple(size):
                raise ValueError(f"a mask of {rle.size} for an image of {tuple(size)}")
            return rle_mask(rle)
        case polygons:
            mask = torch.zeros(size, dtype=torch.bool)
            for polygon in polygons:
                mask |= polygon_mask(polygon, size)
            return mask


# --- the file -----------------------------------------------------------------------------------------------


class _FlawError(Exception):
    """What is wrong with one record (the same words for all such records), and what came."""

    def __init__(self, kind: str, detail: object = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = " ".join(str(detail).split())[:60]


class _DegenerateError(_FlawError):
    """The record is well-formed, but there is nothing to see."""


def _load_json(path: Path) -> dict[str, list[Any]]:
    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no number")

    try:
        content = json.loads(path.read_bytes(), parse_constant=no_number)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.", "Give the JSON file.") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shorten([str(error)])
        raise UserError(
            f"'{path}' is not JSON: {reason}.", "Is it whole? Give a file in COCO's format."
        ) from None
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        kind = (
            f"a dictionary of {shorten(repr(key)[:40] for key in content)}"
            if isinstance(content, dict)
            else "none"
        )
        raise UserError(
            f"'{path}' is not in COCO's format: a dictionary with the lists 'images', 'annotations' and "
            f"'categories' was expected, and it is {kind}.",
            "Export it as COCO JSON (instances).",
        )
    return content


def _each(
    path: Path, content: dict[str, list[Any]], part: str, parse: Callable[[dict[str, Any]], Any]
) -> list[Any]:
    """Every record of a part, parsed; all that are wrong are counted and some of them listed."""
    records = content[part]
    if not records:
        raise UserError(f"'{path}' has no {part}.", "Give a file that has some.")
    good: list[Any] = []
    flaws: dict[str, list[str]] = {}
    for i, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise _FlawError("no dictionary")
            _integer(record, "id")
            good.append(parse(record))
        except _FlawError as flaw:
            known = (
                isinstance(record, dict) and type(record.get("id")) is int and abs(record["id"]) < _LARGEST
            )
            name = f"id {record['id']}" if known else f"no. {i + 1}"
            flaws.setdefault(flaw.kind, []).append(f"{name} {flaw.detail}".rstrip())
    if flaws:
        total = sum(map(len, flaws.values()))
        kinds = sorted(flaws.items(), key=lambda item: -len(item[1]))
        text = [f"{len(names)} {kind} ({shorten(names, 2)})" for kind, names in kinds]
        raise UserError(
            f"{total} of {len(records)} {part} in '{path}' cannot be used: {'; '.join(text[:4])}"
            + (f"; and {len(text) - 4} other kinds." if len(text) > 4 else "."),
            "Mend or remove them.",
        )
    return good


def _refuse_twice(path: Path, part: str, keys: list[str], what: str) -> None:
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        twice = [key for key in keys if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        raise UserError(
            f"{len(twice)} {part} in '{path}' have {'an' if what == 'id' else 'a'} {what} that is taken: "
            f"{shorten(twice)}.",
            "Give each its own.",
        )


def _check_files(path: Path, folder: Path, images: Sequence[CocoImage]) -> None:
    """Image files are there, readable, and of the size that the JSON says."""

    def check(image: CocoImage) -> Header | BadImage:
        try:
            return read_header(image.path)
        except BadImageError as error:
            return BadImage(image.path, error.reason)

    found = in_threads(check, images, 2, "checking images")
    bad = [f"{b.path.relative_to(folder)} ({b.reason})" for b in found if isinstance(b, BadImage)]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(images)} images of '{path}' cannot be read in '{folder}': {shorten(bad)}.",
            "Give the folder that the file names start from, with all of the images.",
        )
    differ = [
        f"{image.path.relative_to(folder)} {_by(image.size)}, the file {_by(header.size)}"
        for image, header in zip(images, found, strict=True)
        if isinstance(header, Header) and header.size != image.size
    ]
    if differ:
        raise UserError(
            f"{len(differ)} of {len(images)} images have another size in '{path}' than their file (upright): "
            f"{shorten(differ)}.",
            "Were the images scaled or turned after they were annotated? Give those that were annotated.",
        )


def _by(size: Size) -> str:
    return f"{size[1]} x {size[0]}"


# --- records ------------------------------------------------------------------------------------------------


def _value(record: dict[str, Any], key: str) -> Any:
    if record.get(key) is None:
        raise _FlawError(f"without '{key}'")
    return record[key]


def _integer(record: dict[str, Any], key: str) -> int:
    value = _value(record, key)
    if type(value) is not int or abs(value) >= _LARGEST:
        raise _FlawError(f"whose '{key}' is no whole number")
    return value


def _text(record: dict[str, Any], key: str) -> str:
    value = _value(record, key)
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise _FlawError(f"whose '{key}' is no plain text")
    return value


def _numbers(values: Any, key: str) -> tuple[float, ...]:
    if not isinstance(values, list) or any(type(v) not in (int, float) for v in values):
        raise _FlawError(f"whose '{key}' holds other things than numbers")
    if any(not abs(v) <= _FARTHEST for v in values):
        raise _FlawError(f"whose '{key}' lies far outside of the image")
    return tuple(map(float, values))


def _category(record: dict[str, Any]) -> tuple[int, str]:
    return _integer(record, "id"), _text(record, "name")


def _image(record: dict[str, Any], folder: Path) -> CocoImage:
    name = _text(record, "file_name")
    inner = PurePosixPath(name)
    if inner.is_absolute() or ".." in inner.parts or Path(name).is_absolute():
        raise _FlawError("whose 'file_name' leads out of the folder", name)
    size = _integer(record, "height"), _integer(record, "width")
    if min(size) < 1:
        raise _FlawError("without extent", _by(size))
    return CocoImage(id=_integer(record, "id"), path=folder / name, size=size, annotations=())


def _annotation(
    record: dict[str, Any], sizes: dict[int, Size], labels: dict[int, int], masks: bool
) -> tuple[int, CocoAnnotation]:
    """The id of the image, and the annotation."""
    image_id, category_id = _integer(record, "image_id"), _integer(record, "category_id")
    if image_id not in sizes:
        raise _FlawError("of images that are not listed", f"(image {image_id})")
    if category_id not in labels:
        raise _FlawError("of categories that are not listed", f"(category {category_id})")
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise _FlawError("whose 'iscrowd' is neither 0 nor 1")
    size = sizes[image_id]
    annotation = CocoAnnotation(
        id=_integer(record, "id"),
        label=labels[category_id],
        box=(0.0, 0.0, 0.0, 0.0),
        area=0.0,
        crowd=bool(crowd),
        segmentation=_segmentation(record, size) if masks else None,
    )
    if record.get("bbox") is None and masks:
        box = _box_of(annotation, size)
    else:
        box = _box(_value(record, "bbox"), size)
    area = record.get("area")
    if area is None:
        area = float(instance_mask(annotation, size).sum()) if masks else box[2] * box[3]
    if type(area) not in (int, float) or not 0 <= area < 1e18:
        raise _FlawError("whose 'area' is no area")
    return image_id, replace(annotation, box=box, area=float(area))


def _box(value: Any, size: Size) -> Box:
    numbers = _numbers(value, "bbox")
    if len(numbers) != 4:
        raise _FlawError("whose 'bbox' has not four numbers")
    left, top, width, height = numbers
    if width < 0 or height < 0:
        raise _FlawError("whose 'bbox' is negative")
    if not width or not height:
        raise _DegenerateError("whose 'bbox' has no extent")
    if left >= size[1] or top >= size[0] or left + width <= 0 or top + height <= 0:
        raise _DegenerateError("whose 'bbox' is outside of the image")
    return left, top, width, height


def _box_of(annotation: CocoAnnotation, size: Size) -> Box:
    mask = instance_mask(annotation, size)
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    if not rows:
        raise _DegenerateError("that cover no pixel")
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] + 1 - columns[0]),
        float(rows[-1] + 1 - rows[0]),
    )


def _segmentation(record: dict[str, Any], size: Size) -> Polygons | Rle:
    value = _value(record, "segmentation")
    if isinstance(value, dict):
        return _rle(value, size)
    if not isinstance(value, list):
        raise _FlawError("whose 'segmentation' is neither polygons nor run lengths")
    if not value:
        raise _FlawError("without 'segmentation'")
    return tuple(_polygon(points, size) for points in value)


def _polygon(value: Any, size: Size) -> tuple[float, ...]:
    points = _numbers(value, "segmentation")
    if len(points) % 2:
        raise _FlawError("with half a point in a polygon")
    if len(points) < 6:
        raise _DegenerateError("with a polygon of fewer than 3 points")
    xs, ys = points[::2], points[1::2]
    if min(xs) >= size[1] or min(ys) >= size[0] or max(xs) <= 0 or max(ys) <= 0:
        raise _DegenerateError("with a polygon outside of the image")
    x, y = xs[0], ys[0]
    dx, dy = max(((a - x, b - y) for a, b in zip(xs, ys, strict=True)), key=lambda d: d[0] ** 2 + d[1] ** 2)
    across = max(abs(dx * (b - y) - dy * (a - x)) for a, b in zip(xs, ys, strict=True))
    if across <= 1e-9 * (dx * dx + dy * dy):
        raise _DegenerateError("with a polygon that is a line")
    return points


def _rle(value: dict[str, Any], size: Size) -> Rle:
    if value.get("size") != list(size):
        raise _FlawError("whose run lengths are of another size than the image")
    counts = value.get("counts")
    try:
        if isinstance(counts, str):
            counts = decode_counts(counts)
        elif not isinstance(counts, list) or any(type(c) is not int for c in counts):
            raise ValueError("neither text nor whole numbers")
    except ValueError as error:
        raise _FlawError("with damaged run lengths", f"({error})") from None
    if any(c < 0 for c in counts) or sum(counts) != size[0] * size[1]:
        raise _FlawError("whose run lengths do not fill the image")
    if not sum(counts[1::2]):
        raise _DegenerateError("that cover no pixel")
    return Rle(size=size, counts=tuple(counts))
