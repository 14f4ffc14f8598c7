"""Semantic segmentation at full size (ADE20K, Cityscapes, BDD100K), and the read-out: crops from the disk.

Source: section 8 and appendix of arXiv 2307.07487; what it leaves open follows MMSegmentation's UPerNet settings
(auxiliary head, crops of which no class fills more than three quarters, sliding windows).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from dreamteacher.data.masks.reader import MaskedImages
from dreamteacher.downstream.classification.finetune import train
from dreamteacher.downstream.features import device_of, frozen, to_input
from dreamteacher.downstream.loop import UNKEPT, LongRun
from dreamteacher.downstream.segmentation.config import ReadoutConfig, SemanticConfig
from dreamteacher.downstream.segmentation.crops import FILL, crops, drawn_files, whole_images
from dreamteacher.downstream.segmentation.data import STREAMED
from dreamteacher.downstream.segmentation.few_masks import SegmentationHead, Segmenter, pixel_loss, score
from dreamteacher.downstream.task import Bench, Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.regressor import resize
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast, seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import Precision
from dreamteacher.spec import FeatureSpec

# Classes whose logits are enlarged at once: bounds the memory of large test images.
_CLASSES_AT_ONCE = 16


class ReadoutHead(nn.Module):
    """torchvision's FCN head (arXiv 1411.4038) on the map of one `level` of `specs`."""

    def __init__(
        self, specs: Sequence[FeatureSpec], classes: int, level: int = -1, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.level, self.head = level, FCNHead(specs[level].channels, classes)
        self.head[3].p = dropout

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """One map per level -> float32 logits N x classes x H x W of `size` = (H, W)."""
        return resize(self.head(maps[self.level]).float(), size)


def train_dense(
    student: Student,
    files: MaskedImages,
    config: SemanticConfig,
    make_head: Callable[[], nn.Module],
    *,
    freeze: bool,
    run: LongRun = UNKEPT,
) -> Segmenter:
    """A head, made within the seed's random numbers, and a copy of the backbone, trained on crops.

    `freeze` trains the head alone: the backbone stays in evaluation mode.
    """
    device = device_of(student)
    ignored = files.ignore_index
    with seeded(run.seed, device):
        head = make_head()
        second = None
        if config.auxiliary and not freeze:
            second = ReadoutHead(
                student.specs, len(files.classes), -min(2, len(student.specs)), config.dropout
            )
        model = Segmenter(copy.deepcopy(student), head, second).to(device)
        model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        batches = crops(
            files, config.crops, steps=config.steps, batch_size=config.batch_size, seed=run.seed,
            workers=run.workers, first=run.first,
        )  # fmt: skip

        def loss_at(step: int) -> Tensor:
            images, masks = next(batches)
            target = masks.to(device)
            with autocast(device, run.precision):
                with frozen(model.student) if freeze else contextlib.nullcontext():
                    maps = model.student(to_input(images, device))
                logits = head(maps, config.crops.size)
                extra = None if second is None else second(maps, config.crops.size)
            loss = pixel_loss(logits, target, ignored)
            return loss if extra is None else loss + config.auxiliary * pixel_loss(extra, target, ignored)

        trained: list[tuple[nn.Module, float]] = [(part, 1.0) for part in (head, second) if part is not None]
        trained += [] if freeze else [(model.student, config.backbone_lr_factor)]
        train(
            trained, loss_at, steps=config.steps, lr=config.lr, weight_decay=config.weight_decay,
            warmup=config.warmup, optimizer=config.optimizer, power=config.power, saved=run.saved,
            title="training",
        )  # fmt: skip
    return model.eval()


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin so that they cover `length`; the last one ends with it.

    Example:
        >>> window_starts(1000, 512, 1 / 3)
        [0, 341, 488]
    """
    step = max(1, int(window * (1 - overlap)))
    count = max(0, -(-(length - window) // step)) + 1
    return [max(0, min(i * step, length - window)) for i in range(count)]


def predict_logits(model: nn.Module, image: Tensor, config: SemanticConfig) -> Tensor:
    """Logits 1 x classes x H x W of one image, whole or averaged over windows of the crops' size.

    The image, uint8 3 x H x W and scaled as it is to be seen, is filled up to multiples of 32 (or to one
    window).
    """
    device = device_of(model)
    height, width = image.shape[1:]
    slide, size = config.test == "slide", config.crops.size
    tall = max(size[0], height) if slide else -(-height // 32) * 32
    wide = max(size[1], width) if slide else -(-width // 32) * 32
    pixels = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, tall, wide)
    pixels[:, :height, :width] = image
    batch = to_input(pixels[None], device)
    if not slide:
        return model(batch)[..., :height, :width]
    total = torch.zeros(())
    seen = torch.zeros(tall, wide, device=device)
    for top in window_starts(tall, size[0], config.overlap):
        for left in window_starts(wide, size[1], config.overlap):
            rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
            logits = model(batch[..., rows, columns])
            if total.ndim == 0:
                total = logits.new_zeros(1, logits.shape[1], tall, wide)
            total[..., rows, columns] += logits
            seen[rows, columns] += 1
    return (total / seen)[..., :height, :width]


def classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """resize(logits, size).argmax(1) of N x classes x H x W, a few classes at a time."""
    best, found = None, torch.empty(0)
    for first in range(0, logits.shape[1], _CLASSES_AT_ONCE):
        value, index = resize(logits[:, first : first + _CLASSES_AT_ONCE], size).max(1)
        if best is None:
            best, found = value, index
        else:
            found = torch.where(value > best, index + first, found)
            best = torch.maximum(best, value)
    return found


def score_files(
    model: nn.Module,
    files: MaskedImages,
    config: SemanticConfig,
    *,
    precision: Precision = "auto",
    workers: int = 0,
) -> Iterator[Metric]:
    """mIoU, accuracy of pixels, their mean accuracy over classes, IoU per class, at the masks' own resolution.

    A UserError where an image or mask cannot be read any more.
    """
    device = device_of(model)

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        for image, mask in whole_images(files, config.crops.short_side, workers=workers):
            with frozen(model), autocast(device, precision):
                logits = predict_logits(model, image, config)
            yield classes_at(logits.float(), (mask.shape[0], mask.shape[1]))[0], mask

    return score(predictions(), files.classes, files.ignore_index, pixels=True)


def semantic(bench: Bench, masks: int | None, seed: int) -> Iterator[Metric]:
    """Metrics of `score_files` after fine-tuning a UPerNet on streamed crops."""
    student, config, run = bench.student, bench.settings, bench.long_run(seed)
    files = drawn_files(bench.data.pool, masks, seed)
    head = functools.partial(
        SegmentationHead, student.specs, len(files.classes), config.width, config.dropout, norm=config.norm
    )
    model = train_dense(student, files, config, head, freeze=False, run=run)
    return score_files(model, bench.data.test, config, precision=run.precision, workers=run.workers)


def level_of(student: Student, config: ReadoutConfig) -> int:
    """The number of the map that is read; a UserError where the backbone has none of that stride."""
    strides = [spec.stride for spec in student.specs]
    if config.stride not in strides:
        raise UserError(
            f"'{student.name}' has no map of stride {config.stride}.",
            f"Set --readout.stride to one of {', '.join(map(str, strides))}.",
        )
    return strides.index(config.stride)


def readout(bench: Bench, masks: int | None, seed: int) -> Iterator[Metric]:
    """Metrics of `score_files` of a head on the frozen backbone's map of one stride.

    Source: section 8 of arXiv 2307.07487: frozen backbone, FCN, SGD 0.01, poly 0.9, 20k iterations. Neither the
    head's layers nor the map are stated: torchvision's FCN head on the coarsest map, not dilated.
    """
    student, config, run = bench.student, bench.settings, bench.long_run(seed)
    files, training, level = bench.data.pool, config.training(), level_of(student, config)
    head = functools.partial(ReadoutHead, student.specs, len(files.classes), level, config.dropout)
    model = train_dense(student, drawn_files(files, masks, seed), training, head, freeze=True, run=run)
    return score_files(model, bench.data.test, training, precision=run.precision, workers=run.workers)


TASK = Task(
    name="semantic", what="segmentation, full size", group=STREAMED, unit="masks", config=SemanticConfig,
    budgets=lambda config: config.semantic.mask_counts,
    long=True,
    run=semantic,
)  # fmt: skip

READOUT = Task(
    name="readout", what="read-out, frozen backbone", group=STREAMED, unit="masks", config=ReadoutConfig,
    budgets=lambda config: config.readout.mask_counts,
    long=True,
    fits=lambda student, config: level_of(student, config.readout),
    run=readout,
)  # fmt: skip
