"""COCO as it is downloaded."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dreamteacher.data.coco.annotations import read_coco
from dreamteacher.data.coco.segments import parse_panoptic, segment_numbers
from dreamteacher.data.images import read_channels
from dreamteacher.data.layouts.label_maps import read_label
from dreamteacher.data.layouts.layout import Layout
from dreamteacher.data.sources import ImageFiles, InstanceFiles, PanopticFiles, Part, Segment
from dreamteacher.runtime.errors import UserError, shorten


def _images(root: Path, part: Part) -> ImageFiles:
    """The images of train2017 or val2017.

    Raises:
        UserError: there are none.
    """
    paths = LAYOUT.images_below(root, f"{part}2017")
    LAYOUT.say_count("images", part, len(paths))
    return ImageFiles(folder=root / f"{part}2017", paths=paths)


def _instances(root: Path, part: Part) -> InstanceFiles:
    """80 classes, in the order of their category ids (1 to 90 with gaps); images without objects are kept.

    Source: COCO's "Data format"; the file is read by `data.coco.annotations.read_coco`, which checks it against the images.

    Raises:
        UserError: files are missing; anything wrong in the JSON file.
    """
    name = f"annotations/instances_{part}2017.json"
    LAYOUT.need(root, f"{part}2017", name)
    found = read_coco(root / name, root / f"{part}2017", skip_degenerate=True)
    LAYOUT.say_count("instances", part, len(found.images))
    images = tuple(image.path for image in found.images)
    return InstanceFiles(images=images, names=found.names, read=lambda i: found.images[i].annotations)


def _panoptic(root: Path, part: Part) -> PanopticFiles:
    """133 classes, in the order of their category ids; a PNG's segment id is R + 256 G + 65536 B.

    Source: COCO's "Data format", panoptic; cocodataset/panopticapi, utils.rgb2id.

    Raises:
        UserError: files are missing, names lead out of their folder, records do not fit together.
    """
    stem = f"annotations/panoptic_{part}2017"
    if (root / f"{stem}.zip").is_file() and not (root / stem).is_dir():
        raise LAYOUT.lacks(root, f"{stem}.zip is not unpacked")
    LAYOUT.need(root, f"{part}2017", f"{stem}.json", stem)
    path = root / f"{stem}.json"
    parsed = parse_panoptic(path, root / f"{part}2017", root / stem)
    images = tuple(scene.image for scene in parsed.scenes)
    masks = tuple(scene.mask for scene in parsed.scenes)
    for kind, paths in (("images", images), ("PNG files", masks)):
        gone = [p.name for p in paths if not p.is_file()]
        if gone:
            raise LAYOUT.lacks(
                root, f"{len(gone)} of {len(paths)} {kind} of {path.name} are missing ({shorten(gone)})"
            )
    if len(images) != parsed.images:
        raise LAYOUT.lacks(root, f"{path.name} has {len(images)} annotations for {parsed.images} images")
    LAYOUT.say_count("panoptic", part, len(images))

    def read(i: int) -> tuple[Tensor, tuple[Segment, ...]]:
        ids, scene = segment_numbers(read_label(masks[i], read_channels)[:3]), parsed.scenes[i]
        have, listed = set(ids.unique().tolist()) - {0}, set(scene.classes)
        if have != listed:
            raise UserError(
                f"'{masks[i]}' and '{path.name}' differ in the segments {shorten(map(str, sorted(have ^ listed)))}.",
                "Unpack both again: they must be of one release.",
            )
        found = (Segment(id=n, label=c, crowd=n in scene.crowds) for n, c in scene.classes.items())
        return ids, tuple(found)

    return PanopticFiles(images=images, names=parsed.names, things=parsed.things, read=read)


LAYOUT = Layout(
    name="coco",
    what="COCO 2017",
    tree="{train,val}2017/*.jpg, annotations/{instances,panoptic}_{train,val}2017.json and annotations/panoptic_*2017/*.png",
    get="train2017.zip, val2017.zip, annotations_trainval2017.zip, panoptic_annotations_trainval2017.zip from the COCO site",
    counts=dict.fromkeys(("images", "instances", "panoptic"), (118_287, 5_000)),
    images=_images,
    instances=_instances,
    panoptic=_panoptic,
)
