"""COCO-panoptic annotations: a JSON file and one PNG of segment numbers per image, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor

from dreamteacher.errors import UserError, shorten
from dreamteacher.images import BadImage, BadImageError, in_threads, read_header, read_image
from dreamteacher.layouts_objects import PanopticFiles
from dreamteacher.metrics_panoptic import VOID, Segments


class Scene(NamedTuple):
    """One image, its PNG, and the segments on it: number -> class id, and which of them are crowds.

    Of a layout, `place` says where it is in there; then `mask` is of no use.
    """

    image: Path
    mask: Path
    classes: dict[int, int]
    crowds: frozenset[int]
    place: int = 0


@dataclass(frozen=True, kw_only=True)
class PanopticSet:
    """Images with segments, decoded when they are asked for.

    Args:
        scenes: in the order of the file.
        names: of the classes, in the order of the file's category ids.
        things: whether a class has countable objects (else it is stuff: sky, road).
        layout: what reads the maps of segments, where it is not the PNGs of COCO's format.
    """

    scenes: tuple[Scene, ...]
    names: tuple[str, ...]
    things: tuple[bool, ...]
    layout: PanopticFiles | None = None

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> tuple[Tensor, Segments]:
        """An image, uint8 3 x H x W, and its segments.

        Raises:
            BadImageError: one of the files cannot be read, or the PNG has numbers that the JSON has not.
        """
        scene = self.scenes[index]
        image = read_image(scene.image, None)
        return image, read_segments(scene) if self.layout is None else _of_layout(self.layout, scene)

    def shown(self) -> list[int]:
        """Indices of the images that show a thing which is no crowd."""
        return [
            i
            for i, scene in enumerate(self.scenes)
            if any(self.things[c] and number not in scene.crowds for number, c in scene.classes.items())
        ]

    def subset(self, indices: Sequence[int]) -> PanopticSet:
        """These images, in this order."""
        return replace(self, scenes=tuple(self.scenes[i] for i in indices))


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


def _of_layout(files: PanopticFiles, scene: Scene) -> Segments:
    try:
        ids, _ = files.read(scene.place)
    except UserError as error:
        raise BadImageError(scene.image, str(error).splitlines()[0]) from None
    return Segments(ids=ids, classes=scene.classes, crowds=scene.crowds)


def of_layout(files: PanopticFiles, *, workers: int = 2) -> PanopticSet:
    """The images of a layout (see `layouts.panoptic_files`); each map is decoded once, to know what it shows.

    Args:
        files: of one part.
        workers: threads.

    Raises:
        UserError: a label file is damaged, or an image's header.
    """

    def scene(i: int) -> Scene:
        _, found = files.read(i)
        try:
            read_header(files.images[i])
        except BadImageError as error:
            raise UserError(f"'{error.path}' cannot be read: {error.reason}.", "Replace it.") from None
        crowds = frozenset(segment.id for segment in found if segment.crowd)
        classes = {segment.id: segment.label for segment in found}
        return Scene(files.images[i], files.images[i], classes, crowds, i)

    scenes = in_threads(scene, range(len(files.images)), workers, "reading segments")
    return PanopticSet(scenes=tuple(scenes), names=files.names, things=files.things, layout=files)


def read_panoptic(
    path: Path, images: Path, masks: Path, *, whole: bool = False, workers: int = 2
) -> PanopticSet:
    """Reads a JSON file with `images`, `annotations` and `categories`, and checks it against the files.

    Args:
        path: the JSON file.
        images: the folder that the file names of its images start from.
        masks: the folder that the file names of its annotations (PNG) start from.
        whole: decode all files, for a test set; else headers are read.
        workers: threads.

    Raises:
        UserError: no such file, not of this format, or image files that are missing, damaged or of another
            size. It counts and lists them.
    """
    content = _load(Path(path))
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
    files = dict(each("images", lambda r: (_whole(r, "id"), _inside(Path(images), r["file_name"]))))
    scenes = each("annotations", lambda r: _scene(r, files, Path(masks), classes))
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
    _check_files(scenes, Path(path), whole, workers)
    return PanopticSet(
        scenes=tuple(scenes),
        names=tuple(name for _, name, _ in categories),
        things=tuple(thing for _, _, thing in categories),
    )


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
    if PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in PurePosixPath(name).parts:
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


def _check_files(scenes: Sequence[Scene], path: Path, whole: bool, workers: int) -> None:
    def check(scene: Scene) -> BadImage | None:
        try:
            image, mask = read_header(scene.image), read_header(scene.mask)
            if mask.format != "PNG" or mask.mode != "RGB":
                return BadImage(scene.mask, f"no RGB PNG but {mask.format}, {mask.mode}")
            if image.size != mask.size:
                return BadImage(
                    scene.mask,
                    f"{mask.size[1]} x {mask.size[0]}, its image {image.size[1]} x {image.size[0]}",
                )
            if whole:
                read_image(scene.image, None)
                read_segments(scene)
        except BadImageError as error:
            return BadImage(error.path, error.reason)
        return None

    bad = [b for b in in_threads(check, scenes, workers, "checking segments") if b is not None]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(scenes)} images or PNGs of '{path}' cannot be used: "
            f"{shorten(f'{b.path} ({b.reason})' for b in bad)}.",
            "Give the folders that the file names start from, with all of their files.",
        )
