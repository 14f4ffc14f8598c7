"""Detection and instance segmentation: Mask R-CNN and Cascade Mask R-CNN on a fine-tuned backbone."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dreamteacher.data.draws import check_draw, draw_images
from dreamteacher.data.images import Size
from dreamteacher.data.layouts.table import check, layout_of
from dreamteacher.data.seeds import step_generator
from dreamteacher.data.split import Split
from dreamteacher.downstream.classification.finetune import recalibrate, shuffled_batches
from dreamteacher.downstream.detection.config import DetectConfig, check_detect
from dreamteacher.downstream.detection.data import (
    Draw,
    Example,
    Instances,
    InstanceSet,
    cut_mask,
    example_batches,
    load_detection,
    scaled_image,
    scaled_size,
)
from dreamteacher.downstream.detection.model import build_detector
from dreamteacher.downstream.detection.scores import check_scores, scores_of
from dreamteacher.downstream.features import device_of, frozen
from dreamteacher.downstream.loop import Saved, run_steps
from dreamteacher.downstream.task import Bench, Budgets, Group, Task, always
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.optim import layer_decay_groups, lr_at, parameter_groups
from dreamteacher.runtime.settings import Precision

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig

# Batches that the running statistics of BatchNorm are set from after the training, at most.
_CALIBRATION = 200
_NEEDS = "The detection tasks need instances.", "Give both --images and --instances."


def build_groups(model: GeneralizedRCNN, config: DetectConfig) -> list[dict[str, Any]]:
    """Parameter groups with `factor`: the backbone's by depth, then everything else."""
    student = model.backbone.student
    head = nn.ModuleList([model.backbone.simple, model.backbone.fpn, model.rpn, model.roi_heads])
    groups: list[dict[str, Any]] = layer_decay_groups(student.model, config.weight_decay, config.layer_decay)
    groups += [{**group, "factor": 1.0} for group in parameter_groups([head], config.weight_decay)]
    return [group for group in groups if group["params"]]


def rate_at(step: int, config: DetectConfig) -> float:
    """The learning rate of a step: linear warm-up, then cuts at the milestones, or a cosine without any."""
    warmup = max(1, round(config.warmup * config.steps))
    if not config.milestones:
        return lr_at(step, total=config.steps, warmup=warmup, peak=config.lr)
    passed = sum(step >= round(m * config.steps) for m in config.milestones)
    return config.lr * min(1.0, (step + 1) / warmup) * config.cut**passed


def train_detector(
    student: Student,
    data: InstanceSet,
    config: DetectConfig,
    *,
    cascade: bool,
    seed: int,
    precision: Precision = "auto",
    log: Callable[[int, dict[str, float]], None] | None = None,
    saved: Saved | None = None,
) -> GeneralizedRCNN:
    """A detector in evaluation mode. On a CPU the seed decides every bit; on a GPU RoIAlign adds in any order.

    Args:
        student: left as it is; a fine-tuned copy of it is part of the result.
        data: images to train on; those that show no object are left out.
        config: see `DetectConfig`.
        cascade: Cascade Mask R-CNN instead of Mask R-CNN.
        seed: of the heads, the batches, scales, mirroring, and of what torchvision draws (anchors, proposals).
        precision: of the matrix products of the backbone and the FPN.
        log: called with (step, losses by name) before each update.
        saved: where the training is kept; None: it is not.

    Raises:
        UserError: for settings out of their range.
    """
    check_detect(config)
    device = device_of(student)
    data = data.shown()
    generator = step_generator(seed, 0, "detect")
    with seeded(seed, device):
        backbone = copy.deepcopy(student)
        model = build_detector(
            backbone, config, classes=len(data.classes), cascade=cascade, precision=precision
        )
        model.to(device).train()
        if config.backbone_norm == "frozen":
            freeze_norms(backbone)
        optimizer = make_optimizer(build_groups(model, config), config)
        draws = training_draws(len(data), config, generator)[saved.step if saved else 0 :]
        batches = example_batches(data, draws, config.longest_side, config.workers)

        def losses_at(step: int) -> list[Tensor]:
            losses: dict[str, Tensor] = model(*_on(next(batches), device))
            if log is not None:
                log(step, {name: float(loss.detach()) for name, loss in losses.items()})
            return [torch.stack(list(losses.values())).sum()]

        run_steps(
            [model], optimizer, losses_at, lambda step: rate_at(step, config),
            steps=config.steps, saved=saved, title="training",
        )  # fmt: skip

        def show(draws: Sequence[list[Draw]]) -> None:
            for batch in example_batches(data, draws, config.longest_side, config.workers):
                model(*_on(batch, device))

        calibrate(model, config, len(data), show)
    return model.eval()


def training_draws(count: int, config: DetectConfig, generator: torch.Generator) -> list[list[Draw]]:
    """What is random about each example of each batch of the training."""
    least, greatest = config.short_side
    sides = list(range(least, greatest + 1, 32))

    def one(index: int) -> Draw:
        side = sides[int(torch.randint(len(sides), (), generator=generator))]
        return Draw(index, side, config.flip and bool(torch.rand((), generator=generator) < 0.5))

    return [
        [one(index) for index in batch.tolist()]
        for batch in shuffled_batches(count, config.batch_size, config.steps, generator)
    ]


def _on(batch: Sequence[Example], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [each.image.to(device) for each in batch]
    return images, [{name: part.to(device) for name, part in each.target.items()} for each in batch]


def make_optimizer(groups: list[dict[str, Any]], config: DetectConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9, on groups from `build_groups`."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)


def freeze_norms(module: nn.Module) -> None:
    """Every BatchNorm keeps its statistics, weight and bias."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eval().requires_grad_(False)


def calibrate(
    model: GeneralizedRCNN, config: DetectConfig, count: int, show: Callable[[Sequence[list[Draw]]], None]
) -> None:
    """BatchNorm's statistics from the training images at the test's scale, on sampled boxes as in training.

    Args:
        model: in training mode; in evaluation mode afterwards.
        config: batch size, test side, and whether the backbone's norms are frozen.
        count: number of training images.
        show: computes the losses of batches of these draws.
    """
    size = min(config.batch_size, count)
    draws = [Draw(i, config.test_side, False) for i in range(count - count % size)]
    batches = [draws[i : i + size] for i in range(0, len(draws), size)][:_CALIBRATION]
    trained = [model.rpn, model.roi_heads, model.backbone.fpn]
    trained += [] if config.backbone_norm == "frozen" else [model.backbone.student]

    def forward() -> None:
        for part in (model, model.rpn, model.roi_heads):  # it is what makes them sample boxes
            part.training = True
        show(batches)

    recalibrate(nn.ModuleList(trained), forward)


def predict(model: GeneralizedRCNN, data: InstanceSet, config: DetectConfig) -> Iterator[Instances]:
    """What the detector finds in each image, at the image's own size.

    Args:
        model: left as it is.
        data: its truth is not looked at.
        config: test side, longest side.
    """
    device = device_of(model)
    for index in range(len(data)):
        size = data.sizes[index]
        scaled = scaled_size(size, config.test_side, config.longest_side)
        with frozen(model):
            (found,) = model([scaled_image(data.image(index), scaled).to(device)])
        yield _at_size({name: part.cpu() for name, part in found.items()}, scaled, size)


def _at_size(found: dict[str, Tensor], scaled: Size, size: Size) -> Instances:
    boxes = found["boxes"] * torch.tensor([size[1] / scaled[1], size[0] / scaled[0]]).repeat(2)
    masks = [  # one by one: a hundred masks of a large picture would fill the memory
        cut_mask(paste_masks_in_image(mask[None], box[None], size)[0, 0] >= 0.5)
        for mask, box in zip(found["masks"], boxes, strict=True)
    ]
    return Instances(boxes=boxes, labels=found["labels"], masks=tuple(masks), scores=found["scores"])


def detect(
    student: Student,
    data: Split[InstanceSet],
    config: DetectConfig,
    *,
    images: int | None,
    cascade: bool,
    seed: int,
    precision: Precision = "auto",
    saved: Saved | None = None,
) -> Iterator[Metric]:
    """COCO's AP, AP50 and AP75 of boxes and masks on the test images, after training on some of the pool.

    Args:
        student: where training starts; left as it is.
        data: images with instances; those to train on are drawn from its pool.
        config: see `DetectConfig`.
        images: images with objects to train on, drawn from the pool; none: all of them.
        cascade: Cascade Mask R-CNN instead of Mask R-CNN.
        seed: of the draw and of the training.
        precision: of the matrix products of the backbone and the FPN.
        saved: where the training is kept; None: it is not.

    Raises:
        UserError: faster-coco-eval is missing, or there are too few images.
    """
    check_scores()
    pool, test = data.pool.shown(), data.test
    drawn = draw_images(len(pool), len(pool) if images is None else images, seed)
    model = train_detector(
        student, pool.take(drawn), config, cascade=cascade, seed=seed, precision=precision, saved=saved
    )
    found = list(predict(model, test, config))
    truth = [test.truth(i) for i in range(len(test))]
    yield from scores_of(truth, found, test.sizes, classes=len(test.classes), most=config.detections)


def _given(config: EvaluateConfig) -> bool:
    return config.instances is not None


def _check_places(config: EvaluateConfig, _budgets: Budgets) -> None:
    if config.images is not None and layout_of(config.images) is not None:
        if config.instances is not None:
            raise UserError(f"'{config.images}' comes with its instances.", "Leave out --instances.")
        check(config.images, "instances")
    elif config.images is None or config.instances is None:
        raise UserError(*_NEEDS)
    elif config.test_images is not None and config.test_instances is None and config.test_masks is None:
        raise UserError("The test images have no instances.", "Give --test-instances too.")


def _load(config: EvaluateConfig, budgets: Budgets) -> Split[InstanceSet]:
    assert config.images is not None
    data = load_detection(config.images, config.instances, config.test_images, config.test_instances)
    check_draw(len(data.pool.shown()), budgets)
    return data


def _check(config: EvaluateConfig) -> None:
    check_detect(config.detect)
    check_scores()


def _run(bench: Bench, images: int | None, seed: int, *, cascade: bool) -> Iterator[Metric]:
    config, saved = bench.config, bench.saved
    return detect(
        bench.student,
        bench.data,
        config.detect,
        images=images,
        cascade=cascade,
        seed=seed,
        precision=config.precision,
        saved=saved,
    )


INSTANCES = Group(
    name="detection",
    needs=_NEEDS,
    headline="mask_ap",
    places=("images", "instances", "test_images", "test_instances"),
    given=_given,
    check=_check_places,
    load=_load,
)

TASK = Task(
    name="detect",
    what="Mask R-CNN",
    group=INSTANCES,
    unit="images",
    config=DetectConfig,
    budgets=lambda config: config.detect.image_counts,
    default=always,
    long=True,
    check=_check,
    run=functools.partial(_run, cascade=False),
)

CASCADE = dataclasses.replace(
    TASK,
    name="detect-cascade",
    what="Cascade Mask R-CNN",
    config=None,
    settings=("detect",),
    run=functools.partial(_run, cascade=True),
)
