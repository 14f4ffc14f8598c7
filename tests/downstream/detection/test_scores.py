"""The scores of COCO by hand, against pycocotools, and without the library."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest
import torch

from dreamteacher.data.split import Split
from dreamteacher.downstream.detection.data import (
    Instances,
    Mask,
    cut_mask,
)
from dreamteacher.downstream.detection.scores import average_precision
from tests.builders.pictures import refused
from tests.builders.squares import TINY, scenes
from tests.builders.students import run_task

# pycocotools 2.0.11 decodes into an array that numpy 2 finds old-fashioned.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# --- scores -------------------------------------------------------------------------------------------------


def boxes_only(boxes: list[list[float]], scores: list[float] | None = None, size: int = 16) -> Instances:
    """Objects of class 1 whose masks fill their (whole-numbered) boxes."""
    masks = tuple(
        Mask(int(b[1]), int(b[0]), torch.ones(int(b[3] - b[1]), int(b[2] - b[0])).bool()) for b in boxes
    )
    found = None if scores is None else torch.tensor(scores)
    return Instances(
        boxes=torch.tensor(boxes), labels=torch.ones(len(boxes)).long(), masks=masks, scores=found
    )


def test_average_precision_against_a_hand_calculation():
    """Two objects. The best detection is exact, the second a miss, the third has IoU 0.6 with the other object.

    At IoU 0.50, 0.55 and 0.60 the precision is 1 up to recall 0.5 (51 of 101 recalls) and 2/3 beyond (50); at the
    seven higher ones it is 1 up to recall 0.5 and 0 beyond.
    """
    truth = boxes_only([[0.0, 0, 4, 4], [8, 8, 12, 13]])
    found = boxes_only([[0.0, 0, 4, 4], [0, 8, 4, 12], [8, 8, 12, 11]], [0.9, 0.8, 0.7])
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    for kind in ("box", "mask"):
        ap, ap50, ap75 = average_precision([truth], [found], [(16, 16)], classes=1, kind=kind)
        assert ap50 == pytest.approx(low, abs=1e-9)
        assert ap75 == pytest.approx(high, abs=1e-9)
        assert ap == pytest.approx((3 * low + 7 * high) / 10, abs=1e-9)


def test_average_precision_of_nothing_found():
    truth = boxes_only([[0.0, 0, 4, 4]])
    assert average_precision([truth], [boxes_only([], [])], [(16, 16)], classes=1, kind="mask") == (0, 0, 0)
    with pytest.raises(ValueError, match="no object"):
        average_precision([boxes_only([])], [truth], [(16, 16)], classes=1, kind="box")


def random_instances(
    generator: torch.Generator, size: tuple[int, int], classes: int, like: Instances | None = None
) -> Instances:
    """Random blobs; with `like`, shifted and rescored versions of those and some of their own."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    masks, labels = [], []
    for mask, label in zip(like.masks, like.labels.tolist(), strict=True) if like else ():
        for _ in range(draw(0, 3)):
            moved = mask.whole(size).roll((draw(-1, 2), draw(-1, 2)), (0, 1))
            masks.append(cut_mask(moved & (torch.rand(size, generator=generator) < 0.99)))
            labels.append(label if draw(0, 8) else draw(1, classes + 1))
    for _ in range(draw(2, 5)):
        h, w = draw(4, 14), draw(4, 14)
        top, left = draw(0, size[0] - h + 1), draw(0, size[1] - w + 1)
        blob = torch.rand(h, w, generator=generator) < 0.95
        blob[0, 0] = blob[-1, -1] = True
        masks.append(Mask(top, left, blob))
        labels.append(draw(1, classes + 1))
    corners = [[m.left, m.top, m.left + m.pixels.shape[1], m.top + m.pixels.shape[0]] for m in masks]
    scores = (torch.rand(len(masks), generator=generator) * 20).round() / 20 if like else None  # with ties
    crowd = () if like else tuple(draw(0, 6) == 0 for _ in masks)
    boxes = torch.tensor(corners, dtype=torch.float32)
    return Instances(boxes=boxes, labels=torch.tensor(labels), masks=tuple(masks), scores=scores, crowd=crowd)


def reference_ap(truth, found, sizes, classes: int, kind: str) -> tuple[float, ...]:
    """The three numbers by pycocotools, from dictionaries that are written here."""
    from pycocotools import mask as run_lengths
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    parts: list[list[dict]] = []
    for sets in (truth, found):
        parts.append([])
        for i, (instances, size) in enumerate(zip(sets, sizes, strict=True)):
            for k, mask in enumerate(instances.masks):
                x0, y0, x1, y1 = instances.boxes[k].tolist()
                whole = mask.whole(size).byte().numpy().copy(order="F")
                parts[-1].append(
                    {
                        "id": len(parts[-1]) + 1, "image_id": i, "category_id": int(instances.labels[k]),
                        "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
                        "segmentation": run_lengths.encode(whole), "iscrowd": int(instances.crowd[k]) if instances.crowd else 0,
                        "score": float(instances.scores[k]) if instances.scores is not None else 1.0,
                    }
                )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        there = COCO()
        there.dataset = {
            "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
            "categories": [{"id": c + 1, "name": str(c)} for c in range(classes)],
            "annotations": parts[0],
        }
        there.createIndex()
        scored = COCOeval(there, there.loadRes(parts[1]), {"box": "bbox", "mask": "segm"}[kind])
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return tuple(scored.stats[:3].tolist())


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_average_precision_against_pycocotools(kind):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        sizes = [(24 + 3 * i, 40 - 2 * i) for i in range(6)]
        truth = [random_instances(generator, size, 3) for size in sizes]
        found = [random_instances(generator, s, 3, t) for s, t in zip(sizes, truth, strict=True)]
        ours = average_precision(truth, found, sizes, classes=3, kind=kind)
        theirs = reference_ap(truth, found, sizes, 3, kind)
        assert 0.02 < theirs[0] < 0.9
        assert ours == pytest.approx(theirs, abs=5e-5)


def test_missing_library_is_named(monkeypatch, student):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    data = Split(pool=scenes(0, 1), test=scenes(2))
    refused(lambda: run_task("detect", student, data, detect=TINY), "dreamteacher[coco]")
