"""Panoptic segmentation: a Panoptic FPN, which is Mask R-CNN and a semantic branch on one feature pyramid.

Source: Kirillov et al., Panoptic Feature Pyramid Networks, arXiv 1901.02446.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm

from dreamteacher.data.draws import check_draw, draw_images
from dreamteacher.data.images import BadImageError, Size
from dreamteacher.data.layouts.table import Part, check, layout_of, panoptic_files
from dreamteacher.data.panoptic_set import PanopticSet, of_layout, read_panoptic
from dreamteacher.data.seeds import step_generator
from dreamteacher.data.split import Split, halved
from dreamteacher.downstream.detection.config import PanopticConfig, check_detect
from dreamteacher.downstream.detection.data import Draw, Example, instances_of_ids, scaled_image, scaled_size
from dreamteacher.downstream.detection.model import build_detector
from dreamteacher.downstream.detection.train import at_size, fit, training_draws
from dreamteacher.downstream.features import device_of, frozen
from dreamteacher.downstream.loop import UNKEPT, LongRun
from dreamteacher.downstream.segmentation.crops import scaled_mask
from dreamteacher.downstream.segmentation.few_masks import pixel_loss
from dreamteacher.downstream.segmentation.semantic import classes_at
from dreamteacher.downstream.task import Bench, Budgets, Group, Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.metrics import VOID, Segments, panoptic_counts, panoptic_quality
from dreamteacher.models.regressor import resize
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import Precision
from dreamteacher.spec import FeatureSpec

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig

_IGNORED = 255
_NEEDS = "panoptic needs segments.", "Give --images, --masks and --segments."


def checked(data: Split[PanopticSet]) -> Split[PanopticSet]:
    """The same; a UserError unless both have the same classes, of both kinds, and the pool shows a thing."""
    if (data.pool.names, data.pool.things) != (data.test.names, data.test.things):
        raise UserError(
            "The categories of the training and the test segments differ.", "Give both files the same ones."
        )
    if len(set(data.pool.things)) < 2 or not data.pool.shown():
        raise UserError(
            "Panoptic segmentation needs classes of things and of stuff, and images that show things.",
            "Say so with isthing in the categories; without things, use the task semantic.",
        )
    return data


def _load(config: EvaluateConfig, budgets: Budgets) -> Split[PanopticSet]:
    """Both parts: of a layout, of two JSON files, or two halves of one."""
    images, masks, segments, workers = config.images, config.masks, config.segments, config.workers
    assert images is not None
    if layout_of(images) is not None:
        parts: tuple[Part, Part] = "train", "val"
        pool, test = (of_layout(panoptic_files(images, part), workers=workers) for part in parts)
        data = Split(pool=pool, test=test)
    else:
        assert masks is not None
        assert segments is not None
        alone = config.test_segments is None
        pool = read_panoptic(segments, images, masks, whole=alone, workers=workers)
        if config.test_segments is None:
            data = halved(pool)
        else:
            places = config.test_images or images, config.test_masks or masks
            test = read_panoptic(config.test_segments, *places, whole=True, workers=workers)
            data = Split(pool=pool, test=test)
    check_draw(len(checked(data).pool.shown()), budgets)
    return data


class SemanticBranch(nn.Module):
    """Each level of the pyramid enlarged step by step to the finest one, their sum, a per-pixel classifier.

    The `strides` are those of the levels, fine to coarse, each twice the one before it.

    Source: sec. 3 of arXiv 1901.02446: a stage is 3x3 convolution, GroupNorm, ReLU, bilinear x2.
    """

    def __init__(self, strides: Sequence[int], channels: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for stride in strides:
            doublings = round(math.log2(stride / strides[0]))
            stages: list[nn.Module] = []
            for i in range(max(1, doublings)):
                stages += [
                    nn.Conv2d(width if i else channels, width, 3, padding=1, bias=False),
                    nn.GroupNorm(math.gcd(32, width), width),
                    nn.ReLU(),
                ]
                if doublings:
                    stages.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.levels.append(nn.Sequential(*stages))
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """One map per level, fine to coarse -> float32 logits N x classes x H x W of `size` = (H, W)."""
        finest = (maps[0].shape[-2], maps[0].shape[-1])
        parts = [resize(level(m), finest) for level, m in zip(self.levels, maps, strict=True)]
        return resize(self.classify(torch.stack(parts).sum(0)).float(), size)


class PanopticFPN(nn.Module):
    """Mask R-CNN on a student, which is taken in, and a semantic branch on its pyramid.

    The branch tells the classes of stuff apart, and one class more for everything that is a thing.
    """

    def __init__(
        self, student: Student, config: PanopticConfig, things: Sequence[bool], precision: Precision = "auto"
    ) -> None:
        super().__init__()
        self.things = [c for c, thing in enumerate(things) if thing]
        self.stuff = [c for c, thing in enumerate(things) if not thing]
        self.detector: GeneralizedRCNN = build_detector(
            student, config.detect, classes=len(self.things), cascade=False, precision=precision
        )
        self.specs: tuple[FeatureSpec, ...] = self.detector.backbone.specs
        strides = [spec.stride for spec in self.specs]
        self.branch = SemanticBranch(strides, config.detect.width, 1 + len(self.stuff), config.width)

    def _passed(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], Tensor]:
        """torchvision's detections, or with targets its losses, and the logits of the batch."""
        batch, _ = self.detector.transform(images, targets)
        maps = self.detector.backbone(batch.tensors)
        proposals, losses = self.detector.rpn(batch, maps, targets)
        found, more = self.detector.roi_heads(maps, proposals, batch.image_sizes, targets)
        size = batch.tensors.shape[-2], batch.tensors.shape[-1]
        logits = self.branch([maps[spec.name] for spec in self.specs], size)
        return found, [*losses.values(), *more.values()], logits

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """The sum of those of Mask R-CNN, and that of the branch; targets have a map "semantic"."""
        _, losses, logits = self._passed(images, targets)
        truth = torch.full((len(targets), *logits.shape[-2:]), _IGNORED, device=logits.device)
        for whole, target in zip(truth, targets, strict=True):
            part = target["semantic"]
            whole[: part.shape[0], : part.shape[1]] = part
        return torch.stack(losses).sum(), pixel_loss(logits, truth, _IGNORED)

    def forward(self, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """float32 3 x H x W in [0, 1] -> torchvision's detections, and logits 1 x classes x H x W."""
        (found,), _, logits = self._passed([image])
        return found, logits[..., : image.shape[-2], : image.shape[-1]]


def panoptic_example(data: PanopticSet, draw: Draw, longest: int) -> Example:
    """One image as it is trained on: boxes, labels and masks of its things, and the map "semantic" of its stuff.

    A BadImageError where a file cannot be read; `longest` bounds the longer side.
    """
    image, segments = data.read(draw.image)
    size = scaled_size((image.shape[1], image.shape[2]), draw.short, longest)
    ids = scaled_mask(segments.ids, size, 0, 0, size)
    scaled = scaled_image(image, size)
    if draw.mirror:
        scaled, ids = scaled.flip(2), ids.flip(1)
    semantic = torch.full(size, _IGNORED)
    things = torch.zeros_like(ids)
    stuff = [c for c, thing in enumerate(data.things) if not thing]
    for number, c in segments.classes.items():
        here = ids == number
        semantic[here] = 0 if data.things[c] else 1 + stuff.index(c)
        if data.things[c] and number not in segments.crowds:
            things[here] = number
    found = instances_of_ids(things)
    order = [c for c, thing in enumerate(data.things) if thing]
    numbers = things[things != VOID].unique().tolist()
    labels = torch.tensor([1 + order.index(segments.classes[n]) for n in numbers], dtype=torch.int64)
    masks = torch.stack([m.whole(size) for m in found.masks]) if numbers else torch.zeros(0, *size)
    target = {"boxes": found.boxes, "labels": labels, "masks": masks.to(torch.uint8), "semantic": semantic}
    return Example(scaled, target)


def train_panoptic(
    student: Student, data: PanopticSet, config: PanopticConfig, *, run: LongRun = UNKEPT
) -> PanopticFPN:
    """A Panoptic FPN in evaluation mode, trained as `dreamteacher.downstream.detection.train` trains Mask R-CNN.

    The student is copied. What cannot be read of the data, which show things, gives way to the next image.
    """
    device, detect, count = device_of(student), config.detect, len(data)

    def make(draw: Draw) -> Example:
        for i in range(count):
            with contextlib.suppress(BadImageError):
                return panoptic_example(
                    data, draw._replace(image=(draw.image + i) % count), detect.longest_side
                )
        raise UserError(
            "None of the images with segments can be read.", "Check that the disk is still there."
        )

    with seeded(run.seed, device):
        model = PanopticFPN(copy.deepcopy(student), config, data.things, run.precision).to(device)

        def loss_of(images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
            things, stuff = model.losses(images, targets)
            return config.instance_weight * things + config.semantic_weight * stuff

        draws = training_draws(count, detect, step_generator(run.seed, 0, "panoptic"))
        fit(
            model.detector, model.branch, loss_of=loss_of, make=make, draws=draws, count=count, config=detect,
            run=run,
        )  # fmt: skip
    return model.eval()


def merge(masks: Tensor, classes: Tensor, scores: Tensor, stuff: Tensor, config: PanopticConfig) -> Segments:
    """Instances by falling score, each on what is left free; then stuff: no pixel has two segments.

    `masks` (bool K x H x W), `classes` (int64 K) and `scores` (float K) are of instances; `stuff` has each
    pixel's class id of stuff, or -1 where there is none (int64 H x W); the limits are those of
    `PanopticConfig`. The segments are numbered from 1, instances first; what nobody takes is void.

    Source: Kirillov et al., arXiv 1801.00868, sec. 6 (0.5, 0.5), and its public code (64 x 64 pixels of stuff).
    """
    ids = torch.full(stuff.shape, VOID, dtype=torch.int64)
    found: dict[int, int] = {}
    for i in scores.argsort(descending=True, stable=True).tolist():
        area = int(masks[i].sum())
        if float(scores[i]) < config.score or not area:
            continue
        free = masks[i] & (ids == VOID)
        left = int(free.sum())
        if not left or area - left > config.overlap * area:
            continue
        found[len(found) + 1] = int(classes[i])
        ids[free] = len(found)
    for c in stuff[stuff >= 0].unique().tolist():
        free = (stuff == c) & (ids == VOID)
        if int(free.sum()) >= max(1, config.stuff_area):
            found[len(found) + 1] = c
            ids[free] = len(found)
    return Segments(ids=ids, classes=found)


def predict_segments(model: PanopticFPN, image: Tensor, config: PanopticConfig) -> Segments:
    """The segments of one image (uint8 3 x H x W), at its own size."""
    size: Size = (image.shape[1], image.shape[2])
    scaled = scaled_size(size, config.detect.test_side, config.detect.longest_side)
    with frozen(model):
        found, logits = model(scaled_image(image, scaled).to(device_of(model)))
    keep = found["scores"] >= config.score
    things = at_size({name: part[keep] for name, part in found.items()}, scaled, size)
    masks = torch.zeros(len(things.masks), *size, dtype=torch.bool)
    for whole, mask in zip(masks, things.masks, strict=True):
        whole[:] = mask.whole(size)
    table = torch.tensor([-1, *model.stuff])
    assert things.scores is not None
    return merge(
        masks, torch.tensor(model.things)[things.labels - 1], things.scores,
        table[classes_at(logits, size)[0].cpu()], config,
    )  # fmt: skip


def panoptic(bench: Bench, images: int | None, seed: int) -> Iterator[Metric]:
    """PQ, SQ and RQ of all classes, things and stuff, after fine-tuning on images with things."""
    data, config = bench.data, bench.settings
    shown = data.pool.take(torch.tensor(data.pool.shown()))
    drawn = draw_images(len(shown), images or len(shown), seed)
    model = train_panoptic(bench.student, shown.take(drawn), config, run=bench.long_run(seed))
    counts = torch.zeros(len(data.test.names), 4, dtype=torch.float64)
    for i in tqdm(range(len(data.test)), desc="testing", disable=not sys.stderr.isatty()):
        try:
            image, truth = data.test.read(i)
        except BadImageError as error:
            raise UserError(
                f"'{error.path}' cannot be read any more: {error.reason}.",
                "Check that the disk is still there.",
            ) from None
        counts += panoptic_counts(predict_segments(model, image, config), truth, len(data.test.names))
    return iter(panoptic_quality(counts, data.test.things).items())


def _check_places(config: EvaluateConfig, _budgets: Budgets) -> None:
    if config.images is not None and layout_of(config.images) is not None:
        check(config.images, "panoptic")
    elif None in (config.images, config.masks, config.segments):
        raise UserError(*_NEEDS)


SEGMENTS = Group(
    name="panoptic", needs=_NEEDS, headline="pq",
    places=("images", "masks", "test_images", "test_masks", "segments", "test_segments"),
    given=lambda config: config.segments is not None,
    check=_check_places,
    load=_load,
)  # fmt: skip

TASK = Task(
    name="panoptic", what="panoptic segmentation", group=SEGMENTS, unit="images", config=PanopticConfig,
    budgets=lambda config: config.panoptic.detect.image_counts,
    long=True,
    check=lambda config: check_detect(config.panoptic.detect),
    run=panoptic,
)  # fmt: skip
