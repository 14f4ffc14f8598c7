"""Images with panoptic segments, of COCO's format or of a layout, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from dreamteacher.data.coco.segments import Scene, parse_panoptic, read_segments
from dreamteacher.data.images import BadImage, BadImageError, read_header, read_image
from dreamteacher.data.sources import PanopticFiles
from dreamteacher.metrics import Segments
from dreamteacher.runtime.errors import UserError, first_line, shorten
from dreamteacher.runtime.threads import in_threads


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

    def take(self, index: Tensor) -> PanopticSet:
        """Some of them (int64 K), in this order."""
        return replace(self, scenes=tuple(self.scenes[i] for i in index.tolist()))


def _of_layout(files: PanopticFiles, scene: Scene) -> Segments:
    try:
        ids, _ = files.read(scene.place)
    except UserError as error:
        raise BadImageError(scene.image, first_line(error, 300)) from None
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
    found = parse_panoptic(Path(path), Path(images), Path(masks))
    _check_files(found.scenes, Path(path), whole, workers)
    return PanopticSet(scenes=found.scenes, names=found.names, things=found.things)


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
