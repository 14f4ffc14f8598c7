"""What `evaluate` is asked for, and the checks of it that read no image."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TypeVar

from dreamteacher.downstream.classification.config import (
    FinetuneConfig,
    FinetuneFullConfig,
    LinearSgdConfig,
    check_numbers,
)
from dreamteacher.downstream.detection.config import DetectConfig, PanopticConfig
from dreamteacher.downstream.segmentation.config import ReadoutConfig, SegmentConfig, SemanticConfig
from dreamteacher.downstream.tasks import ADDED, place_of
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import LoggerName, OnDevice

T = TypeVar("T")


def added_settings(cls: type[T]) -> type[T]:
    """The class with one more field for each added task that has settings of its own (see `tasks.ADDED`).

    The task's module is imported here: `evaluate --help` is as quick as that.
    """
    extra = []
    for name, place in ADDED.items():
        module, _, attribute = place.partition(":")
        config = getattr(importlib.import_module(module), attribute).config
        if config is not None:
            extra.append((name.replace("-", "_"), config, field(default_factory=config)))
    if not extra:
        return cls
    return make_dataclass(
        cls.__name__, extra, bases=(cls,), namespace={"__module__": cls.__module__, "__doc__": cls.__doc__},
        frozen=True, kw_only=True,
    )  # fmt: skip


@added_settings
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(OnDevice):
    """Evaluate any backbone: kNN, linear probe, fine-tuning, segmentation, detection, with a few labels."""

    preset: str | None = None
    """Begin with the published settings of a benchmark (`list presets`); settings that are given win."""
    student: str | None = None
    """timm name of the backbone; none: the one that a run or export in `init` was made with."""
    init: str = "random"
    """random, imagenet (timm's weights), or the path of weights, an export folder or a run folder."""
    tasks: tuple[str, ...] = ()
    """Which tasks (`list tasks`); none: all that the folders allow, but linear-sgd, finetune-full, semantic, readout, panoptic (long)."""
    train: Path | None = None
    """Folder with one subfolder of images per class, or imagenet:ROOT: for knn, linear, finetune."""
    test: Path | None = None
    """Folder with the same classes, for their scores; none: the validation part of the layout in `train`."""
    images: Path | None = None
    """Images that have masks (or instances); or LAYOUT:ROOT (ade20k ...), masks included."""
    masks: Path | None = None
    """Their masks: a folder of images of class ids, a COCO-style JSON file, or a folder of .npy files."""
    test_images: Path | None = None
    """Images for these scores; none: a layout's own, half of `images`, or where `test_instances` are."""
    test_masks: Path | None = None
    """Their masks."""
    binary_masks: bool = False
    """Masks are black and white: class 0 and class 1."""
    ignore_index: int = 255
    """Id in the masks that is neither learned nor scored."""
    instances: Path | None = None
    """COCO JSON file, or folder of PNGs (0 = background, k = k-th object) under the images' names; none for a layout."""
    test_instances: Path | None = None
    """As `instances`, for the detection scores; none: half of the images is set aside."""
    segments: Path | None = None
    """COCO-panoptic JSON file, for panoptic; its PNGs are in `masks`."""
    test_segments: Path | None = None
    """As `segments`, of `test_images` and `test_masks`; none: half of the images is set aside."""
    labels: tuple[int, ...] = (10, 50)
    """Labelled images per class for linear and finetune; each number is a result of its own."""
    mask_counts: tuple[int, ...] = (10,)
    """Labelled images for the segmentation tasks; each number is a result of its own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of draws, heads and batches; a random backbone is a new one for each."""
    size: tuple[int, int] = (224, 224)
    """Height and width in pixels, multiples of 32."""
    neck: bool = False
    """Start the segmentation head's neck from the run's (what mixed pretraining transfers beside the backbone)."""
    knn_k: int = 20
    """Neighbours of knn."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Training of finetune."""
    linear_sgd: LinearSgdConfig = field(default_factory=LinearSgdConfig)
    """Training of linear-sgd."""
    finetune_full: FinetuneFullConfig = field(default_factory=FinetuneFullConfig)
    """Training of finetune-full."""
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    """Training of segment-frozen and segment-finetune."""
    detect: DetectConfig = field(default_factory=DetectConfig)
    """Detector and training of detect and detect-cascade."""
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """Training and test of semantic."""
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)
    """Training of readout."""
    panoptic: PanopticConfig = field(default_factory=PanopticConfig)
    """Model and training of panoptic."""
    batch_size: int = 128
    """Images at once where nothing is trained: changes speed and memory only."""
    strict: bool = False
    """Stop at a damaged image instead of leaving it out."""
    cache_gb: float = 2.0
    """Decoded images are kept in memory up to this size."""
    workers: int = 2
    """Processes that decode images."""
    method: str | None = None
    """What the rows are called in tables; none: random init, ImageNet, DreamTeacher or the path's name."""
    out: Path | None = None
    """Folder whose results.jsonl the rows are added to; rows that are there already are not computed again."""
    save_minutes: float = 10.0
    """Minutes between checkpoints of a long training in `out`, 0: only at its end; the same command resumes it."""
    log_to: tuple[LoggerName, ...] = ()
    """Services that the log of a long training also goes to; each is an extra of its name."""
    dry_run: bool = False
    """Only check settings, data and weights, and print what would be done."""

    def __post_init__(self) -> None:
        for name in self.tasks:
            place_of(name)
        for setting, least in (("labels", 1), ("mask_counts", 2), ("seeds", 0)):
            values = getattr(self, setting)
            if not values or min(values) < least or len(set(values)) < len(values):
                raise UserError(
                    f"{setting} = {values or 'nothing'}: expected different numbers, each at least {least}.",
                    f"Give for example {EvaluateConfig.__dataclass_fields__[setting].default}.",
                )
        if any(side < 32 or side % 32 for side in self.size):
            raise UserError(
                f"size {self.size[0]}x{self.size[1]} does not fit strides up to 32.",
                "Give height and width as multiples of 32.",
            )
        check_numbers(self, above=("batch_size", "knn_k"), least=("save_minutes",))
