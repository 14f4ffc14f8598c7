"""Augmented batches from timm's transforms: a step is the same batch, bit for bit, with any number of workers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.data.image_set import ImageSet
from dreamteacher.data.images import Size
from dreamteacher.data.loader import load_ahead
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.features import Images, take
from dreamteacher.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to each image, by itself, in timm's words."""

    size: Size  # of what comes out
    scale: tuple[float, float] = (0.08, 1.0)  # smallest and largest share of the area that a crop keeps
    flip: float = 0.5  # probability of mirroring left to right
    rand_augment: str = ""  # timm's policy, "rand-m7-mstd0.5-inc1" for example; "": none
    erase: float = 0.0  # probability that a random rectangle is filled with noise
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # subtracted from each colour, which is then divided by std
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def transform(self) -> Any:
        """timm's training transform: a PIL image -> float32 3 x H x W; a UserError for an unknown policy."""
        create: Any = create_transform
        try:
            made = create(
                self.size, is_training=True, scale=self.scale, hflip=self.flip, color_jitter=None,
                auto_augment=self.rand_augment or None, interpolation="bicubic", mean=self.mean, std=self.std,
                re_prob=self.erase, re_mode="pixel",
            )  # fmt: skip
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"timm has no augmentation policy '{self.rand_augment}' ({str(error)[:80] or type(error).__name__}).",
                "Give one like rand-m9-mstd0.5-inc1, or none.",
            ) from error
        for op in (op for part in made.transforms for op in getattr(part, "ops", ())):
            if op.name.startswith("Posterize"):
                op.level_fn = functools.partial(_one_bit_or_more, op.level_fn)
        return made


def _one_bit_or_more(bits: Callable[[float, Any], tuple[int]], level: float, hparams: Any) -> tuple[int]:
    """What an image is posterised to: Pillow 13 refuses the 0 bits that timm asks for at its strongest."""
    return (max(1, *bits(level, hparams)),)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Within: the global generators that timm draws from start at `seed`; afterwards they are as they were.

    timm's augmentations and its Mixup take no generator: they draw from those of Python, numpy and torch.
    """
    # Reached through timm, whose generators they are: this package has none of its own.
    timm_module: Any = auto_augment
    python, numpy = timm_module.random, timm_module.np.random
    before = python.getstate(), numpy.get_state(), torch.get_rng_state()
    python.seed(seed)
    numpy.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        python.setstate(before[0])
        numpy.set_state(before[1])
        torch.set_rng_state(before[2])


def repeated_order(order: Tensor, repeats: int) -> Tensor:
    """Every index of an epoch's order several times in a row, cut to as many as there were.

    Repeated augmentation: an epoch is as long as ever and shows a part of the images.

    Source: Hoffer et al., arXiv 1901.09335; timm's `RepeatAugSampler` on one process is the oracle.
    """
    return order.repeat_interleave(repeats)[: len(order)]


class _Steps(Dataset[tuple[Tensor, Tensor]]):
    """Item k is what step k shows: a worker needs no history."""

    def __init__(
        self,
        images: Images,
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        repeats: int,
    ) -> None:
        self.images, self.transform = whole_images(images), augmentation.transform()
        self.batch_size, self.repeats = min(batch_size, len(images)), repeats
        self.seed = seed
        self.known: tuple[int, Tensor] | None = None  # the present epoch's order: a million take a while

    def indices(self, step: int) -> Tensor:
        """int64 indices of a step."""
        epoch, part = divmod(step, len(self.images) // self.batch_size)
        if self.known is None or self.known[0] != epoch:
            generator = step_generator(self.seed, epoch, "augment/order")
            permutation = torch.randperm(len(self.images), generator=generator)
            self.known = epoch, repeated_order(permutation, self.repeats)
        return self.known[1][part * self.batch_size : (part + 1) * self.batch_size]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        index = self.indices(step)
        shown = []
        for place, i in enumerate(index.tolist()):
            image = to_pil_image(take(self.images, torch.tensor([i]))[0])
            drawn = step_generator(self.seed, step * self.batch_size + place, "augment")
            with drawn_from(drawn.initial_seed()):
                shown.append(self.transform(image))
        return torch.stack(shown), index


def whole_images(images: Images) -> Images:
    """The same, those of files each as large as its file."""
    as_stored: dict[str, Any] = {"size": None, "cache": None}
    return replace(images, **as_stored) if isinstance(images, ImageSet) else images


def augmented_batches(
    images: Images,
    augmentation: Augmentation,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    repeats: int = 1,
    workers: int = 0,
    first: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches `first` to `steps` - 1, each the same wherever they begin, of files or a tensor.

    Every epoch has a new order and whole batches alone, cut to the size of the set. All is drawn from (seed,
    step, place in the batch), with any number of workers (processes; 0: this one).

    Yields:
        float32 N x 3 x H x W, as the augmentation normalises it; int64 N, the images' places in their set.
    """
    shown = _Steps(images, augmentation, batch_size, seed, repeats)
    yield from load_ahead(shown, range(first, steps), workers)
