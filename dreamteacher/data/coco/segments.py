"""COCO's panoptic format: a JSON file and one PNG of segment numbers per image, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor

from dreamteacher.data.images import BadImageError, read_image
from dreamteacher.metrics import VOID, Segments
from dreamteacher.runtime.errors import UserError, shorten


class Scene(NamedTuple):
    """One image, its PNG, and the segments on it: number -> class id, and which of them are crowds.

    Of a layout, `place` says where it is in there; then `mask` is of no use.
    """

    image: Path
    mask: Path
    classes: dict[int, int]
    crowds: frozenset[int]
    place: int = 0


class PanopticJson(NamedTuple):
    """What a file says: scenes in its order, classes in the order of its category ids, and how many images it lists."""

    scenes: tuple[Scene, ...]
    names: tuple[str, ...]
    things: tuple[bool, ...]
    images: int


def segment_numbers(colours: Tensor) -> Tensor:
    """R + 256 G + 65536 B of a uint8 picture 3 x H x W: int64 H x W.

    Example:
        >>> import torch
        >>> segment_numbers(torch.tensor([[[7]], [[1]], [[0]]], dtype=torch.uint8)).tolist()
        [[263]]
    """
    red, green, blue = colours.long()
    return red + 256 * green + 65536 * blue


def read_segments(scene: Scene) -> Segments:
    """The segments of an image.

    Raises:
        BadImageError: the PNG cannot be read, or has numbers that the JSON has not.
    """
    ids = segment_numbers(read_image(scene.mask, None))
    unknown = set(ids.unique().tolist()) - set(scene.classes) - {VOID}
    if unknown:
        some = shorten(map(str, sorted(unknown)))
        raise BadImageError(scene.mask, f"segments that the JSON does not list: {some}")
    return Segments(ids=ids, classes=scene.classes, crowds=scene.crowds)


def parse_panoptic(path: Path, images: Path, masks: Path) -> PanopticJson:
    """Reads a JSON file with `images`, `annotations` and `categories`; looks at no other file.

    Args:
        path: the JSON file.
        images: the folder that the file names of its images start from.
        masks: the folder that the file names of its annotations (PNG) start from.

    Raises:
        UserError: no such file, or not of this format; it counts and lists the records that are wrong.
    """
    content = _load(path)
    flaws: list[str] = []

    def each(part: str, parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
        found = []
        for i, record in enumerate(content[part]):
            try:
                found.append(parse(record))
            except (KeyError, TypeError, ValueError) as error:
                flaws.append(f"{part}[{i}]: {_words(error)}")
        return found

    categories = sorted(each("categories", _category))
    classes = {number: i for i, (number, _, _) in enumerate(categories)}
    files = dict(each("images", lambda r: (_whole(r, "id"), _inside(images, r["file_name"]))))
    scenes = each("annotations", lambda r: _scene(r, files, masks, classes))
    for part, count in (("categories", len(classes)), ("images", len(files)), ("annotations", len(scenes))):
        if count < len(content[part]) and not flaws:
            flaws.append(f"{part}: an id is taken twice")
    if len({scene.image for scene in scenes}) < len(scenes):
        flaws.append("annotations: two of one image")
    if flaws or not scenes or len(classes) < 2:
        raise UserError(
            f"'{path}' cannot be used: {shorten(flaws) or 'too few annotations or categories'}.",
            "Give a JSON file in COCO's panoptic format (segments_info, isthing), without these records.",
        )
    names, things = tuple(name for _, name, _ in categories), tuple(thing for _, _, thing in categories)
    return PanopticJson(tuple(scenes), names, things, len(files))


def _load(path: Path) -> dict[str, list[Any]]:
    parts = ("images", "annotations", "categories")
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.", "Give the JSON file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON: {str(error)[:80]}.", "Is it whole?") from None
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        raise UserError(
            f"'{path}' is not in COCO's panoptic format: it has no lists {', '.join(parts)}.",
            "Give for example panoptic_val2017.json.",
        )
    return content


def _words(error: Exception) -> str:
    missing = isinstance(error, KeyError) and error.args and isinstance(error.args[0], str)
    return f"no '{error.args[0]}'" if missing else str(error)[:60]


def _whole(record: dict[str, Any], key: str) -> int:
    if type(record[key]) is not int or record[key] < 0:
        raise ValueError(f"'{key}' is no whole number")
    return record[key]


def _inside(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError("'file_name' is no plain text")
    absolute = PurePosixPath(name).is_absolute() or Path(name).is_absolute()
    if absolute or ".." in PurePosixPath(name).parts or "\\" in name:
        raise ValueError(f"'file_name' leads out of the folder: {name[:40]}")
    return folder / name


def _category(record: dict[str, Any]) -> tuple[int, str, bool]:
    if not isinstance(record["name"], str) or record["isthing"] not in (0, 1):
        raise ValueError("'name' is no text, or 'isthing' neither 0 nor 1")
    return _whole(record, "id"), record["name"], bool(record["isthing"])


def _scene(record: dict[str, Any], files: dict[int, Path], masks: Path, classes: dict[int, int]) -> Scene:
    image_id = _whole(record, "image_id")
    if image_id not in files:
        raise ValueError(f"image {image_id} is not listed")
    found: dict[int, int] = {}
    crowds = set()
    for info in record["segments_info"]:
        number, category = _whole(info, "id"), _whole(info, "category_id")
        if category not in classes:
            raise ValueError(f"category {category} is not listed")
        if number in found or number == VOID:
            raise ValueError(f"segment {number} is taken, or 0")
        if info.get("iscrowd", 0) not in (0, 1):
            raise ValueError("'iscrowd' is neither 0 nor 1")
        found[number] = classes[category]
        if info.get("iscrowd", 0):
            crowds.add(number)
    mask = _inside(masks, record["file_name"])
    return Scene(image=files[image_id], mask=mask, classes=found, crowds=frozenset(crowds))
