"""Detection: data of mixed sizes, both detectors on trivial scenes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from dreamteacher.data.split import Split, halved
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.detection import train
from dreamteacher.downstream.detection.cascade import CascadeHeads, box_losses
from dreamteacher.downstream.detection.config import PRESETS, check_detect
from dreamteacher.downstream.detection.data import (
    Draw,
    Instances,
    checked,
    cut_mask,
    example,
    instances_of_ids,
    load_instances,
    scaled_masks,
    scaled_size,
)
from dreamteacher.downstream.detection.model import Batcher, build_detector, roi_pool
from dreamteacher.downstream.detection.scores import average_precision
from dreamteacher.downstream.detection.train import build_groups, predict, rate_at, train_detector
from dreamteacher.downstream.evaluate import evaluate
from dreamteacher.downstream.loop import LongRun
from dreamteacher.downstream.tables import summary_table
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime.optim import layer_decay_groups, layer_depths
from dreamteacher.testing import check_task
from tests.builders.pictures import cut, noise, refused
from tests.builders.squares import TINY, draw_scene, save_coco, save_folder, scenes
from tests.builders.students import noted_losses, run_task
from tests.downstream.detection.test_scores import random_instances

# pycocotools 2.0.11 decodes into an array that numpy 2 finds old-fashioned.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NAME = "test_resnet"


# --- data ---------------------------------------------------------------------------------------------------


def test_instances_of_ids_against_a_loop():
    ids = torch.randint(0, 5, (9, 7), generator=torch.Generator().manual_seed(0)) * 1000
    found = instances_of_ids(ids)
    numbers = sorted({int(v) for v in ids.flatten() if v})
    assert len(found.masks) == len(numbers)
    for number, box, mask in zip(numbers, found.boxes.tolist(), found.masks, strict=True):
        places = [(y, x) for y in range(9) for x in range(7) if ids[y, x] == number]
        ys, xs = [y for y, _ in places], [x for _, x in places]
        assert box == [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
        assert torch.equal(mask.whole((9, 7)), ids == number)
        assert torch.equal(cut_mask(ids == number).whole((9, 7)), ids == number)
    assert len(instances_of_ids(torch.zeros(4, 4).long()).masks) == 0
    assert cut_mask(torch.zeros(4, 4).bool()).pixels.numel() == 0


@pytest.mark.parametrize("size", [(40, 50), (64, 48), (91, 13), (20, 25), (7, 200)])
def test_scaled_masks_are_those_of_the_whole_picture(size):
    _, ids = draw_scene(3, (40, 50), objects=4)
    truth = instances_of_ids(ids)
    whole = torch.stack([m.whole((40, 50)) for m in truth.masks])[None].float()
    expected = F.interpolate(whole, size=size, mode="nearest-exact")[0]
    assert torch.equal(scaled_masks([*truth.masks, cut_mask(ids < 0)], (40, 50), size)[:-1].float(), expected)


def test_an_example_is_scaled_and_mirrored_with_its_objects():
    data = scenes(1)
    plain, mirrored = (example(data, Draw(0, 96, mirror), 112) for mirror in (False, True))
    assert plain.image.shape == (3, 90, 112)  # the longer side is bound
    assert 0 <= float(plain.image.min()) < float(plain.image.max()) <= 1
    assert torch.equal(mirrored.image, plain.image.flip(2))
    for scene in (plain, mirrored):
        masks, boxes = scene.target["masks"], scene.target["boxes"]
        assert len(boxes) == 2
        for box, mask in zip(boxes.tolist(), masks, strict=True):
            ys, xs = mask.nonzero(as_tuple=True)
            tight = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            assert box == pytest.approx(tight, abs=1)
            assert float(scene.image[:, mask.bool()].mean()) > 0.75  # the squares are bright
    assert scaled_size((10, 1000), 64, 100) == (1, 100)


def test_crowds_are_not_trained_on():
    truth = dataclasses.replace(scenes(1).truth(0), crowd=(True, False))
    data = dataclasses.replace(scenes(1), truth=lambda _: truth)
    target = example(data, Draw(0, 64, False), 96).target
    assert torch.equal(target["boxes"], truth.boxes[1:])
    assert target["masks"].shape == (1, 64, 80)
    assert len(target["labels"]) == 1


def test_a_folder_of_instances_of_mixed_sizes(tmp_path):
    images, instances = save_folder(tmp_path, 1, 2, 4)
    (images / "unlabelled.png").write_bytes((images / "1.png").read_bytes())
    data = load_instances(images, instances)
    assert [p.name for p in data.images] == ["1.png", "2.png", "4.png"]
    assert list(data.sizes) == [(64, 80), (72, 64), (72, 64)]
    for i, seed in enumerate((1, 2, 4)):
        image, ids = draw_scene(seed, data.sizes[i])
        assert torch.equal(data.image(i), image)
        assert torch.equal(data.truth(i).boxes, instances_of_ids(ids).boxes)
        assert data.counts[i] == len(data.truth(i).masks)
    part = data.take(torch.tensor([2, 0]))
    assert torch.equal(part.image(0), data.image(2))
    assert torch.equal(part.truth(1).boxes, data.truth(0).boxes)
    halves = halved(data)
    assert (len(halves.pool), len(halves.test)) == (1, 2)


def test_coco_json_and_its_score_against_pycocotools(tmp_path):
    """The truth as polygons and run lengths with crowds; what is found is near to it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, path = save_coco(tmp_path, 1, 2, 4)
    data = load_instances(images, path)
    assert data.classes == ("square",)
    for i, seed in enumerate((1, 2, 4)):
        drawn = instances_of_ids(draw_scene(seed, data.sizes[i])[1])
        truth = data.truth(i)
        assert torch.equal(truth.boxes, drawn.boxes)
        assert truth.crowd == tuple(k == 1 for k in range(len(drawn.masks)))
        assert data.counts[i] == sum(not c for c in truth.crowd)
        for one, two in zip(truth.masks, drawn.masks, strict=True):
            assert torch.equal(one.whole(data.sizes[i]), two.whole(data.sizes[i]))
    generator = torch.Generator().manual_seed(0)
    truth = [data.truth(i) for i in range(3)]
    found = [random_instances(generator, s, 1, t) for s, t in zip(data.sizes, truth, strict=True)]
    ours = average_precision(truth, found, data.sizes, classes=1, kind="mask")
    results = [
        {"image_id": seed + 5, "category_id": 7, "score": float(f.scores[k]), "segmentation": rle}
        for f, seed, size in zip(found, (1, 2, 4), data.sizes, strict=True)
        for k, rle in enumerate(_encoded(f, size))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        there = COCO(str(path))
        scored = COCOeval(there, there.loadRes(results), "segm")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    assert scored.stats[0] > 0.05
    assert ours == pytest.approx(scored.stats[:3].tolist(), abs=5e-5)


def _encoded(found: Instances, size: tuple[int, int]) -> list:
    from pycocotools import mask as run_lengths

    return [run_lengths.encode(m.whole(size).byte().numpy().copy(order="F")) for m in found.masks]


def resave(path: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    image = change(Image.open(path).copy())
    image.save(path)


def test_bad_instances_are_found_before_training(tmp_path):
    images, _instances = save_folder(tmp_path / "good", 1, 2)
    refused(lambda: load_instances(images, tmp_path / "nowhere"), "nowhere", "COCO JSON")
    refused(
        lambda: load_instances(images, images), "2 of 2 instance PNGs", "no numbers of objects (PNG, RGB)"
    )

    def spoilt(name: str, spoil: Callable[[Path], object]) -> Callable[[], object]:
        one, two = save_folder(tmp_path / name, 1, 2)
        spoil(two / "2.png")
        return lambda: load_instances(one, two)

    small = spoilt("small", lambda p: resave(p, lambda i: i.crop((0, 0, 64, 60))))
    refused(small, "1 of 2 instance PNGs", "2.png is 64 x 60, its image 64 x 72")
    refused(spoilt("damaged", lambda p: cut(p, 0.5)), "1 of 2 instance PNGs", "2.png (truncated)")
    refused(spoilt("alone", lambda p: p.rename(p.with_name("3.png"))), "1 of 2 masks", "3.png")
    refused(
        spoilt("jpeg", lambda p: (noise(0).convert("L").save(p.with_suffix(".jpg")), p.unlink())), "JPEG, L"
    )
    empty = spoilt("empty", lambda p: [resave(q, lambda i: i.point(lambda _: 0)) for q in p.parent.iterdir()])
    refused(lambda: checked(halved(empty())), "None of the 1 training images shows an object")
    images, path = save_coco(tmp_path / "coco", 1, 2)
    others, other = save_coco(tmp_path / "other", 1, 2, names=("square", "circle"))
    config = EvaluateConfig(images=images, instances=path, test_images=others, test_instances=other)
    refused(lambda: train.INSTANCES.load(config, ()), "differ: circle")
    cut(path, 0.5)
    refused(lambda: load_instances(images, path), "is not JSON")


def test_a_damaged_image_is_named(tmp_path):
    images, instances = save_folder(tmp_path, 1, 2)
    data = load_instances(images, instances)
    cut(images / "2.png", 0.5)
    refused(lambda: data.image(1), "2.png", "truncated")


# --- the detectors ------------------------------------------------------------------------------------------


def test_images_are_normalised_once_and_padded_with_zero(student):
    """The maps of mixed images are those that torchvision's own transform gives with the timm model alone."""
    images = [torch.rand(3, 64, 70), torch.rand(3, 40, 96)]
    batch, _ = Batcher(student.mean, 32)(images)
    mean, std = student.mean.flatten().tolist(), student.std.flatten().tolist()
    transform = GeneralizedRCNNTransform(64, 96, mean, std, _skip_resize=True).train()
    theirs, _ = transform(images)
    assert batch.tensors.shape == (2, 3, 64, 96)
    assert batch.image_sizes == [(64, 70), (40, 96)] == theirs.image_sizes
    model = student.model.eval()
    expected = model.forward_intermediates(
        theirs.tensors, indices=list(student.indices.values()), intermediates_only=True
    )
    for ours, wanted in zip(student(batch.tensors), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_strides_are_stated_and_not_guessed(student):
    """torchvision takes a map of 2 x 2 of a padded image of 40 x 40 for stride 16; else both are the same."""
    maps = {s.name: torch.rand(1, 8, 128 // s.stride, 128 // s.stride) for s in student.specs}
    boxes = [torch.tensor([[0.0, 0, 30, 20], [10, 10, 120, 125], [0, 0, 128, 128]])]
    guessed = MultiScaleRoIAlign(list(maps), output_size=7, sampling_ratio=2)
    stated = roi_pool(student.specs, 7)
    torch.testing.assert_close(stated(maps, boxes, [(128, 128)]), guessed(maps, boxes, [(128, 128)]))
    assert stated.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert (stated.map_levels.k_min, stated.map_levels.k_max) == (2, 5)


def test_box_losses_against_torchvision_and_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(12, 4, generator=generator), torch.randn(12, 4, generator=generator)
    labels = torch.randint(0, 4, (12,), generator=generator)
    targets = torch.randn(12, 4, generator=generator)
    for ours, theirs in zip(
        box_losses(logits, deltas, labels, targets),
        fastrcnn_loss(logits, deltas.repeat(1, 4), [labels], [targets]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    beta, total = 1 / 9, 0.0
    for n in range(12):
        for c in range(4) if labels[n] else ():
            error = abs(float(deltas[n, c].double() - targets[n, c].double()))
            total += error**2 / (2 * beta) if error < beta else error - beta / 2
    assert float(box_losses(logits, deltas, labels, targets)[1]) == pytest.approx(total / 12, rel=1e-5)


class Fixed(nn.Module):
    """A predictor whose answers are given."""

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.logits, self.deltas = logits, deltas

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits[: len(x)], self.deltas[: len(x)]


def cascade_of(student: Student, **settings: object) -> CascadeHeads:
    config = dataclasses.replace(TINY, **settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    heads = build_detector(create_student(NAME), config, classes=2, cascade=True).roi_heads
    assert isinstance(heads, CascadeHeads)
    return heads


def test_a_cascade_moves_boxes_and_averages_scores(student):
    """Against plain float64 loops: two proposals, two classes, the true deltas of each stage known."""
    heads = cascade_of(student).eval()
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(2, 3, generator=generator) for _ in range(3)]
    deltas = [torch.randn(2, 4, generator=generator) for _ in range(3)]
    for stage in range(3):
        heads.predictors[stage] = Fixed(logits[stage], deltas[stage])
    boxes = torch.tensor([[10.0, 10, 30, 40], [30, 5, 60, 50]])
    maps = {s.name: torch.rand(1, TINY.width, 64 // s.stride, 64 // s.stride) for s in student.specs}
    heads.nms_thresh, heads.score_thresh = 1.0, 0.0
    (found,) = heads._detect(maps, [boxes], [(64, 64)])
    expected = {}
    for n in range(2):
        box = boxes[n].double().tolist()
        for stage, (wx, wh) in enumerate(((10, 5), (20, 10), (30, 15))):
            for label in (1, 2) if stage == 2 else (1,):
                dx, dy, dw, dh = deltas[stage][n].double().tolist()
                w, h = box[2] - box[0], box[3] - box[1]
                x, y = box[0] + w / 2 + dx / wx * w, box[1] + h / 2 + dy / wx * h
                w, h = (
                    w * torch.tensor(dw / wh).double().exp().item(),
                    h * torch.tensor(dh / wh).double().exp().item(),
                )
                moved = [min(max(v, 0), 64) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
                if stage == 2:
                    score = sum(float(s[n].double().softmax(0)[label]) for s in logits) / 3
                    expected[round(score, 4)] = (label, moved)
            box = moved
    assert len(found["scores"]) == 4
    for score, label, box in zip(
        found["scores"].tolist(), found["labels"].tolist(), found["boxes"], strict=True
    ):
        wanted_label, wanted_box = expected[round(score, 4)]
        assert label == wanted_label
        assert box.tolist() == pytest.approx(wanted_box, abs=1e-3)


def test_a_later_stage_is_stricter(student):
    heads = cascade_of(student)
    truth = [{"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([2])}]
    boxes = [torch.tensor([[0.0, 0, 10, iou * 10] for iou in (0.45, 0.55, 0.65, 0.75)])]
    assert [heads._rematched(s, boxes, truth)[1][0].tolist() for s in range(3)] == [
        [0, 2, 2, 2], [0, 0, 2, 2], [0, 0, 0, 2]
    ]  # fmt: skip
    # the first stage's deltas of the second box (10 x 5.5), in plain arithmetic
    found = heads._rematched(0, boxes, truth)[2][0][1]
    assert found[0] == pytest.approx(0)
    assert found[1] == pytest.approx((5 - 2.75) / 5.5 * 10)
    assert found[3] == pytest.approx(5 * torch.tensor(10 / 5.5).log().item())


# --- training -----------------------------------------------------------------------------------------------

LEARN = dataclasses.replace(TINY, steps=60)
FLOAT32 = LongRun(precision="float32")


@pytest.fixture(scope="module", params=[False, True], ids=["mask", "cascade"])
def learnt(request, student):
    """A detector trained on two scenes, the losses on the way, and what it then finds there."""
    data = scenes(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        losses = noted_losses(patch, train)
        model = train_detector(student, data, LEARN, cascade=request.param, run=FLOAT32)
    return model, losses, data, list(predict(model, data, LEARN))


def test_the_loss_falls(learnt):
    _, losses, _, _ = learnt
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_an_overfitted_scene_is_found(learnt):
    model, _, data, found = learnt
    assert not model.training
    truth = [data.truth(i) for i in range(2)]
    for kind in ("box", "mask"):
        ap, ap50, _ = average_precision(truth, found, data.sizes, classes=1, kind=kind)
        assert ap50 > 0.6
        assert ap > 0.2
    for part, (height, width) in zip(found, data.sizes, strict=True):
        assert (part.boxes >= 0).all()
        assert (part.boxes[:, 2::2] <= width).all()
        assert (part.boxes[:, 3::2] <= height).all()
        assert ((part.scores > 0) & (part.scores <= 1)).all()
        assert all(
            m.top + m.pixels.shape[0] <= height and m.left + m.pixels.shape[1] <= width for m in part.masks
        )


@pytest.mark.parametrize("cascade", [False, True])
def test_the_seed_decides_everything_and_nothing_else_is_touched(student, cascade):
    data = scenes(0, 1, 2)
    config = dataclasses.replace(TINY, short_side=(64, 96))

    def weights(seed: int, workers: int) -> dict[str, Tensor]:
        run, settings = dataclasses.replace(FLOAT32, seed=seed), dataclasses.replace(config, workers=workers)
        return train_detector(student, data, settings, cascade=cascade, run=run).state_dict()

    state = torch.get_rng_state()
    first = weights(0, 1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    again, other = weights(0, 3), weights(1, 1)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["rpn.head.cls_logits.weight"], other["rpn.head.cls_logits.weight"])


def test_detection_keeps_the_contract_of_tasks(student):
    data = Split(pool=scenes(0, 1, 2, 3), test=scenes(4, 5))
    for name in ("detect", "detect-cascade"):
        check_task(lambda s, n=name: run_task(n, s, data, 2, detect=TINY).items(), student)
    refused(lambda: run_task("detect", student, data, 5, detect=TINY), "5 labelled images", "2 to 4")


def test_images_without_objects_are_left_out_of_the_training(student):
    data = scenes(0, 1, 2)
    nothing = instances_of_ids(torch.zeros(data.sizes[1]).long())
    truths = [data.truth(0), nothing, data.truth(2)]
    data = dataclasses.replace(data, truth=truths.__getitem__, counts=[2, 0, 2])
    assert [len(data.shown().truth(i).masks) for i in range(2)] == [
        len(truths[0].masks),
        len(truths[2].masks),
    ]
    model = train_detector(student, data, TINY, cascade=True)
    assert all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())


def test_norms(student):
    data = scenes(0, 1)

    def norms(model: nn.Module) -> list[nn.Module]:
        return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def made(**settings: object):
        config = dataclasses.replace(TINY, steps=1, optimizer="sgd", **settings)  # type: ignore[arg-type]
        return train_detector(student, data, config, cascade=False)

    frozen = made(backbone_norm="frozen", head_norm="none").backbone
    before = student.state_dict()
    after = frozen.student.state_dict()
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for part in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(before[f"{name}.{part}"], after[f"{name}.{part}"])
    kernel = "model.layer1.0.conv1.weight"
    assert not torch.equal(before[kernel], after[kernel])
    assert not norms(frozen.fpn)
    synced = made(backbone_norm="sync", head_norm="sync")
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms(synced))
    assert len(norms(synced)) > len(norms(student)) + 8
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in norms(student))


# --- schedules ----------------------------------------------------------------------------------------------


def test_layer_depths_of_a_resnet50_and_a_convnext():
    depths = layer_depths(timm.create_model("resnet50", num_classes=0))
    expected = {
        "conv1.weight": 0,
        "bn1.bias": 0,
        "layer1.2.conv1.weight": 1,
        "layer2.0.downsample.0.weight": 2,
    }
    expected |= {"layer2.3.bn1.weight": 2, "layer3.2.conv2.weight": 3, "layer3.3.conv2.weight": 4}
    expected |= {"layer3.5.bn3.bias": 4, "layer4.0.conv1.weight": 5, "layer4.2.conv3.weight": 5}
    assert {name: depths[name] for name in expected} == expected
    assert set(depths.values()) == set(range(6))
    depths = layer_depths(timm.create_model("convnext_tiny", num_classes=0))  # stages of 3, 3, 9 and 3 blocks
    expected = {"stem.0.weight": 0, "stages.1.blocks.2.conv_dw.weight": 2, "stages.2.downsample.1.weight": 3}
    expected |= {f"stages.2.blocks.{b}.conv_dw.weight": 3 + b // 3 for b in range(9)}
    expected |= {"stages.3.downsample.0.weight": 6, "stages.3.blocks.2.mlp.fc2.bias": 6}
    assert {name: depths[name] for name in expected} == expected
    assert max(depths.values()) == 6
    assert set(layer_depths(nn.Linear(2, 2)).values()) == {0}


def test_layer_decay_groups_hold_each_parameter_once(student):
    groups = layer_decay_groups(student.model, 0.05, 0.5)
    depths = layer_depths(student.model)
    deepest = max(depths.values())
    found = {id(p): group for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert sum(len(group["params"]) for group in groups) == len(found)  # type: ignore[arg-type]
    for name, parameter in student.model.named_parameters():
        group = found[id(parameter)]
        assert group["factor"] == 0.5 ** (deepest + 1 - depths[name])
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)
    model = build_detector(create_student(NAME), TINY, classes=1, cascade=True)
    every = [id(p) for group in build_groups(model, TINY) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())


def test_learning_rates():
    config = dataclasses.replace(TINY, steps=90, lr=1.0, warmup=0.1, milestones=(2 / 3, 8 / 9), cut=0.25)
    rates = [rate_at(step, config) for step in (0, 8, 9, 59, 60, 79, 80, 89)]
    assert rates == pytest.approx([1 / 9, 1, 1, 1, 0.25, 0.25, 0.0625, 0.0625])
    smooth = dataclasses.replace(config, milestones=())
    assert rate_at(89, smooth) < 0.01 < rate_at(45, smooth) < 1
    for preset in PRESETS.values():
        check_detect(preset)
    coco = PRESETS["coco-1x"]
    assert [rate_at(s, coco) for s in (999, 59_999, 60_000, 80_000)] == pytest.approx(
        [2.5e-4, 2.5e-4, 6.25e-5, 1.5625e-5]
    )
    assert rate_at(499, PRESETS["bdd100k-36"]) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"short_side": (96, 64)}, "Sides of 96 to 64"), ({"test_side": 999}, "test 999"), ({"steps": 0}, "steps"),
        ({"layer_decay": 0.0}, "layer_decay"), ({"cut": 1.5}, "cut"), ({"milestones": (1.2,)}, "milestones"),
        ({"warmup": -1.0}, "warmup"), ({"rois": 0, "width": 0}, "width, rois"), ({"image_counts": (1,)}, "image_counts"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings, word):
    check_detect(TINY)
    refused(lambda: check_detect(dataclasses.replace(TINY, **settings)), word)


# --- evaluate -----------------------------------------------------------------------------------------------


def test_evaluate_on_a_folder_and_on_coco(tmp_path):
    images, instances = save_folder(tmp_path / "folder", 0, 1, 2, 4)
    config = EvaluateConfig(
        student=NAME, images=images, instances=instances, seeds=(0,), device="cpu", out=tmp_path / "out",
        detect=dataclasses.replace(TINY, steps=1, image_counts=(2,)),
    )  # fmt: skip
    rows = evaluate(config, log=lambda _: None)
    names = [f"{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75")]
    assert [(r["task"], r["metric"]) for r in rows] == [
        (t, n) for t in ("detect", "detect-cascade") for n in names
    ]
    assert all(0 <= r["value"] <= 1 for r in rows)
    assert "detect-cascade, 2 images, mask_ap" in summary_table(rows)
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 12
    images, path = save_coco(tmp_path / "train", 0, 1)
    tests, test_path = save_coco(tmp_path / "test", 2, 4)
    config = dataclasses.replace(
        config, images=images, instances=path, test_images=tests, test_instances=test_path, tasks=("detect",),
        detect=dataclasses.replace(TINY, steps=1),
    )  # fmt: skip
    rows = evaluate(config, log=lambda _: None)
    assert [r["labels"] for r in rows] == [None] * 6
    assert "detect, all labels, mask_ap" in summary_table(rows)


def test_evaluate_refuses_before_any_work(tmp_path):
    images, instances = save_folder(tmp_path / "folder", 0, 1, 2, 4)
    config = EvaluateConfig(
        student=NAME, images=images, instances=instances, device="cpu", out=tmp_path / "out"
    )
    for changes, word in (
        ({"instances": None, "tasks": ("detect",)}, "--instances"),
        ({"images": None}, "--images"),
        ({"test_images": images}, "--test-instances"),
        ({"detect": dataclasses.replace(TINY, image_counts=(3,))}, "3 labelled images asked for"),
        ({"detect": dataclasses.replace(TINY, cut=0.0)}, "cut is 0.0"),
        ({"instances": images}, "no numbers of objects"),
    ):
        changed = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        refused(lambda c=changed: evaluate(c), word)
    assert not (tmp_path / "out").exists()
