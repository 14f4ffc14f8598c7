"""COCO-style JSON: masks against pycocotools and float64 loops, whole files against pycocotools, refusals, fuzz."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference
from pycocotools.coco import COCO

from dreamteacher.data.coco.annotations import CocoSet, instance_mask, read_coco
from dreamteacher.data.coco.run_lengths import Rle, decode_counts, polygon_mask, rle_mask
from dreamteacher.runtime.errors import UserError
from tests.builders.pictures import noise, refused

# pycocotools 2.0.11 decodes into an array that numpy 2 finds old-fashioned.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# --- masks --------------------------------------------------------------------------------------------------


def blobs(seed: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0, 0] > 0.5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (37, 21), (300, 200)])
@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_as_pycocotools_writes_them(seed: int, height: int, width: int) -> None:
    noisy = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) > 0.9
    for mask in (blobs(seed, height, width), noisy, torch.zeros(height, width).bool()):
        written = reference.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        counts = decode_counts(written["counts"].decode())
        assert torch.equal(rle_mask(Rle(size=(height, width), counts=counts)), mask)
        again = reference.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
        assert again["counts"] == written["counts"]


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_run_lengths_are_decoded(counts: list[int]) -> None:
    written = reference.frPyObjects({"size": [1, sum(counts)], "counts": counts}, 1, sum(counts))
    assert decode_counts(written["counts"].decode()) == tuple(counts)


@given(st.text(max_size=12))
@settings(max_examples=200, deadline=None)
def test_damaged_run_lengths_are_refused_or_whole_numbers(text: str) -> None:
    try:
        counts = decode_counts(text)
    except ValueError:
        return
    assert all(type(c) is int for c in counts)


def inside(x: float, y: float, points: list[tuple[float, float]]) -> bool:
    """A ray to the left crosses an odd number of edges: the textbook's rule, across, not down."""
    crossed = False
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) < x:
            crossed = not crossed
    return crossed


def distance(x: float, y: float, points: list[tuple[float, float]]) -> float:
    """From (x, y) to the outline."""
    best = float("inf")
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        square = (x1 - x0) ** 2 + (y1 - y0) ** 2
        t = max(0.0, min(1.0, ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / square)) if square else 0.0
        best = min(best, ((x - x0 - t * (x1 - x0)) ** 2 + (y - y0 - t * (y1 - y0)) ** 2) ** 0.5)
    return best


def corners(seed: int, count: int, height: int, width: int) -> list[tuple[float, float]]:
    """Random corners (the outline crosses itself), some outside of the image."""
    draw = random.Random(seed)
    return [(draw.uniform(-3, width + 3), draw.uniform(-3, height + 3)) for _ in range(count)]


@pytest.mark.parametrize("count", [3, 4, 7, 20])
@pytest.mark.parametrize("seed", range(4))
def test_polygons_cover_the_centres_inside(count: int, seed: int) -> None:
    height, width = 17, 23
    points = corners(seed, count, height, width)
    flat = [v for point in points for v in point]
    mask = polygon_mask(flat, (height, width))
    expected = [[inside(x + 0.5, y + 0.5, points) for x in range(width)] for y in range(height)]
    assert mask.tolist() == expected
    theirs = reference.decode(reference.merge(reference.frPyObjects([flat], height, width))).astype(bool)
    far = [[distance(x + 0.5, y + 0.5, points) > 0.4 for x in range(width)] for y in range(height)]
    assert np.array_equal(theirs[np.array(far)], mask.numpy()[np.array(far)])


@given(st.tuples(*[st.integers(-2, 12)] * 4))
@settings(max_examples=100, deadline=None)
def test_boxes_as_polygons_are_exact(box: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = box
    mask = polygon_mask([x0, y0, x1, y0, x1, y1, x0, y1], (9, 10))
    expected = torch.zeros(9, 10, dtype=torch.bool)
    (a, b), (c, d) = (sorted((max(v, 0), max(w, 0))) for v, w in ((x0, x1), (y0, y1)))
    expected[c:d, a:b] = True
    assert torch.equal(mask, expected)
    if x0 < x1 and y0 < y1 and min(box) >= 0 and x1 <= 10 and y1 <= 9:
        theirs = reference.decode(reference.frPyObjects([[x0, y0, x1, y0, x1, y1, x0, y1]], 9, 10)[0])
        assert np.array_equal(theirs.astype(bool), mask.numpy())


def test_polygons_that_share_an_edge_share_no_pixel() -> None:
    left = polygon_mask([0, 0, 10, 0, 3.5, 20, 0, 20], (20, 20))
    right = polygon_mask([10, 0, 20, 0, 20, 20, 3.5, 20], (20, 20))
    assert not (left & right).any()
    assert (left | right).all()


# --- files --------------------------------------------------------------------------------------------------


def content() -> dict[str, Any]:
    """Two images, categories out of order with holes, one annotation of every kind; c.png has none."""
    crowd = torch.zeros(20, 30, dtype=torch.uint8)
    crowd[5:9, 20:28] = 1
    packed = reference.encode(np.asfortranarray(crowd.numpy()))["counts"].decode()
    square = [[2, 3, 12, 3, 12, 9, 2, 9]]
    return {
        "info": {"year": 2024},
        "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}],
        "images": [
            {"id": 5, "file_name": "a.png", "height": 20, "width": 30},
            {"id": 2, "file_name": "sub/b.png", "height": 16, "width": 16},
            {"id": 9, "file_name": "c.png", "height": 8, "width": 8},
        ],
        "annotations": [
            {"id": 11, "image_id": 5, "category_id": 90, "segmentation": square, "bbox": [2, 3, 10, 6],
             "area": 60, "iscrowd": 0},
            {"id": 12, "image_id": 5, "category_id": 3, "iscrowd": 1, "bbox": [20, 5, 8, 4], "area": 32,
             "segmentation": {"size": [20, 30], "counts": packed}},
            {"id": 13, "image_id": 2, "category_id": 17, "bbox": [0, 0, 16, 8], "area": 64.5,
             "segmentation": {"size": [16, 16], "counts": [0, *[8] * 32]}},
            {"id": 14, "image_id": 5, "category_id": 17,
             "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4], [20, 15, 25, 15, 25, 18, 20, 18]]},
        ],
    }  # fmt: skip


def write(folder: Path, data: Any) -> Path:
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    noise(0, 20, 30).save(folder / "images" / "a.png")
    noise(1, 16, 16).save(folder / "images" / "sub" / "b.png")
    noise(2, 8, 8).save(folder / "images" / "c.png")
    path = folder / "instances.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def read(folder: Path, data: Any, **options: Any) -> CocoSet:
    return read_coco(write(folder, data), folder / "images", **options)


def test_a_file_as_pycocotools_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = content()
    found = read(tmp_path, data)
    for annotation in data["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("bbox", [1, 1, 24, 17])
        annotation.setdefault("area", 24)
    theirs = COCO(str(write(tmp_path, data)))
    capsys.readouterr()
    assert found.category_ids == tuple(sorted(theirs.cats)) == (3, 17, 90)
    assert (
        found.names == tuple(theirs.cats[i]["name"] for i in sorted(theirs.cats)) == ("cat", "dog", "zebra")
    )
    assert [(i.id, i.size) for i in found.images] == [(5, (20, 30)), (2, (16, 16)), (9, (8, 8))]
    assert found.images[1].path == tmp_path / "images" / "sub" / "b.png"
    assert [[a.id for a in i.annotations] for i in found.images] == [[11, 12, 14], [13], []]
    for image in found.images:
        for annotation in image.annotations:
            other = theirs.anns[annotation.id]
            assert found.category_ids[annotation.label] == other["category_id"]
            assert annotation.crowd == bool(other["iscrowd"])
            assert list(annotation.box) == other["bbox"]
            assert annotation.area == other["area"]
            assert np.array_equal(instance_mask(annotation, image.size), theirs.annToMask(other))


def test_boxes_alone(tmp_path: Path) -> None:
    data = content()
    for annotation in data["annotations"]:
        annotation["bbox"], annotation["segmentation"] = [1, 1, 4, 5], []
    found = read(tmp_path, data, masks=False)
    last = found.images[0].annotations[-1]
    assert (last.id, last.box, last.area, last.segmentation) == (14, (1, 1, 4, 5), 20, None)
    with pytest.raises(ValueError, match="without its segmentation"):
        instance_mask(last, (20, 30))
    refused(lambda: read(tmp_path, data), "4 without 'segmentation' (id 11, id 12 (+2 more))")
    del data["annotations"][2]["bbox"]
    refused(lambda: read(tmp_path, data, masks=False), "1 of 4 annotations", "1 without 'bbox' (id 13)")


def test_degenerate_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = content()
    line = [296.65, 388.33, 297.68, 388.33, 297.68, 388.33, 296.65, 388.33]  # as in COCO 2017
    kinds: list[tuple[Any, str]] = [
        ([[1, 1, 5, 5]], "fewer than 3 points"),
        ([[v / 30 for v in line]], "a line"),
        ([[40, 1, 50, 1, 50, 9]], "outside of the image"),
        ({"size": [20, 30], "counts": [600]}, "no pixel"),
        ([[1.1, 1.1, 1.4, 1.1, 1.4, 1.4]], "no pixel"),  # without a box
    ]
    for i, (segmentation, words) in enumerate(kinds):
        one = copy.deepcopy(content())
        record = {"id": 50 + i, "image_id": 5, "category_id": 3, "segmentation": segmentation}
        one["annotations"].append(record)
        refused(
            lambda one=one: read(tmp_path, one), "1 of 5 annotations", f"id {50 + i}", words, "degenerate"
        )
        data["annotations"].append(record)
    text = refused(lambda: read(tmp_path, data), "5 of 9 annotations", "2 that cover no pixel (degenerate)")
    assert len(text) < 500
    found = read(tmp_path, data, skip_degenerate=True)
    assert found.left_out == 5
    assert sum(len(i.annotations) for i in found.images) == 4
    assert "5 of 9 annotations" in capsys.readouterr().err


def change(part: str, index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: dict[str, Any]) -> None:
        data[part][index].update(values)

    return apply


BAD: list[tuple[Callable[[dict[str, Any]], Any], list[str]]] = [
    (lambda d: d.pop("categories"), ["COCO's format", "'images'"]),
    (lambda d: d.update(images={}), ["COCO's format"]),
    (lambda d: d["annotations"].clear(), ["no annotations"]),
    (lambda d: d["images"].append(7), ["1 of 4 images", "no dictionary (no. 4)"]),
    (lambda d: d["categories"][0].pop("id"), ["1 without 'id' (no. 1)"]),
    (lambda d: d["images"][0].pop("height"), ["1 without 'height' (id 5)"]),
    (lambda d: d["annotations"][1].pop("image_id"), ["1 without 'image_id' (id 12)"]),
    (change("categories", 0, name="a\x1b[2J"), ["no plain text"]),
    (change("categories", 0, name="cat"), ["1 categories", "name that is taken", "cat"]),
    (change("categories", 0, id=3), ["id that is taken: 3"]),
    (change("images", 1, id=5), ["1 images", "id that is taken: 5"]),
    (change("annotations", 1, id=11), ["1 annotations", "an id that is taken: 11"]),
    (change("images", 1, file_name="./a.png"), ["file name that is taken"]),
    (change("images", 1, file_name="../a.png"), ["leads out of the folder", "../a.png"]),
    (change("images", 1, file_name="/etc/passwd"), ["leads out of the folder"]),
    (change("images", 1, file_name="a\0.png"), ["no plain text"]),
    (change("images", 1, file_name="\ud800.png"), ["no plain text"]),
    (change("images", 1, file_name="gone.png"), ["1 of 3 images", "gone.png (missing file", "start from"]),
    (change("images", 0, height=30, width=20), ["a.png 20 x 30, the file 30 x 20", "turned"]),
    (change("images", 0, height=0), ["without extent"]),
    (change("images", 0, height=True), ["'height' is no whole number"]),
    (change("images", 0, height=10**400), ["'height' is no whole number"]),
    (change("annotations", 0, image_id=77), ["images that are not listed (id 11 (image 77))"]),
    (change("annotations", 0, category_id=1), ["categories that are not listed (id 11 (category 1))"]),
    (change("annotations", 0, iscrowd=2), ["'iscrowd'"]),
    (change("annotations", 0, area=-1), ["'area'"]),
    (change("annotations", 0, area=10**400), ["'area'"]),
    (change("annotations", 0, bbox=[1, 2, 3]), ["not four numbers"]),
    (change("annotations", 0, bbox=[1, 2, -3, 4]), ["negative"]),
    (change("annotations", 0, bbox=[1, 2, 0, 4]), ["no extent (degenerate)"]),
    (change("annotations", 0, segmentation="x"), ["neither polygons nor run lengths"]),
    (change("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), ["half a point"]),
    (change("annotations", 0, segmentation=[[1, 2, 3, None, 5, 6]]), ["other things than numbers"]),
    (change("annotations", 0, segmentation=[[1, 2, 3, 1e300, 5, 6]]), ["far outside"]),
    (change("annotations", 0, segmentation={"size": [30, 20], "counts": [0, 600]}), ["another size"]),
    (change("annotations", 0, segmentation={"size": [20, 30], "counts": [0, 599]}), ["do not fill"]),
    (change("annotations", 0, segmentation={"size": [20, 30], "counts": [700, -100]}), ["do not fill"]),
    (change("annotations", 0, segmentation={"size": [20, 30], "counts": [0, 1.5]}), ["damaged", "whole"]),
    (change("annotations", 0, segmentation={"size": [20, 30], "counts": "`"}), ["damaged", "cut off"]),
    (change("annotations", 0, segmentation={"size": [20, 30], "counts": "\u00e9"}), ["foreign character"]),
    (change("annotations", 0, segmentation={"size": [20, 30], "counts": "o" * 40}), ["too long"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), BAD)
def test_what_does_not_fit_is_counted_and_named(
    damage: Callable[[dict[str, Any]], Any], words: list[str], tmp_path: Path
) -> None:
    data = content()
    damage(data)
    refused(lambda: read(tmp_path, data), "instances.json", *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("<html>", "not JSON"),
        ('{"images": [NaN]}', "NaN is no number"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not JSON"),
        ("[1, 2]", "COCO's format"),
    ],
    ids=["empty", "html", "nan", "deep", "long", "list"],
)
def test_no_json(text: str, words: str, tmp_path: Path) -> None:
    refused(lambda: read(tmp_path, text), "instances.json", words)


def test_no_file(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    refused(lambda: read_coco(tmp_path / "gone.json", tmp_path), "gone.json", "No such file")
    path.write_bytes(b'{"a": "\xff"}')
    refused(lambda: read_coco(path, tmp_path), "not JSON", "decode")


def test_many_flaws_fit_three_lines(tmp_path: Path) -> None:
    data = content()
    for i, wrong in enumerate(
        [{"id": "x"}, {"image_id": 1}, {"category_id": 1}, {"bbox": 1}, {"iscrowd": 3}]
    ):
        data["annotations"] += [
            {**data["annotations"][0], "id": 100 + 50 * i + j, **wrong} for j in range(50)
        ]
    text = refused(lambda: read(tmp_path, data), "250 of 254 annotations", "and 1 other kinds")
    assert len(text) < 600


SOME = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_value_in_any_place(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """One value of a good file is replaced: a UserError, or a set whose masks can all be drawn."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    damaged: Any = content()
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        keys = range(len(node)) if isinstance(node, list) else node if isinstance(node, dict) else ()
        for key in keys:
            places.append((node, key))
            collect(node[key])

    collect(damaged)
    node, key = data.draw(st.sampled_from(places))
    node[key] = data.draw(SOME)
    check_sound(folder, json.dumps(damaged))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_damage_of_the_text(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    text = json.dumps(content())
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    check_sound(
        folder, text[:start] + data.draw(st.text('0123456789.eE-[]{}",: ab', max_size=6)) + text[end:]
    )


def check_sound(folder: Path, text: str) -> None:
    try:
        found = read(folder, text)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert len(found.names) == len(found.category_ids)
        for image in found.images:
            assert image.path.is_relative_to(folder / "images")
            for annotation in image.annotations:
                assert 0 <= annotation.label < len(found.names)
                assert instance_mask(annotation, image.size).shape == image.size
    assert len(message.splitlines()) <= 3
    assert message.replace("\n", "").isprintable()
