"""COCO's average precision of boxes and masks, through faster-coco-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from dreamteacher.data.images import Size
from dreamteacher.downstream.detection.data import Instances
from dreamteacher.downstream.tasks import Metric
from dreamteacher.runtime.errors import UserError

Kind = Literal["box", "mask"]


def check_scores() -> tuple[Any, Any, Any]:
    """COCO, COCOeval_faster and the module of run lengths; a UserError where they are missing."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
        from faster_coco_eval.core import mask
    except ImportError:
        raise UserError(
            "The scores of detection need faster-coco-eval, which is not installed.",
            "pip install 'dreamteacher[coco]'",
        ) from None
    return COCO, COCOeval_faster, mask


def average_precision(
    truth: Sequence[Instances],
    found: Sequence[Instances],
    sizes: Sequence[Size],
    *,
    classes: int,
    kind: Kind,
    most: int = 100,
) -> tuple[float, ...]:
    """AP (mean over IoU 0.50 to 0.95 in steps of 0.05), AP at IoU 0.50, and AP at IoU 0.75; each in [0, 1].

    The mean over the classes that occur in the truth of the precision at 101 recalls; what lies on a crowd is
    neither right nor wrong. Of an image with (height, width) `sizes` the best `most` detections count, COCO's
    number is 100. Parity with pycocotools: `tests/downstream/detection/test_scores.py`. Source:
    https://cocodataset.org/#detection-eval.

    Raises:
        UserError: faster-coco-eval is not installed.
        ValueError: there is no object that counts.
    """
    coco, evaluation, run_lengths = check_scores()
    if not any(len(t.masks) > sum(t.crowd) for t in truth):
        raise ValueError("the truth holds no object")
    if not any(len(f.masks) for f in found):
        return 0.0, 0.0, 0.0
    images = [{"id": i + 1, "height": h, "width": w} for i, (h, w) in enumerate(sizes)]
    records = [
        [
            row
            for i, (part, size) in enumerate(zip(parts, sizes, strict=True), start=1)
            for row in _records(part, i, size, kind, run_lengths)
        ]
        for parts in (truth, found)
    ]
    for rows in records:
        for number, row in enumerate(rows, start=1):
            row["id"] = number
    categories = [{"id": c + 1, "name": str(c + 1)} for c in range(classes)]
    there = coco({"images": images, "annotations": records[0], "categories": categories})
    given = there.loadRes(records[1])
    scored = evaluation(there, given, iouType="bbox" if kind == "box" else "segm", rle_iou_max_workers=1)
    scored.params.maxDets = [1, 10, most]
    scored.evaluate()
    scored.accumulate()
    precision = scored.eval["precision"][:, :, :, 0, -1]  # IoU x recall x class, of any area; -1: no truth
    return tuple(float(p[p > -1].mean()) for p in (precision, precision[:1], precision[5:6]))


def _records(
    instances: Instances, image: int, size: Size, kind: Kind, run_lengths: Any
) -> Iterator[dict[str, Any]]:
    """COCO's records of an image, without their ids."""
    corners = instances.boxes.tolist()
    for i, ((x0, y0, x1, y1), mask) in enumerate(zip(corners, instances.masks, strict=True)):
        record: dict[str, Any] = {
            "image_id": image,
            "category_id": int(instances.labels[i]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": float(mask.pixels.sum()) if kind == "mask" else (x1 - x0) * (y1 - y0),
            "iscrowd": int(bool(instances.crowd and instances.crowd[i])),
        }
        if instances.scores is not None:
            record["score"] = float(instances.scores[i])
        if kind == "mask":
            outline = instances.outlines[i] if instances.outlines else None
            whole = mask.whole(size).byte().t().contiguous().t()  # Fortran's order
            record["segmentation"] = outline or run_lengths.encode(whole.numpy())
        yield record


def scores_of(
    truth: Sequence[Instances],
    found: Sequence[Instances],
    sizes: Sequence[Size],
    *,
    classes: int,
    most: int = 100,
) -> Iterator[Metric]:
    """box_ap, box_ap50, box_ap75, mask_ap, mask_ap50, mask_ap75; arguments as of `average_precision`."""
    kinds: tuple[Kind, ...] = ("box", "mask")
    for kind in kinds:
        values = average_precision(truth, found, sizes, classes=classes, kind=kind, most=most)
        for name, value in zip(("ap", "ap50", "ap75"), values, strict=True):
            yield f"{kind}_{name}", value
