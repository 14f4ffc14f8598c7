"""DatasetDDPM and DatasetGAN: a generator's samples, labelled by pixel classifiers, train an ordinary segmenter.

DatasetDDPM (Baranchuk et al. 2022): samples of a diffusion model. DatasetGAN (Zhang et al. 2021): samples of a GAN,
whose classifiers need annotated SAMPLES, because a GAN has no features of a real image. Published: 10,000 to 50,000
samples, the tenth with the largest disagreement left out, DeepLabV3; here the segmenter is the one that all compared
methods share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ddpm_seg import PixelConfig, PixelEnsemble, PixelSegmenter, collect, predict, train_ensemble
from torch import Tensor

from dreamteacher.data.seeds import step_generator
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.base import Teacher


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Which samples are labelled and kept."""

    samples: int = 10_000
    """Images to generate (at least 2)."""
    drop: float = 0.1
    """Share of them, the most uncertain, that is left out, [0, 1)."""
    batch_size: int = 8
    """Images generated at once by a diffusion model."""

    def __post_init__(self) -> None:
        if self.samples < 2 or self.batch_size < 1 or not 0 <= self.drop < 1:
            raise UserError(
                f"{self.samples} samples, {self.batch_size} at once, a share of {self.drop} dropped.",
                "Give at least 2 samples, 1 at once, and a share from 0 to below 1.",
            )


@dataclass(frozen=True, kw_only=True)
class LabelledSamples:
    """Generated images with generated masks.

    Args:
        images: uint8 N x 3 x H x W.
        masks: int64 N x H x W, class ids.
        uncertainty: N (see `ddpm_seg.predict`).
    """

    images: Tensor
    masks: Tensor
    uncertainty: Tensor


def keep_certain(samples: LabelledSamples, drop: float) -> LabelledSamples:
    """The samples without the share `drop` of largest uncertainty (rounded down), in their order."""
    count = len(samples.uncertainty)
    kept = samples.uncertainty.argsort(stable=True)[: count - int(count * drop)].sort().values
    return LabelledSamples(
        images=samples.images[kept], masks=samples.masks[kept], uncertainty=samples.uncertainty[kept]
    )


def to_bytes(images: Tensor) -> Tensor:
    """Float images in [0, 1] -> uint8 on the CPU, rounded."""
    return (images * 255).round().to(torch.uint8).cpu()


def _stacked(found: Iterator[tuple[Tensor, Tensor, float]]) -> LabelledSamples:
    images, masks, uncertainty = zip(*found, strict=True)
    return LabelledSamples(
        images=torch.stack(images), masks=torch.stack(masks), uncertainty=torch.tensor(uncertainty)
    )


def dataset_ddpm(
    segmenter: PixelSegmenter, config: SamplesConfig, *, size: tuple[int, int], seed: int
) -> LabelledSamples:
    """Samples of the segmenter's own diffusion teacher (DDIM, its `sampling_steps`), labelled, the certain kept.

    Args:
        segmenter: DDPM-seg, trained on annotated images, real ones or samples.
        size: (height, width) of the samples.
        seed: of the samples.
    """

    def labelled() -> Iterator[tuple[Tensor, Tensor, float]]:
        device = segmenter.teacher.alpha_bar.device
        for k, part in enumerate(torch.arange(config.samples).split(config.batch_size)):
            generator = step_generator(seed, k, "samples")
            if device.type != "cpu":
                generator = torch.Generator(device).manual_seed(generator.initial_seed())
            images = to_bytes(segmenter.teacher.generate(len(part), generator=generator, size=size))
            for image, (mask, uncertainty) in zip(images, segmenter(images), strict=True):
                yield image, mask.cpu(), uncertainty

    return keep_certain(_stacked(labelled()), config.drop)


def sample_with_maps(teacher: Teacher, index: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Sample `index` of a seed: uint8 3 x H x W and its maps C x h x w; the same at every call.

    DatasetGAN reads the maps of all resolutions; ours are those a teacher gives, strides 4 to 32.
    """
    device = next(teacher.parameters()).device
    generator = step_generator(seed, index, "sample")
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(generator.initial_seed())
    images, maps = teacher.sample(1, generator=generator)
    return to_bytes(images)[0], [m[0].float().contiguous() for m in maps]


def images_to_annotate(teacher: Teacher, count: int, *, seed: int) -> Tensor:
    """The samples 0 to count - 1 of a seed, uint8 N x 3 x H x W, for a person to draw masks of."""
    return torch.stack([sample_with_maps(teacher, i, seed)[0] for i in range(count)])


def train_on_samples(
    teacher: Teacher, masks: Tensor, config: PixelConfig, *, classes: int, ignore_index: int, seed: int
) -> PixelEnsemble:
    """DatasetGAN's classifiers, from masks of the samples that `images_to_annotate` gave for the same seed.

    Args:
        teacher: any that samples.
        masks: int64 N x H x W, of samples 0 to N - 1.
        config: its blocks and timesteps are not used.
    """
    maps = (sample_with_maps(teacher, i, seed)[1] for i in range(len(masks)))
    x, y = collect(maps, masks, config, classes=classes, ignore_index=ignore_index, seed=seed)
    return train_ensemble(x, y, config, classes=classes, seed=seed)


def dataset_gan(
    teacher: Teacher, ensemble: PixelEnsemble, config: SamplesConfig, *, first: int, seed: int
) -> LabelledSamples:
    """Samples of a teacher with labels from their own maps, the certain kept.

    Args:
        ensemble: of `train_on_samples`.
        first: index of the first sample, so that annotated ones (0 to first - 1) do not come again.
        seed: of the samples.
    """

    def labelled() -> Iterator[tuple[Tensor, Tensor, float]]:
        for i in range(first, first + config.samples):
            image, maps = sample_with_maps(teacher, i, seed)
            mask, uncertainty = predict(ensemble, maps, (image.shape[1], image.shape[2]))
            yield image, mask.cpu(), uncertainty

    return keep_certain(_stacked(labelled()), config.drop)
