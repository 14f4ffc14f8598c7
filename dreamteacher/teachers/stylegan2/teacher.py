"""StyleGAN2 generators (published ones, IC-GAN's variant, small ones of one's own) as teachers that sample.

Plain torch operations; a style scales the input of a convolution and the output is demodulated, which is equal to
modulated weights and lets a whole batch share one ordinary convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.world import randint, randn
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.teachers.base import Teacher

NoiseMode = Literal["const", "none", "random"]
MAPPING_LR = 0.01


@dataclass(frozen=True, kw_only=True)
class StyleGan2Spec:
    """Everything that rebuilds a generator and is not in its weights (teacher.json, "network").

    Args:
        size: (height, width) of its images in pixels; the first block has size / 2^(blocks - 1).
        channels: of the maps of every synthesis block, coarse to fine: b4, b8, b16 ...
        z_dim: of the latent; w_dim: of the styles' space.
        c_dim: classes (given one-hot); 0: none.
        h_dim: of the instance feature (IC-GAN); 0: none.
        mapping_layers: fully connected layers from z to w.
        image_channels: 1 (grey) or 3 (RGB).
        architecture: "skip" (every block adds to the image) or "orig" (only the last one makes it).
        conv_clamp: activations are clamped to plus and minus this; None: they are not.

    Raises:
        UserError: when the size does not halve down to the first block, or images are neither grey nor RGB.
    """

    family: ClassVar[str] = "stylegan2"
    size: tuple[int, int]
    channels: tuple[int, ...]
    z_dim: int = 512
    w_dim: int = 512
    c_dim: int = 0
    h_dim: int = 0
    mapping_layers: int = 8
    image_channels: int = 3
    architecture: Literal["skip", "orig"] = "skip"
    conv_clamp: float | None = None

    def __post_init__(self) -> None:
        step = 2 ** (len(self.channels) - 1) if self.channels else 0
        if not step or self.size[0] % step or self.size[1] % step or min(self.size) < step:
            raise UserError(
                f"A StyleGAN2 of {len(self.channels)} blocks cannot make {self.size[0]} x {self.size[1]} pixels.",
                f"Heights and widths must be multiples of 2^(blocks - 1) = {step}.",
            )
        if self.image_channels not in (1, 3):
            raise UserError(f"image_channels is {self.image_channels}.", "Use 1 (grey) or 3 (RGB).")

    def block_size(self, i: int) -> tuple[int, int]:
        """(height, width) of the maps of block i, counted from the coarsest."""
        step = 2 ** (len(self.channels) - 1 - i)
        return self.size[0] // step, self.size[1] // step


def block_name(i: int) -> str:
    """The published name of block i, counted from the coarsest: b4, b8, b16 ... whatever its real size is."""
    return f"b{4 * 2**i}"


def fir_kernel() -> Tensor:
    """The published low-pass filter, [1, 3, 3, 1] on both axes, float32 (4, 4) of sum 1."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(row, row) / row.sum() ** 2


def second_moment(x: Tensor) -> Tensor:
    """Every row (N, C) scaled to a mean square of 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class FullyConnected(nn.Module):
    """A linear layer whose weights of unit variance are scaled at run time (equalised learning rate).

    Always in the precision of its weights: styles are few, and everything hangs on them.
    """

    def __init__(self, inputs: int, outputs: int, *, lr: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.scale, self.lr = lr / math.sqrt(inputs), lr

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight * self.scale, self.bias * self.lr)


class MappingNetwork(nn.Module):
    """z (and class, and instance feature) -> the styles of every layer."""

    w_avg: Tensor

    def __init__(self, spec: StyleGan2Spec) -> None:
        super().__init__()
        w = spec.w_dim
        # One style for each convolution and one for the last toRGB.
        self.num_ws, self.layers = 2 * len(spec.channels), spec.mapping_layers
        self.embed = FullyConnected(spec.c_dim, w) if spec.c_dim else None
        self.embed_feats = FullyConnected(spec.h_dim, w) if spec.h_dim else None
        width = spec.z_dim + w * (bool(spec.c_dim) + bool(spec.h_dim))
        for i in range(self.layers):
            self.add_module(f"fc{i}", FullyConnected(width if i == 0 else w, w, lr=MAPPING_LR))
        self.register_buffer("w_avg", torch.zeros(w))

    def forward(
        self, z: Tensor, c: Tensor | None = None, h: Tensor | None = None, psi: float = 1.0
    ) -> Tensor:
        """Styles (N, num_ws, w_dim).

        Args:
            z: standard normal (N, z_dim).
            c: one-hot classes (N, c_dim), for a generator that has them.
            h: instance features (N, h_dim), for an IC-GAN.
            psi: truncation, the distance kept from the mean style (1: none).
        """
        y = []
        for given, embed in ((c, self.embed), (h, self.embed_feats)):
            if given is not None and embed is not None:
                y.append(embed(given))
            elif given is not None or embed is not None:
                raise ValueError("c (classes) and h (instance features) belong to generators that have them")
        w = second_moment(z)
        if y:  # class and instance are normalised together, as published
            w = torch.cat([w, second_moment(torch.cat(y, dim=1))], dim=1)
        for i in range(self.layers):
            w = F.leaky_relu(self.get_submodule(f"fc{i}")(w), 0.2) * math.sqrt(2)
        if psi != 1:
            w = self.w_avg.lerp(w, psi)
        return w.unsqueeze(1).expand(-1, self.num_ws, -1)


def upsample_image(x: Tensor) -> Tensor:
    """An image at twice the size: zeros between the pixels and around them, then the filter (gain 4).

    Two of the four taps of [1, 3, 3, 1] meet a pixel, 3/4 of the nearer one and 1/4 of the other: bilinear weights.
    """
    wide = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2.0, mode="bilinear", align_corners=False)
    return wide[..., 2:-2, 2:-2]


class SynthesisLayer(nn.Module):
    """A 3 x 3 convolution modulated by a style, with noise, bias and leaky ReLU; `up` doubles the map first."""

    noise_const: Tensor
    resample_filter: Tensor

    def __init__(self, spec: StyleGan2Spec, i: int, *, up: bool) -> None:
        super().__init__()
        self.up, self.clamp = up, spec.conv_clamp
        inputs, outputs = spec.channels[i - up], spec.channels[i]
        self.affine = FullyConnected(spec.w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(spec.block_size(i)))
        self.register_buffer("resample_filter", fir_kernel())

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x (N, inputs, H, W), w (N, w_dim), noise (1 or N, 1, height, width) or None."""
        style = self.affine(w)
        with torch.autocast(x.device.type, enabled=False):  # sums of squares: not in bfloat16
            power = self.weight.square().sum((2, 3))
            # The gain sqrt(2) of the activation is put in here: leaky ReLU commutes with positive factors.
            demodulation = (F.linear(style.square(), power) + 1e-8).rsqrt() * math.sqrt(2)
        x = x * style.to(x.dtype)[:, :, None, None]
        x = self._upsample(x) if self.up else F.conv2d(x, self.weight, padding=1)
        bias = (self.bias * math.sqrt(2)).to(x.dtype)[:, None, None]
        x = torch.addcmul(bias, x, demodulation.to(x.dtype)[:, :, None, None])
        if noise is not None:
            x = x + (noise * (self.noise_strength * math.sqrt(2))).to(x.dtype)
        x = F.leaky_relu(x, 0.2)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)

    def _upsample(self, x: Tensor) -> Tensor:
        """Transposed convolution of stride 2 without cropping (2H + 1), then the filter (gain 4) down to 2H."""
        x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
        kernel = (self.resample_filter * 4).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


class ToImage(nn.Module):
    """A 1 x 1 convolution to image channels, modulated by a style and not demodulated."""

    def __init__(self, spec: StyleGan2Spec, i: int) -> None:
        super().__init__()
        inputs, self.clamp = spec.channels[i], spec.conv_clamp
        self.affine = FullyConnected(spec.w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(spec.image_channels, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(spec.image_channels))
        self.scale = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (N, inputs, H, W), w (N, w_dim) -> (N, outputs, H, W) in the precision of w: images add up in it."""
        style = self.affine(w) * self.scale
        y = F.conv2d(x * style.to(x.dtype)[:, :, None, None], self.weight).to(w.dtype)
        y = y + self.bias.view(1, -1, 1, 1)
        return y if self.clamp is None else y.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    """The layers of one resolution; the first block starts from a learned constant."""

    resample_filter: Tensor

    def __init__(self, spec: StyleGan2Spec, i: int) -> None:
        super().__init__()
        last = i == len(spec.channels) - 1
        self.const = None if i else nn.Parameter(torch.randn(spec.channels[0], *spec.block_size(0)))
        self.register_buffer("resample_filter", fir_kernel())
        self.conv0 = SynthesisLayer(spec, i, up=True) if i else None
        self.conv1 = SynthesisLayer(spec, i, up=False)
        self.torgb = ToImage(spec, i) if last or spec.architecture == "skip" else None


class SynthesisNetwork(nn.Module):
    """Styles -> image, and the maps of every block."""

    def __init__(self, spec: StyleGan2Spec) -> None:
        super().__init__()
        self.count = len(spec.channels)
        for i in range(self.count):
            self.add_module(block_name(i), SynthesisBlock(spec, i))

    def blocks(self) -> list[SynthesisBlock]:
        """Coarse to fine."""
        return [cast(SynthesisBlock, self.get_submodule(block_name(i))) for i in range(self.count)]

    def draw_noise(
        self, n: int, *, noise: NoiseMode, generator: torch.Generator | None
    ) -> list[Tensor | None]:
        """The noise map of every convolution: the stored ones, fresh ones (N, 1, H, W; a generator is needed), or none."""
        stored = [c.noise_const for b in self.blocks() for c in (b.conv0, b.conv1) if c is not None]
        if noise == "none":
            return [None] * len(stored)
        if noise == "const":
            return [c[None, None] for c in stored]
        if generator is None:
            raise ValueError("random noise needs a generator")
        return [randn((n, 1, *c.shape), generator, device=c.device, dtype=c.dtype) for c in stored]

    def forward(
        self, ws: Tensor, *, noise: NoiseMode, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Styles (N, num_ws, w_dim) -> image and maps.

        Returns: the image (N, image_channels, H, W), about [-1, 1] and not clamped; and, coarse to fine, x after
            conv1 of every block, before its toRGB.
        """
        return self.walk(ws, self.draw_noise(len(ws), noise=noise, generator=generator))

    def walk(self, ws: Tensor, noises: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """`forward` with noise maps that were drawn before (one per convolution): draws nothing itself."""
        k, x, image, maps = 0, ws, None, []
        for block in self.blocks():
            if block.const is not None:
                x = block.const.expand(len(ws), -1, -1, -1)
            if block.conv0 is not None:
                x = block.conv0(x, ws[:, k], noises[k])
                k += 1
            x = block.conv1(x, ws[:, k], noises[k])
            k += 1
            maps.append(x)
            if image is not None:
                image = upsample_image(image)
            if block.torgb is not None:  # its style is the one of the next block's first convolution
                y = block.torgb(x, ws[:, k])
                image = y if image is None else image + y
        assert image is not None
        return image, maps


class Generator(nn.Module):
    """A StyleGAN2 generator with the published state-dict keys; fresh weights are those that training starts from.

    Construct it inside `torch.random.fork_rng` with a seed: weights come from the global generator.

    Source: Karras et al. 2020 (arXiv 1912.04958) and the ADA variant (arXiv 2006.06676); instance features,
    Casanova et al. 2021 (arXiv 2109.05070). Golden: stylegan2_skip64, stylegan2_orig32_cond, icgan_stylegan2_*.

    Example:
        >>> spec = StyleGan2Spec(size=(16, 16), channels=(8, 8, 8), z_dim=4, w_dim=4, mapping_layers=2)
        >>> g = Generator(spec)
        >>> image, maps = g.synthesis(g.mapping(torch.randn(2, 4)), noise="const")
        >>> image.shape, [m.shape[-1] for m in maps]
        (torch.Size([2, 3, 16, 16]), [4, 8, 16])
    """

    def __init__(self, spec: StyleGan2Spec) -> None:
        super().__init__()
        self.spec = spec
        self.mapping = MappingNetwork(spec)
        self.synthesis = SynthesisNetwork(spec)


def spec_of(state: Mapping[str, Tensor], *, conv_clamp: float | None = None) -> StyleGan2Spec:
    """The spec of a published generator's state dict: every size is read from the tensors' shapes.

    Args:
        state: tensors under the published keys (mapping.*, synthesis.*) and nothing else.
        conv_clamp: the one thing that the tensors cannot tell; the published `synthesis_kwargs.conv_clamp`.

    Raises:
        UserError: when it is no StyleGAN2 generator of the skip or orig architecture, or has another filter.
    """
    way_out = "Give the generator (G_ema) of a StyleGAN2, StyleGAN2-ADA or IC-GAN StyleGAN2 checkpoint."
    if any(re.fullmatch(r"synthesis\.b\d+\.skip\.weight", key) for key in state):
        raise UserError("It is a StyleGAN2 of the 'resnet' architecture; skip and orig are read.", way_out)
    n = len({m[1] for key in state if (m := re.match(r"synthesis\.b(\d+)\.", key))})
    layers = sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", key)) for key in state)
    try:
        first, last = f"synthesis.{block_name(0)}", f"synthesis.{block_name(n - 1)}"
        height, width = state[f"{first}.const"].shape[1:]
        embeds = [state.get(f"mapping.{e}.weight", torch.empty(0, 0)).shape for e in ("embed", "embed_feats")]
        spec = StyleGan2Spec(
            size=(height * 2 ** (n - 1), width * 2 ** (n - 1)),
            channels=tuple(len(state[f"synthesis.{block_name(i)}.conv1.weight"]) for i in range(n)),
            z_dim=state["mapping.fc0.weight"].shape[1] - sum(e[0] for e in embeds),
            w_dim=len(state["mapping.w_avg"]),
            c_dim=embeds[0][1],
            h_dim=embeds[1][1],
            mapping_layers=layers,
            image_channels=len(state[f"{last}.torgb.weight"]),
            architecture="skip" if f"{first}.torgb.weight" in state else "orig",
            conv_clamp=conv_clamp,
        )
        with torch.device("meta"):
            own = Generator(spec).state_dict()
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"It is no StyleGAN2 generator: {type(error).__name__} {error}.", way_out) from None
    wrong = {k for k in {*own, *state} if k not in own or k not in state or own[k].shape != state[k].shape}
    if wrong:
        raise UserError(f"It is no StyleGAN2 generator: {shorten(sorted(wrong), 2)} do not fit.", way_out)
    for key in (k for k in state if k.endswith("resample_filter")):
        if not torch.allclose(state[key].cpu().float(), fir_kernel(), atol=1e-6):
            raise UserError(f"'{key}' is not the published filter [1, 3, 3, 1].", way_out)
    return spec


class StyleGan2Teacher(Teacher):
    """Images of a StyleGAN2 generator and the maps that made them, in one pass.

    Maps are x after conv1 of the blocks at strides 32, 16, 8 and 4, before toRGB; a level it lacks is absent.
    Classes are drawn uniformly, instance features uniformly from `bank`.

    Args:
        bank: instance features (K, h_dim) of real images, for an IC-GAN; None otherwise.
        psi: truncation towards the mean style, in [0, 1]; 1 (the paper's): none.

    Raises:
        UserError: for a psi out of range, a generator without any of the levels, or a bank that does not fit.
    """

    family = StyleGan2Spec.family
    compile_targets = ("generator.synthesis.walk",)
    modes = frozenset({"sample"})
    bank: Tensor | None

    def __init__(
        self, generator: Generator, *, name: str, licence: str, bank: Tensor | None = None, psi: float = 1.0
    ) -> None:
        super().__init__()
        spec = generator.spec
        self.generator, self.spec, self.name, self.licence, self.psi = generator, spec, name, licence, psi
        self.size = spec.size
        if not 0 <= psi <= 1:
            raise UserError(f"A truncation psi of {psi} is out of range.", "Use 0 to 1 (1: none).")
        shape = (0, 0) if bank is None else tuple(bank.shape)
        if shape[1:] != (spec.h_dim,) or bool(shape[0]) != bool(spec.h_dim):
            raise UserError(
                f"'{name}' needs a bank of {spec.h_dim} numbers an instance (0: none); it has {shape}.",
                "`dreamteacher get-teacher` makes an IC-GAN's bank: --bank-images FOLDER --embedder FILE.",
            )
        self.register_buffer("bank", bank, persistent=False)
        top = len(spec.channels) - 1
        self._levels = self.take_levels([(2 ** (top - i), c) for i, c in enumerate(spec.channels)])
        self.multiple = self.specs[-1].stride
        self.freeze()

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        ws = self.generator.mapping(*self.draw(n, generator=generator), psi=self.psi)
        image, maps = self.generator.synthesis(ws, noise="random", generator=generator)
        return ((image + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1), [maps[i] for i in self._levels]

    def draw(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """z, one-hot classes and instance features of n images (None where the generator has none)."""
        spec, device = self.spec, self.generator.mapping.w_avg.device
        z = randn((n, spec.z_dim), generator, device=device)
        c = h = None
        if spec.c_dim:
            labels = randint(spec.c_dim, (n,), generator, device=device)
            c = F.one_hot(labels, spec.c_dim).to(z.dtype)
        if self.bank is not None:
            h = self.bank[randint(len(self.bank), (n,), generator, device=device)]
        return z, c, h


def load(
    weights: Mapping[str, Tensor],
    spec: StyleGan2Spec,
    where: Path,
    *,
    name: str,
    licence: str,
    psi: float = 1.0,
) -> StyleGan2Teacher:
    """See `Family`; weights: the generator's, and for an IC-GAN "bank", instance features (K, h_dim)."""
    with torch.device("meta"):  # no random start: every parameter and buffer is in the weights
        network = Generator(spec)
    checkpoint.adopt_exactly(network, {k: v for k, v in weights.items() if k != "bank"}, where)
    return StyleGan2Teacher(network, name=name, licence=licence, bank=weights.get("bank"), psi=psi)
