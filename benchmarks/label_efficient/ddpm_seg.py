"""DDPM-seg: an ensemble of small classifiers on every pixel's features in a frozen diffusion U-Net.

Written from the paper (Baranchuk et al. 2022, arXiv 2112.03126) and its published settings, for any diffusion
teacher. The published code holds the features of all pixels at once (about 210 GB for 50 images of 256 x 256). Here
a pixel's features are read from the network's small maps where it lies, so memory is bounded by `budget_gb`, and
prediction holds one image's maps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.finetune import shuffled_batches
from dreamteacher.downstream.features import to_input
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher, noised
from dreamteacher.teachers.diffusion.walk import UpBlock, decoder_outputs

# Pixels whose features are in memory at once, beside the rows that are kept.
_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """How pixel classifiers are trained. The defaults are the published ones, but for `budget_gb`."""

    blocks: tuple[int, ...] = ()
    """Decoder blocks, ascending, counted from 0 at the coarsest; empty: see `analogous_blocks`."""
    timesteps: tuple[int, ...] = (50, 150, 250)
    """Noise levels t, which share one noise image for all images."""
    members: int = 10
    """Classifiers in the ensemble."""
    lr: float = 1e-3
    """Learning rate (Adam, constant)."""
    batch_size: int = 64
    """Pixels per update of one classifier (at least 2)."""
    epochs: int = 100
    """Passes over the pixels, at most."""
    settle: int = 4
    """Passes before the early stop begins to look."""
    patience: int = 50
    """A classifier stops when this many batches and one more have not lowered its lowest batch loss."""
    smallest: int = 20
    """A class with fewer pixels of an image of 256 x 256 (in proportion at other sizes) is not learned there."""
    budget_gb: float = 2.0
    """10^9 bytes for the features of the labelled pixels; more of them than fit are drawn at random."""
    half: bool = False
    """Keep these features in float16, which lets twice as many fit."""

    def __post_init__(self) -> None:
        if self.members < 1 or self.epochs < 1 or not self.timesteps:
            raise UserError(
                f"{self.members} classifiers, {self.epochs} epochs, {len(self.timesteps)} timesteps.",
                "Give at least 1 of each.",
            )
        if self.batch_size < 2:
            raise UserError(f"batch_size is {self.batch_size}.", "Give at least 2, for BatchNorm.")
        if self.lr <= 0 or self.budget_gb <= 0:
            raise UserError(
                f"lr is {self.lr} and budget_gb {self.budget_gb}.", "Give numbers above 0 for both."
            )


def analogous_blocks(teacher: DiffusionTeacher) -> tuple[int, ...]:
    """The blocks of a U-Net that play the roles of the published 5, 6, 7, 8, 12 in ADM-256.

    These are the last block of the level at stride 16, all of the level at stride 8, and the first of the level
    at stride 2 (or of the finest, if that is coarser).
    """
    levels = len(teacher.unet.config["block_out_channels"])
    a_level = len(cast(UpBlock, teacher.unet.up_blocks[0]).resnets)
    strides = [teacher.spec.patch * 2 ** (levels - 1 - i) for i in range(levels)]
    blocks = {a_level * (strides.index(2) if 2 in strides else levels - 1)}
    if 16 in strides:
        blocks.add(a_level * (strides.index(16) + 1) - 1)
    if 8 in strides:
        blocks.update(range(a_level * strides.index(8), a_level * (strides.index(8) + 1)))
    return tuple(sorted(blocks))


@torch.no_grad()
def block_maps(
    teacher: DiffusionTeacher, image: Tensor, config: PixelConfig, *, noise_seed: int = 0
) -> list[Tensor]:
    """Block outputs of one image at every noise level, as small as the network makes them.

    Args:
        image: float RGB in [0, 1], 3 x H x W, on the teacher's device.
        config: its blocks and timesteps.
        noise_seed: of the one noise image; 0 is the teacher's own "fixed" noise.

    Returns: len(timesteps) x len(blocks) maps C x h x w, step by step, block by block within a step. Enlarged
        (bilinear, align_corners False) and concatenated they are the features of every pixel.
    """
    teacher.check_size(*image.shape[-2:])
    x0 = teacher.to_network(image[None])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(noise_seed)).to(x0)
    steps = torch.tensor(config.timesteps, device=x0.device)
    x = noised(x0, teacher.alpha_bar[steps], noise)
    blocks = config.blocks or analogous_blocks(teacher)
    maps = decoder_outputs(teacher.unet, x, steps, blocks, null_class=teacher.spec.null_class)
    return [m[k].contiguous() for k in range(len(steps)) for m in maps]


def read_pixels(maps: Sequence[Tensor], size: tuple[int, int], pixels: Tensor) -> Tensor:
    """The features of some pixels: what enlarging every map to the image would give there, without doing so.

    Args:
        maps: C x h x w each.
        size: (height, width) of the image.
        pixels: K positions, row x width + column (int64).

    Returns: K x (sum of widths). Test: equal to F.interpolate (bilinear, align_corners False) up to rounding.
    """
    height, width = size
    row, column = pixels // width, pixels % width
    # grid_sample's own coordinates: pixel centres, the image from -1 to 1.
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=1).to(maps[0].dtype)
    parts = [
        F.grid_sample(m[None], grid[None, None], mode="bilinear", padding_mode="border", align_corners=False)
        for m in maps
    ]
    return torch.cat([p[0, :, 0] for p in parts]).T


def without_small(masks: Tensor, *, classes: int, ignore_index: int, smallest: int) -> Tensor:
    """Masks (int64 N x H x W) in which classes of very few pixels in an image became `ignore_index` there.

    Source: the published code, which does so below 20 pixels of 256 x 256.
    """
    least = smallest * masks[0].numel() / 256**2
    kept = masks.clone()
    for mask in kept:
        counts = torch.bincount(mask[mask != ignore_index], minlength=classes)
        small = ((counts > 0) & (counts < least)).nonzero().flatten()
        mask[torch.isin(mask, small) & (mask != ignore_index)] = ignore_index
    return kept


def collect(
    maps_of: Iterable[list[Tensor]],
    masks: Tensor,
    config: PixelConfig,
    *,
    classes: int,
    ignore_index: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Features and classes of the labelled pixels, all of them or a draw of what `budget_gb` holds.

    Args:
        maps_of: the maps of each image in turn; one image's are held at a time.
        masks: int64 N x H x W on the CPU.
        seed: of the draw.

    Returns: K x D (float32, or float16 with `half`) and int64 K, where the maps are.

    Raises:
        UserError: fewer than two pixels have a class.
    """
    size = (masks.shape[-2], masks.shape[-1])
    kept = without_small(masks, classes=classes, ignore_index=ignore_index, smallest=config.smallest)
    labelled = (kept.flatten() != ignore_index).nonzero().flatten()
    if len(labelled) < 2:
        raise UserError(f"{len(labelled)} pixels of the labelled images have a class.", "Give other masks.")
    x = y = torch.empty(0)
    filled = 0
    for i, maps in enumerate(maps_of):
        if i == 0:
            device, dim = maps[0].device, sum(len(m) for m in maps)
            rows = max(2, int(config.budget_gb * 1e9) // (dim * (2 if config.half else 4)))
            if rows < len(labelled):
                print(
                    f"Pixel classifiers learn from {rows:,} of {len(labelled):,} labelled pixels (budget_gb).",
                    file=sys.stderr,
                )
                order = torch.randperm(len(labelled), generator=step_generator(seed, 0, "pixels"))
                labelled = labelled[order[:rows]].sort().values
            dtype = torch.float16 if config.half else torch.float32
            x = torch.empty(len(labelled), dim, dtype=dtype, device=device)
            y = kept.flatten()[labelled].to(device)
        of_image = labelled[labelled // kept[0].numel() == i] % kept[0].numel()
        for part in of_image.to(device).split(_CHUNK):
            x[filled : filled + len(part)] = read_pixels(maps, size, part)
            filled += len(part)
    return x, y


class PixelEnsemble(nn.Module):
    """Several classifiers of pixels, held as stacked weights so that one pass runs them all.

    Each is linear, ReLU, BatchNorm, linear, ReLU, BatchNorm, linear, with 128 and 32 channels within, or 256 and
    128 for 30 classes and more. Weights start from N(0, 0.02^2), biases from 0.

    Args:
        dim: features of a pixel.
        classes: number of classes.
        members: classifiers, M.
        seed: of the weights; each classifier has its own.

    Source: Baranchuk et al. 2022, which takes the classifier of DatasetGAN (Zhang et al. 2021).
    """

    def __init__(self, dim: int, classes: int, members: int, seed: int) -> None:
        super().__init__()
        hidden = (128, 32) if classes < 30 else (256, 128)
        self.members = members
        sizes = list(zip((dim, *hidden), (*hidden, classes), strict=True))
        draws = [step_generator(seed, m, "pixel classifier") for m in range(members)]
        self.weights = nn.ParameterList(
            torch.stack([torch.randn(a, b, generator=draw) * 0.02 for draw in draws]) for a, b in sizes
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for _, b in sizes)
        self.gains = nn.ParameterList(torch.ones(members * h) for h in hidden)
        self.shifts = nn.ParameterList(torch.zeros(members * h) for h in hidden)
        for i, h in enumerate(hidden):
            self.register_buffer(f"mean{i}", torch.zeros(members * h))
            self.register_buffer(f"variance{i}", torch.ones(members * h))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels M x K x D (each classifier its own) -> logits M x K x classes."""
        return self.after_first(torch.baddbmm(self.biases[0], x, self.weights[0]))

    def after_first(self, x: Tensor) -> Tensor:
        """What the first linear layer gave, M x K x width -> logits M x K x classes."""
        for i in range(2):
            x = torch.baddbmm(self.biases[i + 1], self._norm(i, x.relu()), self.weights[i + 1])
        return x

    def _norm(self, i: int, x: Tensor) -> Tensor:
        """BatchNorm over the K pixels, the channels of all classifiers side by side."""
        members, count, width = x.shape
        flat = x.transpose(0, 1).reshape(count, members * width)
        flat = F.batch_norm(
            flat, self.get_buffer(f"mean{i}"), self.get_buffer(f"variance{i}"), self.gains[i], self.shifts[i],
            training=self.training,
        )  # fmt: skip
        return flat.view(count, members, width).transpose(0, 1)

    def project(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The first layer (without bias) on whole small maps: one map (M width) x h x w for each resolution.

        Linear layers and bilinear enlarging commute: enlarged and summed these are the layer's output.
        """
        weight = self.weights[0].transpose(1, 2).flatten(0, 1)  # (M width) x D
        sums: dict[tuple[int, ...], Tensor] = {}
        for m, part in zip(maps, weight.split([len(m) for m in maps], dim=1), strict=True):
            shape = tuple(m.shape[1:])
            product = part @ m.float().flatten(1)
            sums[shape] = sums[shape] + product if shape in sums else product
        return [product.view(-1, *shape) for shape, product in sums.items()]


def train_ensemble(x: Tensor, y: Tensor, config: PixelConfig, *, classes: int, seed: int) -> PixelEnsemble:
    """Classifiers trained side by side, each on its own shuffle, each stopped for itself; evaluation mode.

    Args:
        x: features of K pixels, K x D; y: their classes (int64 K).
        seed: of weights and shuffles.

    Source: Baranchuk et al. 2022 and its code: Adam; after `settle` epochs a classifier whose batch loss has
        not fallen below its lowest for more than `patience` batches is finished. We leave no batch partial.
    """
    ensemble = PixelEnsemble(x.shape[1], classes, config.members, seed).to(x.device).train()
    an_epoch = math.ceil(len(y) / config.batch_size)
    steps = config.epochs * an_epoch
    draws = [step_generator(seed, m, "pixel batches") for m in range(config.members)]
    batches = [shuffled_batches(len(y), config.batch_size, steps, draw) for draw in draws]
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=config.lr, fused=True)
    final = {name: value.clone() for name, value in ensemble.state_dict().items()}
    running = torch.ones(config.members, dtype=torch.bool, device=x.device)
    lowest = torch.full((config.members,), math.inf, device=x.device)
    waited = torch.zeros(config.members, dtype=torch.int64, device=x.device)

    def finish(which: Tensor) -> None:
        for name, value in ensemble.state_dict().items():
            final[name].view(config.members, -1)[which] = value.view(config.members, -1)[which]

    for step in range(steps):
        index = torch.stack([next(b) for b in batches]).to(x.device)
        logits = ensemble(x[index].float())
        losses = F.cross_entropy(logits.flatten(0, 1), y[index].flatten(), reduction="none")
        losses = losses.view(index.shape).mean(1)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        if step >= config.settle * an_epoch:
            lower = losses.detach() < lowest
            lowest = torch.where(lower, losses.detach(), lowest)
            waited = torch.where(lower, 0, waited + 1)
            done = running & (waited > config.patience)
            if done.any():
                finish(done)
                running &= ~done
                if not running.any():
                    break
    finish(running)
    ensemble.load_state_dict(final)
    return ensemble.eval().requires_grad_(False)


@torch.no_grad()
def predict(ensemble: PixelEnsemble, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, float]:
    """Class of every pixel by majority vote (of a tie: the lowest id), and how much the classifiers disagree.

    Args:
        maps: one image's, C x h x w each.
        size: (height, width) of the image.

    Returns: int64 height x width; the Jensen-Shannon divergence of the classifiers' distributions, averaged over
        the tenth of the pixels where it is largest (DatasetGAN's measure of a sample's uncertainty).
    """
    projected = ensemble.project(maps)
    height, width = size
    voted, divergence = [], []
    for pixels in torch.arange(height * width, device=maps[0].device).split(_CHUNK):
        first = sum(
            (read_pixels([p], size, pixels) for p in projected), torch.zeros((), device=pixels.device)
        )
        first = first.view(len(pixels), ensemble.members, -1).transpose(0, 1) + ensemble.biases[0]
        logits = ensemble.after_first(first)
        classes = logits.shape[2]
        votes = F.one_hot(logits.argmax(2), classes).sum(0)
        voted.append((votes * classes - torch.arange(classes, device=votes.device)).argmax(1))
        shares = logits.softmax(2)
        mean_entropy = torch.special.entr(shares).sum(2).mean(0)
        divergence.append(torch.special.entr(shares.mean(0)).sum(1) - mean_entropy)
    largest = torch.cat(divergence).topk(max(1, height * width // 10)).values
    return torch.cat(voted).view(height, width), float(largest.mean())


@dataclass(frozen=True, kw_only=True)
class PixelSegmenter:
    """Pixel classifiers and the teacher whose maps they read.

    Args:
        teacher: whole (not reduced by `keep_only`).
        ensemble: trained on it.
        config: with the blocks and timesteps that it was trained on.
        noise_seed: of the one noise image.
    """

    teacher: DiffusionTeacher
    ensemble: PixelEnsemble
    config: PixelConfig
    noise_seed: int

    def __call__(self, images: Tensor) -> Iterator[tuple[Tensor, float]]:
        """`predict` of each image (uint8 N x 3 x H x W), one at a time."""
        size = (images.shape[-2], images.shape[-1])
        for image in images:
            yield predict(
                self.ensemble, maps_of_image(self.teacher, image, self.config, self.noise_seed), size
            )


def maps_of_image(
    teacher: DiffusionTeacher, image: Tensor, config: PixelConfig, noise_seed: int
) -> list[Tensor]:
    """`block_maps` of a uint8 image 3 x H x W."""
    return block_maps(
        teacher, to_input(image[None], teacher.alpha_bar.device)[0], config, noise_seed=noise_seed
    )


def ddpm_seg(
    teacher: Teacher,
    images: Tensor,
    masks: Tensor,
    config: PixelConfig,
    *,
    classes: int,
    ignore_index: int,
    seed: int,
) -> PixelSegmenter:
    """DDPM-seg trained on a few labelled images.

    Args:
        images: uint8 N x 3 x H x W; masks: int64 N x H x W.
        seed: of noise, draw, weights and shuffles.

    Raises:
        UserError: the teacher is no diffusion model in pixel space.
    """
    if not isinstance(teacher, DiffusionTeacher):
        raise UserError(
            f"DDPM-seg reads a pixel-space diffusion model; '{teacher.name}' is of the family '{teacher.family}'.",
            "Name a diffusion teacher, as chest-xray-64 or one that `dreamteacher train-teacher` made.",
        )
    maps = (maps_of_image(teacher, image, config, seed) for image in images)
    x, y = collect(maps, masks, config, classes=classes, ignore_index=ignore_index, seed=seed)
    ensemble = train_ensemble(x, y, config, classes=classes, seed=seed)
    return PixelSegmenter(teacher=teacher, ensemble=ensemble, config=config, noise_seed=seed)
