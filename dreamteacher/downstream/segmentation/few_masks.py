"""Learning from a few masks: a light UPerNet head, or a linear classifier of pixels."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from dreamteacher.data.draws import draw_images
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.finetune import recalibrate, shuffled_batches, train
from dreamteacher.downstream.classification.probes import choose_l2, fit_logistic, standardisation
from dreamteacher.downstream.features import device_of, frozen, to_input
from dreamteacher.downstream.segmentation.config import SegmentConfig
from dreamteacher.downstream.segmentation.data import IN_MEMORY
from dreamteacher.downstream.task import Bench, Task, always
from dreamteacher.downstream.tasks import Metric
from dreamteacher.metrics import confusion, iou_per_class, mean_iou
from dreamteacher.models.distilled import REGRESSOR, neck_weights
from dreamteacher.models.regressor import LabelHead, Neck, resize
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast, seeded
from dreamteacher.runtime.settings import Precision
from dreamteacher.spec import FeatureSpec

# The maps of the labelled images are kept when they take less than this; else they are computed each step.
_MAPS_BYTES = 2 << 30


# Pixels that the linear probe is fitted on, at most: bounds its memory (float64) and time.
_LINEAR_PIXELS = 20_000
_L2_GRID = (1.0, 0.1, 0.01, 0.001)


class SegmentationHead(nn.Module):
    """UPerNet's neck, its maps side by side at the finest stride, and a per-pixel classifier.

    `specs` are the backbone's levels, fine to coarse; `width` is that of every inner map. `norm` normalises
    each level's channels first (LayerNorm), which ConvNeXt's raw maps need.

    Source: UPerNet, arXiv 1807.10221; narrower than the 512 channels there. Equal to segmentation-models-pytorch's
    with its weights, but for the last resize: `tests/downstream/segmentation/test_upernet.py`.
    """

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        classes: int,
        width: int = 64,
        dropout: float = 0.1,
        *,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(spec.channels) for spec in specs) if norm else None
        self.neck = Neck(specs, width)
        self.head = LabelHead(len(self.neck.specs), width, classes, dropout=dropout)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """One map per level -> float32 logits N x classes x H x W of `size` = (H, W)."""
        if self.norms is not None:
            maps = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        return resize(self.head(self.neck(maps)).float(), size)


class Segmenter(nn.Module):
    """A backbone and its segmentation head, both taken in; `auxiliary` is a second one, for training."""

    def __init__(self, student: Student, head: nn.Module, auxiliary: nn.Module | None = None) -> None:
        super().__init__()
        self.student, self.head, self.auxiliary = student, head, auxiliary

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], N x 3 x H x W -> logits N x classes x H x W."""
        return self.head(self.student(images), (images.shape[-2], images.shape[-1]))


def pixel_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy averaged over the pixels that are not ignored; 0 when all are."""
    total = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp_min(1)


def train_segmenter(
    student: Student,
    images: Tensor,
    masks: Tensor,
    config: SegmentConfig,
    *,
    classes: int,
    freeze: bool,
    seed: int,
    ignore_index: int = 255,
    precision: Precision = "auto",
    neck: Mapping[str, Tensor] | None = None,
) -> Segmenter:
    """A segmenter in evaluation mode, with a copy of the backbone, frozen or fine-tuned.

    The labelled images are uint8 N x 3 x H x W, N >= 2, their masks N x H x W class ids (int64); `freeze`
    trains the head alone. `neck` is where the head's neck starts (mixed pretraining transfers it); the head
    then has its width.
    """
    width = config.width if neck is None else int(neck["laterals.0.0.weight"].shape[0])
    device = device_of(student)
    images, masks = images.to(device), masks.to(device)
    size = (images.shape[-2], images.shape[-1])
    generator = step_generator(seed, 0, "segment")
    with seeded(seed, device):
        head = SegmentationHead(student.specs, classes, width, config.dropout).to(device)
        if neck is not None:
            head.neck.load_state_dict(neck)
        head = head.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        backbone = copy.deepcopy(student).train(not freeze)
        maps_of = _frozen_maps(backbone, images, config, precision) if freeze else None
        batches = shuffled_batches(len(images), config.batch_size, config.steps, generator)

        def forward(index: Tensor, mirror: bool) -> Tensor:
            with autocast(device, precision):
                if maps_of is not None:
                    return head(maps_of(index, mirror), size)
                batch = to_input(images[index], device)
                return head(backbone(batch.flip(3) if mirror else batch), size)

        def loss_at(step: int) -> Tensor:
            index = next(batches).to(device)
            # One draw for the whole batch: the frozen maps of mirrored images are stored beside the others.
            mirror = config.flip and bool(torch.rand((), generator=generator) < 0.5)
            target = masks[index].flip(2) if mirror else masks[index]
            return pixel_loss(forward(index, mirror), target, ignore_index)

        parts: list[tuple[nn.Module, float]] = [(head, 1.0)]
        parts += [] if freeze else [(backbone, config.backbone_lr_factor)]
        train(parts, loss_at, steps=config.steps, lr=config.lr, weight_decay=config.weight_decay)

        def calibrate() -> None:
            for index in torch.arange(len(images), device=device).tensor_split(-(-len(images) // 32)):
                forward(index, False)

        recalibrate(head if freeze else nn.ModuleList([backbone, head]), calibrate)
    return Segmenter(backbone, head).eval()


def _frozen_maps(
    student: Student, images: Tensor, config: SegmentConfig, precision: Precision
) -> Callable[[Tensor, bool], list[Tensor]]:
    """(indices, mirrored) -> the frozen backbone's maps of these images, computed once where they fit."""
    device = device_of(student)

    def computed(index: Tensor, mirror: bool) -> list[Tensor]:
        parts = []
        with frozen(student), autocast(device, precision):
            for part in index.split(64):
                batch = to_input(images[part], device)
                parts.append(student(batch.flip(3) if mirror else batch))
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    height, width = images.shape[-2:]
    per_image = sum(s.channels * (height // s.stride) * (width // s.stride) for s in student.specs)
    sides = (False, True) if config.flip else (False,)
    if 4 * per_image * len(images) * len(sides) > _MAPS_BYTES:
        return computed
    kept = {side: computed(torch.arange(len(images), device=device), side) for side in sides}
    return lambda index, mirror: [m[index] for m in kept[mirror]]


def score(
    predictions: Iterable[tuple[Tensor, Tensor]],
    names: Sequence[str],
    ignore_index: int,
    *,
    pixels: bool = False,
) -> Iterator[Metric]:
    """mIoU and the IoU of each class that occurs, over batches of (class ids, target ids).

    `pixels`: also the accuracy of pixels, and its mean over the classes. The target `ignore_index` is left
    out.
    """
    matrix = torch.zeros(len(names), len(names), dtype=torch.int64)
    for pred, target in predictions:
        matrix += confusion(pred.cpu(), target.cpu(), len(names), ignore_index)
    yield "miou", mean_iou(matrix)
    if pixels:
        hits, members = matrix.diagonal().double(), matrix.sum(1).double()
        yield "accuracy", float(hits.sum() / members.sum())
        yield "mean_accuracy", float((hits / members).nanmean())
    for name, iou in zip(names, iou_per_class(matrix).tolist(), strict=True):
        if iou == iou:
            yield f"iou/{name}", iou


def score_segmenter(
    model: nn.Module,
    test: LabelledSet,
    ignore_index: int,
    *,
    precision: Precision = "auto",
    batch_size: int = 64,
) -> Iterator[Metric]:
    """mIoU and per-class IoU of a model (images in [0, 1] -> logits of their size) on a test set."""
    device = device_of(model)

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(len(test.images)).split(batch_size):
            with frozen(model), autocast(device, precision):
                yield model(to_input(test.images[index], device)).argmax(1), test.targets[index]

    yield from score(predictions(), test.classes, ignore_index)


def segment_linear(bench: Bench, masks: int | None, seed: int) -> Iterator[Metric]:
    """mIoU and per-class IoU of a linear classifier of each pixel's frozen features.

    Every level is resized to the finest one and concatenated; the classifier is fitted there and its logits
    are resized to the image. Its L2 strength is chosen by cross-validation over whole labelled images.
    """
    assert masks is not None
    student, precision, ignore_index = bench.student, bench.config.precision, bench.config.ignore_index
    pool, test = bench.data.pool, bench.data.test
    drawn = draw_images(len(pool.images), masks, seed)
    columns = _columns(student, pool.images[drawn], precision)
    finest = (columns.shape[-2], columns.shape[-1])
    coarse = F.interpolate(pool.targets[drawn].float()[:, None], size=finest, mode="nearest-exact")[:, 0]
    y = coarse.long().flatten().to(columns.device)
    x = columns.movedim(1, 3).flatten(0, 2)
    image = torch.arange(len(drawn), device=x.device).repeat_interleave(finest[0] * finest[1])
    keep = (y != ignore_index).nonzero().flatten()
    if len(keep) > _LINEAR_PIXELS:
        order = torch.randperm(len(keep), generator=step_generator(seed, 0, "pixels"))
        keep = keep[order[:_LINEAR_PIXELS].to(keep.device)]
    x, y, image = x[keep], y[keep], image[keep]
    mean, deviation = standardisation(x)
    x = (x.double() - mean) / deviation
    l2 = choose_l2(x, y, image % min(3, masks), classes=len(pool.classes), grid=_L2_GRID)
    weight, bias = fit_logistic(x, y, classes=len(pool.classes), l2=l2, tolerance=1e-4)
    scaled = (weight / deviation).float()
    shift = (bias - (weight / deviation) @ mean).float()

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(len(test.images)).split(bench.config.batch_size):
            maps = _columns(student, test.images[index], precision)
            logits = torch.einsum("nchw,kc->nkhw", maps, scaled) + shift[:, None, None]
            target = test.targets[index]
            yield resize(logits, (target.shape[-2], target.shape[-1])).argmax(1), target

    yield from score(predictions(), pool.classes, ignore_index)


def _columns(student: Student, images: Tensor, precision: Precision, batch_size: int = 64) -> Tensor:
    """All levels of each position of the finest one: N x (sum of channels) x H/4 x W/4, float32."""
    device = device_of(student)
    parts = []
    for batch in images.split(batch_size):
        with frozen(student), autocast(device, precision):
            maps = [m.float() for m in student(to_input(batch, device))]
        finest = (maps[0].shape[-2], maps[0].shape[-1])
        parts.append(torch.cat([resize(m, finest) for m in maps], dim=1))
    return torch.cat(parts)


def _run(bench: Bench, masks: int | None, seed: int, *, freeze: bool) -> Iterator[Metric]:
    """mIoU and per-class IoU on the test set after training with images drawn from the pool."""
    assert masks is not None
    config, pool = bench.config, bench.data.pool
    drawn = draw_images(len(pool.images), masks, seed)
    model = train_segmenter(
        bench.student, pool.images[drawn], pool.targets[drawn], config.segment, classes=len(pool.classes),
        freeze=freeze, seed=seed, ignore_index=config.ignore_index, precision=config.precision,
        neck=neck_weights(bench.run_folder()) if config.neck else None,
    )  # fmt: skip
    return score_segmenter(model, bench.data.test, config.ignore_index, **bench.passes())


FINETUNE = Task(
    name="segment-finetune", what="segmentation, fine-tuned", group=IN_MEMORY, unit="masks",
    settings=("segment",),
    budgets=lambda config: config.mask_counts,
    default=always,
    files=lambda config: (Path(config.init).expanduser() / REGRESSOR,) if config.neck else (),
    run=functools.partial(_run, freeze=False),
)  # fmt: skip

FROZEN = dataclasses.replace(
    FINETUNE, name="segment-frozen", what="segmentation, frozen backbone",
    run=functools.partial(_run, freeze=True),
)  # fmt: skip

LINEAR = Task(
    name="segment-linear", what="segmentation, linear per pixel", group=IN_MEMORY, unit="masks",
    budgets=lambda config: config.mask_counts,
    default=always,
    run=segment_linear,
)  # fmt: skip
