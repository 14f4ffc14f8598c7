"""Fine-tuning at full size by published recipes, from timm's parts: all labels, streamed images, hours on a GPU.

`finetune` is the comparison with a few labels; this is the one whose numbers stand beside published ones. It
trains timm's own classifier (its pooling, final norm and head), so that layer decay and drop path are timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.data.mixup import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from dreamteacher.data.images import Size
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.augment import Augmentation, augmented_batches, drawn_from
from dreamteacher.downstream.classification.config import FinetuneFullConfig, Loss, check_numbers
from dreamteacher.downstream.classification.data import CLASSIFICATION, class_counts
from dreamteacher.downstream.classification.finetune import predict
from dreamteacher.downstream.features import Images, class_metrics, device_of
from dreamteacher.downstream.loop import UNKEPT, LongRun, run_steps
from dreamteacher.downstream.task import Bench, Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.plain_vit import fit, rebuilt_with
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast, seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.optim import Ema, build_optimizer, lr_at
from dreamteacher.runtime.settings import OptimizerName

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class FinetunePreset:
    """A published recipe: the settings of `FinetuneFullConfig`; 0, 1 or "" is none of a thing."""

    optimizer: OptimizerName
    epochs: float
    batch_size: int
    lr: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    loss: Loss
    smoothing: float
    mixup: float
    cutmix: float
    repeats: int
    rand_augment: str
    erase: float
    clip: float
    ema: float


PRESETS: dict[str, FinetunePreset] = {
    # ResNet-50, procedure A2: arXiv 2110.00476, table 2; 79.8 % top-1 on ImageNet at 224 x 224 without
    # pretraining. timm's LAMB clips at norm 1, and its files binarise mixed targets above 0.2. Compared with two public
    # uses of the recipe with timm's script (SpatialBias's README; "a2_resnet50" files): every value but the batch of
    # 2048, which the paper states, stands in them.
    "a2": FinetunePreset(
        optimizer="lamb", epochs=300, batch_size=2048, lr=5e-3, warmup_epochs=5, weight_decay=0.02,
        layer_decay=1.0, drop_path=0.05, loss="bce", smoothing=0.0, mixup=0.1, cutmix=1.0, repeats=3,
        rand_augment="rand-m7-mstd0.5-inc1", erase=0.0, clip=1.0, ema=0.0,
    ),
    # ConvNeXt-B: arXiv 2201.03545, table 5, left column; 83.8 % top-1 on ImageNet without pretraining. Compared, as is
    # the next one, with facebookresearch/ConvNeXt (MIT), TRAINING.md and the defaults of main.py.
    # Stochastic depth is 0.1, 0.4, 0.5 and 0.5 for T, S, B and L.
    "convnext": FinetunePreset(
        optimizer="adamw", epochs=300, batch_size=4096, lr=4e-3, warmup_epochs=20, weight_decay=0.05,
        layer_decay=1.0, drop_path=0.5, loss="ce", smoothing=0.1, mixup=0.8, cutmix=1.0, repeats=1,
        rand_augment="rand-m9-mstd0.5-inc1", erase=0.25, clip=0.0, ema=0.9999,
    ),
    # ConvNeXt-B after supervised ImageNet-22K: the same table, right column (its head also starts at 0.001 of its scale).
    "convnext-short": FinetunePreset(
        optimizer="adamw", epochs=30, batch_size=512, lr=5e-5, warmup_epochs=0, weight_decay=1e-8,
        layer_decay=0.8, drop_path=0.2, loss="ce", smoothing=0.1, mixup=0.0, cutmix=0.0, repeats=1,
        rand_augment="rand-m9-mstd0.5-inc1", erase=0.25, clip=0.0, ema=0.0,
    ),
}  # fmt: skip
_FINAL_LR = 1e-6
_BINARISE_ABOVE = 0.2


def recipe_of(config: FinetuneFullConfig) -> FinetunePreset:
    """The preset with what the config sets in its place; a UserError for what is out of range.

    Example:
        >>> recipe_of(FinetuneFullConfig(batch_size=512)).lr
        0.00125
    """
    preset = PRESETS[config.preset]
    given = {f.name: getattr(config, f.name) for f in fields(preset)}
    if given["rand_augment"] == "off":
        given["rand_augment"] = ""
    if given["lr"] is None and given["batch_size"] is not None:
        given["lr"] = preset.lr * given["batch_size"] / preset.batch_size
    recipe = FinetunePreset(**{k: getattr(preset, k) if v is None else v for k, v in given.items()})
    check_numbers(
        recipe, prefix="finetune-full: ", above=("epochs", "batch_size", "lr", "layer_decay", "repeats"),
        shares=("drop_path", "smoothing", "erase", "ema"),
        least=("warmup_epochs", "weight_decay", "mixup", "cutmix", "clip"),
    )  # fmt: skip
    if config.accumulate < 1 or recipe.batch_size % (2 * config.accumulate):
        raise UserError(
            f"finetune-full: a batch of {recipe.batch_size} has no {config.accumulate} even parts (mixup makes pairs).",
            "Give a multiple of twice --finetune-full.accumulate.",
        )
    Augmentation(size=(32, 32), rand_augment=recipe.rand_augment).transform()  # refuses an unknown policy
    return recipe


class TimmClassifier(nn.Module):
    """timm's classifier with a copy of a backbone's weights: images in [0, 1] -> logits.

    A UserError where timm's model has no stochastic depth, of which `drop_path` is the largest rate.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student, classes: int, drop_path: float = 0.0) -> None:
        super().__init__()
        extra = rebuilt_with(student.name, student.model)
        extra |= {"drop_path_rate": drop_path} if drop_path else {}
        try:
            model: Any = timm.create_model(student.name.split(".")[0], num_classes=classes, **extra)
        except TypeError as error:
            raise UserError(
                f"timm's '{student.name}' has no stochastic depth.", "Set --finetune-full.drop-path 0."
            ) from error
        found = model.load_state_dict(student.model.state_dict(), strict=False)
        heads = model.pretrained_cfg["classifier"]
        heads = (heads,) if isinstance(heads, str) else heads
        head = {f"{name}.{kind}" for name in heads for kind in ("weight", "bias")}
        assert not found.unexpected_keys
        assert set(found.missing_keys) <= head
        self.model, self.grid = model.to(memory_format=torch.channels_last), student.grid
        self.register_buffer("mean", student.mean.detach().clone(), persistent=False)
        self.register_buffer("std", student.std.detach().clone(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], N x 3 x H x W -> logits N x classes."""
        return self.logits((images - self.mean) / self.std)

    def logits(self, x: Tensor) -> Tensor:
        """Images that are normalised already, N x 3 x H x W -> logits N x classes."""
        x = fit(x, self.grid)
        return self.model(x.contiguous(memory_format=torch.channels_last))


def layer_groups(model: nn.Module, recipe: FinetunePreset) -> list[dict[str, Any]]:
    """timm's parameter groups by layer and decay, each with its "lr_scale"."""
    names: Any = getattr(model, "no_weight_decay", set)
    return param_groups_layer_decay(
        model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay, min_scale=0.0,
        no_weight_decay_list=names(),
    )  # fmt: skip


def loss_of(recipe: FinetunePreset) -> Callable[[Tensor, Tensor], Tensor]:
    """timm's loss: logits and class ids, or mixed targets (already smoothed), -> a mean."""
    mixed = bool(recipe.mixup or recipe.cutmix)
    if recipe.loss == "bce":
        return BinaryCrossEntropy(recipe.smoothing, target_threshold=_BINARISE_ABOVE if mixed else None)
    return SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(recipe.smoothing)


def batch_size_of(count: int, recipe: FinetunePreset, accumulate: int) -> int:
    """The recipe's, cut to `count` images in even parts, as mixup makes pairs; a UserError for too few."""
    batch_size = min(recipe.batch_size, count // (2 * accumulate) * 2 * accumulate)
    if batch_size < 2:
        raise UserError(
            f"{count} training images make no {accumulate} even parts.", "Lower accumulate, or add images."
        )
    return batch_size


def train_full(
    student: Student,
    images: Images,
    labels: Tensor,
    config: FinetuneFullConfig,
    *,
    classes: int,
    size: Size,
    run: LongRun = UNKEPT,
) -> TimmClassifier:
    """A classifier trained from a copy of the backbone, in evaluation mode, on the student's device.

    The images are uint8 N x 3 x H x W, or an image set, which is streamed; crops of them have `size`. The
    run's seed is that of the head, the order, all augmentation, and stochastic depth.
    """
    recipe, accumulate, saved = recipe_of(config), config.accumulate, run.saved
    device = device_of(student)
    mean, std = (tuple(v.flatten().tolist()) for v in (student.mean, student.std))
    augmentation = Augmentation(
        size=size, rand_augment=recipe.rand_augment, erase=recipe.erase, mean=mean, std=std
    )
    batch_size = batch_size_of(len(images), recipe, accumulate)
    per_epoch = len(images) // batch_size
    total, warmup = max(1, round(recipe.epochs * per_epoch)), round(recipe.warmup_epochs * per_epoch)
    loss_function = loss_of(recipe)
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
    batches = augmented_batches(
        images, augmentation, batch_size=batch_size, steps=total, seed=run.seed, repeats=recipe.repeats,
        workers=run.workers, first=run.first,
    )  # fmt: skip
    with seeded(run.seed, device):
        model = TimmClassifier(student, classes, recipe.drop_path).to(device).train()
        groups = [{**group, "factor": group["lr_scale"]} for group in layer_groups(model.model, recipe)]
        optimizer = build_optimizer(recipe.optimizer, groups, recipe.lr, (0.9, 0.999))
        ema = Ema(model, recipe.ema) if recipe.ema else None

        def rate_at(step: int) -> float:
            return lr_at(step, total=total, warmup=warmup, peak=recipe.lr, final=min(_FINAL_LR, recipe.lr))

        def losses_at(step: int) -> Iterator[Tensor]:
            batch, index = next(batches)
            parts = zip(batch.chunk(accumulate), labels[index].chunk(accumulate), strict=True)
            for number, (x, target) in enumerate(parts):
                x, target = x.to(device, memory_format=torch.channels_last), target.to(device)
                if mixup is not None:
                    drawn = step_generator(run.seed, step * accumulate + number, "mixup").initial_seed()
                    with drawn_from(drawn):
                        x, target = mixup(x, target)
                with autocast(device, run.precision):
                    logits = model.logits(x)  # normalised by the augmentation already
                yield loss_function(logits.float(), target) / accumulate

        run_steps(
            [model], optimizer, losses_at, rate_at, steps=total, saved=saved, clip=recipe.clip, ema=ema,
            title="finetune-full",
        )  # fmt: skip
    if ema is not None:
        model.load_state_dict(ema.tensors)
    return model.eval()


def finetune_full(bench: Bench, _budget: int | None, seed: int) -> Iterator[Metric]:
    """Accuracy, top-5, balanced accuracy and AUROC after fine-tuning on all labels by a published recipe.

    The test images are seen as the set decodes them: their whole centre, where A2 and ConvNeXt keep 95 % and
    87.5 % of the side.
    """
    data, size, run = bench.data, bench.config.size, bench.long_run(seed)
    classes = len(data.classes)
    model = train_full(
        bench.student, data.train, data.train_labels, bench.settings, classes=classes, size=size, run=run
    )
    return class_metrics(predict(model, data.test, **bench.passes()), data.test_labels)


def _fits(student: Student, config: EvaluateConfig) -> None:
    recipe = recipe_of(config.finetune_full)
    TimmClassifier(student, 2, recipe.drop_path)
    if config.train is not None:
        batch_size_of(class_counts(config.train).total(), recipe, config.finetune_full.accumulate)


TASK = Task(
    name="finetune-full", what="fine-tuning, published recipe", group=CLASSIFICATION,
    config=FinetuneFullConfig, long=True,
    check=lambda config: recipe_of(config.finetune_full),
    fits=_fits,
    run=finetune_full,
)  # fmt: skip
