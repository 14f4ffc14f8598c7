"""BigGAN teachers (BigGAN, BigBiGAN, IC-GAN): an image and the maps of the blocks that made it, in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import from_json
from dreamteacher.runtime.distributed.world import rand, randint, randn
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.biggan.convert import BigGanSettings, find_generator, read_tensors, to_plain

BANK, BANK_LABELS = "bank", "bank_labels"


@dataclass(frozen=True, kw_only=True)
class BigGanSpec:
    """Everything that rebuilds a BigGAN generator and is not in its weights (teacher.json, "network").

    Args:
        channels: width that enters the first block, then of every block's output; each block doubles the size.
        bottom: pixels a side of the map that enters the first block.
        attention: numbers of the blocks that end in self-attention.
        latent: width of one piece of the latent.
        hierarchical: each block gets a piece of its own besides the first layer's; else z is one piece.
        classes, class_width: rows and width of the class embedding; 0: not told of classes.
        features, feature_width: width of an instance feature and of its embedding; 0: not told of instances.

    Raises:
        UserError: for sizes that give no network.
    """

    family: ClassVar[str] = "biggan"
    channels: tuple[int, ...]
    bottom: int = 4
    attention: tuple[int, ...] = ()
    latent: int = 20
    hierarchical: bool = True
    classes: int = 0
    class_width: int = 0
    features: int = 0
    feature_width: int = 0

    def __post_init__(self) -> None:
        if len(self.channels) < 2 or min(*self.channels, self.bottom, self.latent) < 1:
            raise UserError(
                f"BigGanSpec: channels {self.channels}, bottom {self.bottom}, latent {self.latent} "
                "make no network.",
                "All must be positive, with at least two channels.",
            )
        if self.condition < 1:
            raise UserError(
                "BigGanSpec: the blocks are told of nothing: no class, no feature, no piece of the latent.",
                "Set hierarchical, or the widths of an embedding.",
            )
        if any(not 0 <= i < self.blocks or self.channels[i + 1] < 8 for i in self.attention):
            raise UserError(
                f"BigGanSpec: attention {self.attention} names a block that is not there or too narrow.",
                f"Blocks are 0 to {self.blocks - 1}; one with attention needs 8 channels.",
            )

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.channels) - 1

    @property
    def size(self) -> int:
        """Pixels a side of the image."""
        return self.bottom * 2**self.blocks

    @property
    def condition(self) -> int:
        """Width of what a block's BatchNorm is told: class, feature, its piece of the latent."""
        return self.class_width + self.feature_width + (self.latent if self.hierarchical else 0)

    @property
    def dim_z(self) -> int:
        """Width of the whole latent."""
        return self.latent * (self.blocks + 1 if self.hierarchical else 1)


class ConditionalNorm(nn.Module):
    """BatchNorm with stored statistics; its gain and bias are linear in a condition.

    1 / sqrt(var + eps) is part of `scale`, whose own bias is the gain's constant 1.
    """

    mean: Tensor

    def __init__(self, condition: int, channels: int) -> None:
        super().__init__()
        self.scale = nn.Linear(condition, channels)
        self.shift = nn.Linear(condition, channels, bias=False)
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x N x C x H x W, condition N x D -> N x C x H x W."""
        return _affine(x, self.mean, self.scale(condition), self.shift(condition))


def _affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) * scale + shift, in float32 even where the layers around it run in less."""
    scale = scale.to(mean.dtype)
    shift = shift - mean * scale
    return torch.addcmul(shift[..., None, None], x, scale[..., None, None])


class OutputNorm(nn.Module):
    """The BatchNorm before the last convolution, with its own gain and bias."""

    mean: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> the same shape."""
        return _affine(x, self.mean, self.scale, self.shift)


class Attention(nn.Module):
    """Self-attention whose keys and values are max-pooled to half the size; the input is added.

    Source: Zhang et al. 2019 (SAGAN), eq. 1-3, with BigGAN's pooling; gamma lies in `out`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W (even) -> the same shape."""
        query = _tokens(self.query(x))
        key, value = (_tokens(F.max_pool2d(layer(x), 2)) for layer in (self.key, self.value))
        found = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.out(found.squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:]))


def _tokens(x: Tensor) -> Tensor:
    """N x C x H x W -> N x 1 x HW x C: one head, which the fused kernels ask for."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


class Block(nn.Module):
    """A residual block that doubles height and width, and its self-attention if it has one.

    Source: Brock et al. 2019 (BigGAN), figure 15b. The shortcut's 1x1 convolution runs before its enlargement,
    with which it commutes: the same values for a quarter of the work.
    """

    def __init__(self, condition: int, entering: int, leaving: int, *, attention: bool) -> None:
        super().__init__()
        self.norm1 = ConditionalNorm(condition, entering)
        self.conv1 = nn.Conv2d(entering, leaving, 3, padding=1)
        self.norm2 = ConditionalNorm(condition, leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, padding=1)
        self.shortcut = nn.Conv2d(entering, leaving, 1)
        self.attention = Attention(leaving) if attention else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x N x C x H x W, condition N x D -> N x C' x 2H x 2W."""
        h = F.interpolate(F.relu(self.norm1(x, condition)), scale_factor=2.0)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), condition)))
        h = h + F.interpolate(self.shortcut(x), scale_factor=2.0)
        return h if self.attention is None else self.attention(h)


class BigGanNetwork(nn.Module):
    """The generator: plain layers, no spectral norm, stored BatchNorm statistics.

    Golden: biggan_hier64, bigbigan128, icgan_biggan64_instance, icgan_biggan64_class_instance.
    """

    def __init__(self, spec: BigGanSpec) -> None:
        super().__init__()
        self.spec = spec
        self.classes = nn.Embedding(spec.classes, spec.class_width) if spec.classes else None
        self.features = nn.Linear(spec.features, spec.feature_width) if spec.features else None
        self.linear = nn.Linear(spec.latent, spec.channels[0] * spec.bottom**2)
        self.blocks = nn.ModuleList(
            Block(spec.condition, *spec.channels[i : i + 2], attention=i in spec.attention)
            for i in range(spec.blocks)
        )
        self.norm = OutputNorm(spec.channels[-1])
        self.conv = nn.Conv2d(spec.channels[-1], 3, 3, padding=1)

    def forward(
        self, z: Tensor, labels: Tensor | None, features: Tensor | None, wanted: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Images in [-1, 1] and the outputs of the blocks `wanted`, after their attention.

        Args:
            z: N x dim_z, standard normal.
            labels: int64 N, where the network is told of classes, else None.
            features: N x features, L2-normalised, where it is told of instances, else None.
            wanted: numbers of blocks; others are not kept.

        Returns:
            float32 N x 3 x size x size, and the maps in the order of the blocks.
        """
        told = []
        if self.classes is not None:
            told.append(self.classes(labels))
        if self.features is not None:
            told.append(self.features(features))
        first, *pieces = z.split(self.spec.latent, dim=1)
        x = self.linear(first).unflatten(1, (-1, self.spec.bottom, self.spec.bottom))
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for i, block in enumerate(self.blocks):
            own = [pieces[i]] if self.spec.hierarchical else []
            x = block(x, torch.cat([*told, *own], dim=1))
            if i in wanted:
                maps.append(x)
        return torch.tanh(self.conv(F.relu(self.norm(x))).float()), maps


class BigGanTeacher(Teacher):
    """Samples of a BigGAN generator and the maps of its blocks at strides 4 to 32, those that it has.

    Args:
        network: the generator.
        bank: float32 K x features, L2-normalised: instances that an instance-conditional network is told of.
        bank_labels: int64 K, their classes, where it is told of classes too.
        psi: 1 for the latents of training; less: `psi` times a normal cut off at 2 standard deviations, for
            likelier and less varied images (Brock et al. 2019, "truncation", as their published samples).

    Raises:
        UserError: a bank that is missing or does not fit, psi out of range, no level at stride 4 to 32.
    """

    family = BigGanSpec.family
    compile_targets = ("network.forward",)
    modes = frozenset({"sample"})
    bank: Tensor | None
    bank_labels: Tensor | None

    def __init__(
        self,
        network: BigGanNetwork,
        *,
        name: str,
        licence: str,
        bank: Tensor | None = None,
        bank_labels: Tensor | None = None,
        psi: float = 1.0,
    ) -> None:
        super().__init__()
        spec = network.spec
        _check_bank(spec, bank, bank_labels, name)
        if not 0 <= psi <= 1:
            raise UserError(f"psi cannot be {psi:g}.", "Use 0 to 1; 1 is the network's own distribution.")
        self.network, self.spec, self.name, self.licence, self.psi = network, spec, name, licence, psi
        self.register_buffer(BANK, bank if spec.features else None)
        self.register_buffer(BANK_LABELS, bank_labels if spec.features and spec.classes else None)
        self.size = (spec.size, spec.size)
        # Block i's output is 2^(blocks - 1 - i) times smaller than the image.
        levels = [(2 ** (spec.blocks - 1 - i), c) for i, c in enumerate(spec.channels[1:])]
        self._wanted = self.take_levels(levels)
        self.multiple = self.specs[-1].stride
        self.freeze()

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """n new images (float RGB in [0, 1]) and their maps, from one pass.

        Classes are drawn uniformly; so are instances, which bring their own classes.
        """
        z = self._latents(n, generator)
        labels = features = None
        if self.bank is not None:
            picked = randint(len(self.bank), (n,), generator, device=z.device)
            features = self.bank[picked]
            labels = self.bank_labels[picked] if self.bank_labels is not None else None
        elif self.spec.classes:
            labels = randint(self.spec.classes, (n,), generator, device=z.device)
        image, maps = self.network(z, labels, features, self._wanted)
        return (image + 1) / 2, maps[::-1]

    def _latents(self, n: int, generator: torch.Generator) -> Tensor:
        """z, float32 n x dim_z."""
        shape, device = (n, self.spec.dim_z), self.network.linear.weight.device
        if self.psi == 1:
            return randn(shape, generator, device=device)
        # The inverse of the normal's distribution function between -2 and 2: no value is drawn twice.
        uniform = rand(shape, generator, device=device) * 2 - 1
        return self.psi * math.sqrt(2) * torch.erfinv(uniform * math.erf(math.sqrt(2)))


def _check_bank(spec: BigGanSpec, bank: Tensor | None, labels: Tensor | None, name: str) -> None:
    if not spec.features:
        return
    again = "dreamteacher get-teacher ... --bank-images FOLDER --embedder FILE"
    if bank is None:
        raise UserError(
            f"'{name}' makes images like given ones, and its weights hold no bank of such instances.",
            f"Make one from your images and any ResNet-50: {again}",
        )
    if bank.dim() != 2 or not len(bank) or bank.shape[1] != spec.features:
        raise UserError(
            f"The bank of '{name}' is {tuple(bank.shape)}; the network takes instances {spec.features} wide.",
            f"Make it anew: {again}",
        )
    if spec.classes and (
        labels is None
        or labels.shape != (len(bank),)
        or not 0 <= int(labels.min()) <= int(labels.max()) < spec.classes
    ):
        raise UserError(
            f"'{name}' is also told of classes, and its bank lacks one of 0 to {spec.classes - 1} per instance.",
            f"With one folder per class below FOLDER: {again}",
        )


def build_network(spec: BigGanSpec) -> BigGanNetwork:
    """The generator of a spec on the meta device: no memory, no random weights, of which it has 100 million."""
    with torch.device("meta"):
        return BigGanNetwork(spec)


def load(
    weights: Mapping[str, Tensor],
    spec: BigGanSpec,
    where: Path,
    *,
    name: str,
    licence: str,
    psi: float = 1.0,
) -> BigGanTeacher:
    """See `Family`; weights hold "bank" (and "bank_labels") where the network needs instances."""
    network = build_network(spec)
    own = {k: v for k, v in weights.items() if k not in (BANK, BANK_LABELS)}
    checkpoint.adopt_exactly(network, own, where)
    bank, labels = weights.get(BANK), weights.get(BANK_LABELS)
    return BigGanTeacher(network, name=name, licence=licence, bank=bank, bank_labels=labels, psi=psi)


def convert(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], BigGanSpec]:
    """Published weights as ours: plain, float32, without spectral norm.

    Args:
        path: a state dict (.pth, .pt or .safetensors), or a folder that holds one file of G_ema weights.
        settings: the fields of BigGanSettings; "layout" at least.

    Returns: weights for `load` (an instance-conditional network needs a bank added) and the network's spec.
    """
    parsed = from_json(BigGanSettings, dict(settings))
    path = find_generator(path)
    weights, fields = to_plain(read_tensors(path), parsed, path)
    spec = from_json(BigGanSpec, fields)
    checkpoint.check_fits(build_network(spec), weights, path)
    return weights, spec
