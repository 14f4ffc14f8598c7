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

from dreamteacher.data.draws import draw_images
from dreamteacher.data.images import Size
from dreamteacher.data.layouts.table import check, layout_of
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.finetune import adamw_or_sgd, recalibrate, shuffled_batches
from dreamteacher.downstream.detection.config import DetectConfig, check_detect
from dreamteacher.downstream.detection.data import (
    Draw,
    Example,
    Instances,
    InstanceSet,
    cut_mask,
    example,
    example_batches,
    load_detection,
    scaled_image,
    scaled_size,
)
from dreamteacher.downstream.detection.model import build_detector
from dreamteacher.downstream.detection.scores import check_scores, scores_of
from dreamteacher.downstream.features import device_of, frozen
from dreamteacher.downstream.loop import UNKEPT, LongRun, run_steps
from dreamteacher.downstream.task import Bench, Budgets, Group, Task, always
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.optim import layer_decay_groups, lr_at, parameter_groups

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig

# Batches that the running statistics of BatchNorm are set from after the training, at most.
_CALIBRATION = 200
_NEEDS = "The detection tasks need instances.", "Give both --images and --instances."


def build_groups(model: GeneralizedRCNN, config: DetectConfig, *others: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with `factor`: the backbone's by depth, the rest of the detector, then `others`."""
    student = model.backbone.student
    head = nn.ModuleList([model.backbone.simple, model.backbone.fpn, model.rpn, model.roi_heads])
    groups: list[dict[str, Any]] = layer_decay_groups(student.model, config.weight_decay, config.layer_decay)
    for part in (head, *others):
        groups += [{**group, "factor": 1.0} for group in parameter_groups([part], config.weight_decay)]
    return [group for group in groups if group["params"]]


def rate_at(step: int, config: DetectConfig) -> float:
    """The learning rate of a step: linear warm-up, then cuts at the milestones, or a cosine without any."""
    warmup = max(1, round(config.warmup * config.steps))
    if not config.milestones:
        return lr_at(step, total=config.steps, warmup=warmup, peak=config.lr)
    passed = sum(step >= round(m * config.steps) for m in config.milestones)
    return config.lr * min(1.0, (step + 1) / warmup) * config.cut**passed


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


def fit(
    detector: GeneralizedRCNN,
    *others: nn.Module,
    loss_of: Callable[[list[Tensor], list[dict[str, Tensor]]], Tensor],
    make: Callable[[Draw], Example],
    draws: Sequence[list[Draw]],
    count: int,
    config: DetectConfig,
    run: LongRun,
) -> None:
    """Trains a detector, and `others` with it; then BatchNorm's statistics are set at the test's scale.

    Examples are made (`make`) of the `draws` of each batch; `loss_of` takes their images and targets on that
    device. `count` is the number of training images.
    """
    student, device = detector.backbone.student, device_of(detector)
    is_frozen = config.backbone_norm == "frozen"
    trained = nn.ModuleList([detector, *others]).train() if others else detector.train()
    for norm in student.modules() if is_frozen else ():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):  # keeps its statistics, weight and bias
            norm.eval().requires_grad_(False)
    groups = build_groups(detector, config, *others)
    optimizer = adamw_or_sgd(config.optimizer, groups, config.lr)

    def losses(draws: Sequence[list[Draw]]) -> Iterator[Tensor]:
        for batch in example_batches(make, draws, config.workers):
            yield loss_of(*_on(batch, device))

    stream = losses(draws[run.first :])
    run_steps(
        [trained], optimizer, lambda _step: [next(stream)], lambda step: rate_at(step, config),
        steps=config.steps, saved=run.saved, title="training",
    )  # fmt: skip

    size = min(config.batch_size, count)
    plain = [Draw(i, config.test_side, False) for i in range(count - count % size)]

    def calibrate() -> None:
        for part in (detector, detector.rpn, detector.roi_heads):  # it is what makes them sample boxes
            part.training = True
        for _ in losses([plain[i : i + size] for i in range(0, len(plain), size)][:_CALIBRATION]):
            pass

    parts = [detector.rpn, detector.roi_heads, detector.backbone.fpn, *(() if is_frozen else (student,))]
    recalibrate(nn.ModuleList(parts), calibrate)


def _on(batch: Sequence[Example], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [each.image.to(device) for each in batch]
    return images, [{name: part.to(device) for name, part in each.target.items()} for each in batch]


def train_detector(
    student: Student, data: InstanceSet, config: DetectConfig, *, cascade: bool, run: LongRun = UNKEPT
) -> GeneralizedRCNN:
    """A detector in evaluation mode. On a CPU the seed decides every bit; on a GPU RoIAlign adds in any order.

    The student is copied; images that show no object are left out. The run's seed is that of the heads, the
    batches, scales, mirroring, and of what torchvision draws (anchors, proposals).
    """
    check_detect(config)
    data = data.shown()
    device, count = device_of(student), len(data)
    draws = training_draws(count, config, step_generator(run.seed, 0, "detect"))
    with seeded(run.seed, device):
        model = build_detector(
            copy.deepcopy(student),
            config,
            classes=len(data.classes),
            cascade=cascade,
            precision=run.precision,
        ).to(device)
        fit(
            model, loss_of=lambda *batch: torch.stack(list(model(*batch).values())).sum(),
            make=lambda draw: example(data, draw, config.longest_side), draws=draws, count=count,
            config=config, run=run,
        )  # fmt: skip
    return model.eval()


def predict(model: GeneralizedRCNN, data: InstanceSet, config: DetectConfig) -> Iterator[Instances]:
    """What the detector finds in each image, at the image's own size; the truth is not looked at."""
    device = device_of(model)
    for index in range(len(data)):
        size = data.sizes[index]
        scaled = scaled_size(size, config.test_side, config.longest_side)
        with frozen(model):
            (found,) = model([scaled_image(data.image(index), scaled).to(device)])
        yield at_size(found, scaled, size)


def at_size(found: dict[str, Tensor], scaled: Size, size: Size) -> Instances:
    """torchvision's detections in a scaled image, in the image as it was."""
    found = {name: part.cpu() for name, part in found.items()}
    boxes = found["boxes"] * torch.tensor([size[1] / scaled[1], size[0] / scaled[0]]).repeat(2)
    masks = [  # one by one: a hundred masks of a large picture would fill the memory
        cut_mask(paste_masks_in_image(mask[None], box[None], size)[0, 0] >= 0.5)
        for mask, box in zip(found["masks"], boxes, strict=True)
    ]
    return Instances(boxes=boxes, labels=found["labels"], masks=tuple(masks), scores=found["scores"])


def _run(bench: Bench, images: int | None, seed: int, *, cascade: bool) -> Iterator[Metric]:
    """COCO's AP, AP50 and AP75 of boxes and masks, after training on images with objects."""
    check_scores()
    config, pool, test = bench.config.detect, bench.data.pool.shown(), bench.data.test
    drawn = draw_images(len(pool), len(pool) if images is None else images, seed)
    model = train_detector(bench.student, pool.take(drawn), config, cascade=cascade, run=bench.long_run(seed))
    found = list(predict(model, test, config))
    truth = [test.truth(i) for i in range(len(test))]
    return scores_of(truth, found, test.sizes, classes=len(test.classes), most=config.detections)


def _check_places(config: EvaluateConfig, _budgets: Budgets) -> None:
    if config.images is not None and layout_of(config.images) is not None:
        if config.instances is not None:
            raise UserError(f"'{config.images}' comes with its instances.", "Leave out --instances.")
        check(config.images, "instances")
    elif config.images is None or config.instances is None:
        raise UserError(*_NEEDS)
    elif config.test_images is not None and config.test_instances is None and config.test_masks is None:
        raise UserError("The test images have no instances.", "Give --test-instances too.")


def _check(config: EvaluateConfig) -> None:
    check_detect(config.detect)
    check_scores()


INSTANCES = Group(
    name="detection", needs=_NEEDS, headline="mask_ap",
    places=("images", "instances", "test_images", "test_instances"),
    given=lambda config: config.instances is not None,
    check=_check_places,
    load=load_detection,
)  # fmt: skip

TASK = Task(
    name="detect", what="Mask R-CNN", group=INSTANCES, unit="images", config=DetectConfig,
    budgets=lambda config: config.detect.image_counts,
    default=always, long=True,
    check=_check,
    run=functools.partial(_run, cascade=False),
)  # fmt: skip

CASCADE = dataclasses.replace(
    TASK, name="detect-cascade", what="Cascade Mask R-CNN", config=None, settings=("detect",),
    run=functools.partial(_run, cascade=True),
)  # fmt: skip
