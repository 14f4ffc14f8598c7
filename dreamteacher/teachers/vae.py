"""VAE teachers: an autoencoder whose DECODER maps are read while it decodes an image's latent, or one drawn.

The network is one of diffusers' `AutoencoderKL`, `AutoencoderTiny` (TAESD), `VQModel` and `AutoencoderDC`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import Decoder as DecoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d_blocks import AttnUpDecoderBlock2D, UpDecoderBlock2D
from torch import Tensor, nn

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import from_json
from dreamteacher.runtime.distributed.world import randint, randn
from dreamteacher.runtime.errors import UserError, first_line, shorten
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.cost import channels_by_stride, gmacs
from dreamteacher.teachers.diffusers_folder import arguments_of, modern_attention, read_config, read_table
from dreamteacher.teachers.family import Cost, Family

Kind = Literal["kl", "tiny", "vq", "dc"]
Vae = AutoencoderKL | AutoencoderTiny | VQModel | AutoencoderDC
CLASSES: dict[Kind, type[Vae]] = {
    "kl": AutoencoderKL,
    "tiny": AutoencoderTiny,
    "vq": VQModel,
    "dc": AutoencoderDC,
}
ORIGINAL = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")
STEM = "diffusion_pytorch_model"


@dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """Everything that rebuilds an autoencoder and is not in its weights (teacher.json, "network").

    Args:
        kind: kl (AutoencoderKL), tiny (AutoencoderTiny), vq (VQModel) or dc (AutoencoderDC).
        config: keyword arguments of that class, plain JSON values.
        size: (height, width) in pixels of its samples, and of its images unless the user names another.
    """

    family: ClassVar[str] = "vae"
    kind: Kind
    config: dict[str, Any]
    size: tuple[int, int] = (256, 256)


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    """What published files may leave open: (height, width) in pixels; none: their `sample_size`, or 256."""

    size: tuple[int, int] | None = None


def latents(vae: Vae, x: Tensor) -> Tensor:
    """The latent that the decoder takes, not scaled, of network input x (N x C x H x W in [-1, 1]).

    The mode (mean) of the posterior, or for VQ the nearest codebook entries: no random number is drawn.
    """
    h = vae.encoder(x)
    if isinstance(vae, AutoencoderKL):
        h = h if vae.quant_conv is None else vae.quant_conv(h)
        return h.chunk(2, dim=1)[0]  # mean and log-variance
    if isinstance(vae, VQModel):
        return vae.quantize(vae.quant_conv(h))[0]
    return h


def decode(vae: Vae, z: Tensor, count: int, *, whole: bool) -> tuple[list[Tensor], Tensor]:
    """The maps of the first `count` decoder levels, each BEFORE its upsampler, coarse to fine, and the last value.

    Args:
        z: the latent, as from `latents`.
        whole: go on to the image (N x C x H x W, about [-1, 1]), which is then the last value; otherwise the
            walk stops at the last map.

    Test: equal (0.0) to what the library's own `decode` computes at those places, and to its result.
    """
    if isinstance(vae, AutoencoderTiny):
        return _walk_tiny(vae.decoder, z, count, whole)
    if isinstance(vae, AutoencoderDC):
        return _walk_dc(vae.decoder, z, count, whole)
    spatial = isinstance(vae, VQModel) and vae.config["norm_type"] == "spatial"
    quantised = z if spatial else None  # which then enters every normalisation
    if vae.post_quant_conv is not None:
        z = vae.post_quant_conv(z)
    return _walk(cast(Decoder, vae.decoder), z, quantised, count, whole)


def _walk(
    decoder: Decoder, z: Tensor, quantised: Tensor | None, count: int, whole: bool
) -> tuple[list[Tensor], Tensor]:
    x = decoder.mid_block(decoder.conv_in(z), quantised)
    maps: list[Tensor] = []
    for i in range(len(decoder.up_blocks) if whole else count):
        up = cast(UpDecoderBlock2D | AttnUpDecoderBlock2D, decoder.up_blocks[i])
        attentions = up.attentions if isinstance(up, AttnUpDecoderBlock2D) else [None] * len(up.resnets)
        for resnet, attention in zip(up.resnets, attentions, strict=True):
            x = resnet(x, temb=quantised)
            if attention is not None:
                x = attention(x, temb=quantised)
        if i < count:
            maps.append(x)
        if (whole or i + 1 < count) and up.upsamplers is not None:
            for upsampler in up.upsamplers:
                x = upsampler(x)
    if not whole:
        return maps, x
    x = decoder.conv_norm_out(x) if quantised is None else decoder.conv_norm_out(x, quantised)
    return maps, decoder.conv_out(decoder.conv_act(x))


def _walk_tiny(decoder: DecoderTiny, z: Tensor, count: int, whole: bool) -> tuple[list[Tensor], Tensor]:
    x = torch.tanh(z / 3) * 3  # TAESD's soft clamp
    maps: list[Tensor] = []
    for layer in decoder.layers:
        if isinstance(layer, nn.Upsample) and len(maps) < count:
            maps.append(x)
            if len(maps) == count and not whole:
                return maps, x
        x = layer(x)
    return maps, x.mul(2).sub(1)


def _walk_dc(decoder: DecoderDC, z: Tensor, count: int, whole: bool) -> tuple[list[Tensor], Tensor]:
    x = decoder.conv_in(z)
    if decoder.in_shortcut:
        repeats = decoder.in_shortcut_repeats
        x = x + z.repeat_interleave(repeats, dim=1, output_size=z.shape[1] * repeats)
    maps: list[Tensor] = []
    levels = len(decoder.up_blocks)
    for i in range(levels if whole else count):
        x = decoder.up_blocks[levels - 1 - i](x)  # begins with the upsampler of the level before
        if i < count:
            maps.append(x)
    if not whole:
        return maps, x
    x = decoder.conv_act(decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1))
    return maps, cast(nn.Module, decoder.conv_out)(x)


def levels_of(vae: Vae) -> list[tuple[int, int]]:
    """(stride, channels) of every decoder level before its upsampler, coarse to fine.

    Raises:
        UserError: where encoder and decoder do not scale alike.
    """
    config, factor = vae.config, 2
    if isinstance(vae, AutoencoderTiny):
        channels = list(config["decoder_block_out_channels"])
        factor = config["upsampling_scaling_factor"]
        enlarges, reduces = factor ** (len(channels) - 1), 2 ** (len(config["num_encoder_blocks"]) - 1)
        if enlarges != reduces:
            raise UserError(
                f"The encoder reduces by {reduces}, but the decoder enlarges by {enlarges}.",
                "Name an autoencoder whose output is as large as its input.",
            )
    else:
        half = "decoder_" if isinstance(vae, AutoencoderDC) else ""
        channels = list(reversed(config[f"{half}block_out_channels"]))
    return [(factor ** (len(channels) - 1 - i), c) for i, c in enumerate(channels)]


class VaeTeacher(Teacher):
    """Decoder maps of an autoencoder, of real images (encode) or of latents drawn from the prior (sample).

    Both modes give the same levels, each before its upsampler: strides 4 and 8 for the common f8, also 16 and
    32 for f16 and f32. Encoding draws no random numbers.

    A latent is drawn from what the autoencoder was regularised towards: N(0, 1) divided by the scaling factor
    (KL, DC; TAESD's is 1), independent uniform codebook entries (VQ). Published autoencoders are regularised
    weakly or not at all: samples (of TAESD: looked at) are patches of colour with sharp edges, no objects.

    Args:
        vae: the network; it is changed (frozen, and cut by `keep_only`).
        spec: how it is called.

    Raises:
        UserError: for networks without a level at stride 4 to 32, decoder blocks that cannot be walked, images
            that are not grey or RGB, or a size that is not a multiple of its reduction.
    """

    family = VaeSpec.family

    def __init__(self, vae: Vae, spec: VaeSpec, *, name: str, licence: str) -> None:
        super().__init__()
        self.vae, self.spec, self.name, self.licence = vae, spec, name, licence
        self.modes, self.size = frozenset({"encode", "sample"}), spec.size
        self.grey = vae.config["in_channels"] == 1
        if vae.config["in_channels"] not in (1, 3):
            raise UserError(
                f"'{name}' takes images of {vae.config['in_channels']} channels.", "Use one for grey or RGB."
            )
        for block in vae.decoder.up_blocks if isinstance(vae.decoder, Decoder) else ():
            if not isinstance(block, (AttnUpDecoderBlock2D, UpDecoderBlock2D)):
                raise UserError(
                    f"'{name}' has a decoder block of type {type(block).__name__}.",
                    "UpDecoderBlock2D and AttnUpDecoderBlock2D can be read.",
                )
        levels = levels_of(vae)
        self._taken = self.take_levels(levels)
        self.multiple, self._count = levels[0][0], self._taken[0] + 1
        self.check_size(*self.size)
        self.freeze()

    def to_network(self, images: Tensor) -> Tensor:
        """RGB in [0, 1] -> the network's input space: [-1, 1], grey if it is."""
        x = images.mean(1, keepdim=True) if self.grey else images
        return (x * 2 - 1).contiguous(memory_format=torch.channels_last)

    def to_images(self, x: Tensor) -> Tensor:
        """What the decoder gives -> RGB in [0, 1], clamped."""
        return ((x.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    @torch.no_grad()
    def encode(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        if "encode" not in self.modes:
            raise self._cannot("encode")
        self.check_size(*images.shape[-2:])
        z = latents(self.vae, self.to_network(images))
        maps, _ = decode(self.vae, z, self._count, whole=False)
        return [maps[i] for i in self._taken]

    def draw(self, n: int, *, generator: torch.Generator) -> Tensor:
        """n latents of the prior at the teacher's own size, as the decoder takes them."""
        height, width = (side // self.multiple for side in self.size)
        config, device = self.vae.config, next(self.vae.parameters()).device
        if isinstance(self.vae, VQModel):
            book = self.vae.quantize.embedding.weight
            indices = randint(len(book), (n, height, width), generator, device=device)
            return book[indices].permute(0, 3, 1, 2)
        z = randn((n, config["latent_channels"], height, width), generator, device=device)
        z = z / config["scaling_factor"]
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean and std:  # per channel, as in some variants of SDXL's
            return z * z.new_tensor(std).view(1, -1, 1, 1) + z.new_tensor(mean).view(1, -1, 1, 1)
        return z + (config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """n images from latents of the prior, and the maps of the same pass of the decoder."""
        if "sample" not in self.modes:
            raise self._cannot("sample")
        z = self.draw(n, generator=generator).contiguous(memory_format=torch.channels_last)
        maps, out = decode(self.vae, z, self._count, whole=True)
        return self.to_images(out), [maps[i] for i in self._taken]

    def keep_only(self, mode: str) -> None:
        super().keep_only(mode)
        vae, decoder = self.vae, self.vae.decoder
        if mode == "sample":
            del vae.encoder
            if not isinstance(vae, (AutoencoderTiny, AutoencoderDC)):
                del vae.quant_conv
        elif isinstance(decoder, DecoderTiny):
            places = [i for i, layer in enumerate(decoder.layers) if isinstance(layer, nn.Upsample)]
            decoder.layers = decoder.layers[: places[self._count - 1] + 1]
        elif isinstance(decoder, DecoderDC):
            for i in range(len(decoder.up_blocks) - self._count):  # places are counted from the other end
                decoder.up_blocks[i] = nn.Identity()
            del decoder.norm_out, decoder.conv_out
        else:
            decoder.up_blocks = decoder.up_blocks[: self._count]
            del cast(nn.Module, decoder.up_blocks[-1]).upsamplers
            del decoder.conv_norm_out, decoder.conv_out


def build_vae(weights: Mapping[str, Tensor], spec: VaeSpec, where: Path) -> Vae:
    """The network of a spec with these weights; no weights are drawn only to be replaced."""
    try:
        with torch.device("meta"):
            vae = CLASSES[spec.kind](**spec.config)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise UserError(
            f"The autoencoder of '{where}' cannot be built: {type(error).__name__} {first_line(error)}",
            "Mend its kind or config, or convert the published files again.",
        ) from None
    checkpoint.adopt_exactly(vae, weights, where)
    return vae


def load(weights: Mapping[str, Tensor], spec: VaeSpec, where: Path, *, name: str, licence: str) -> VaeTeacher:
    """See `Family`."""
    return VaeTeacher(build_vae(weights, spec, where), spec, name=name, licence=licence)


def convert(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], VaeSpec]:
    """Weights (as published, only keys renamed) and spec of a local autoencoder.

    Args:
        path: a folder with config.json and safetensors as diffusers writes it (or with such a folder `vae` in
            it), or one with TAESD's original pair taesd_encoder.safetensors and taesd_decoder.safetensors.
        settings: see `VaeSettings`.
    """
    asked = from_json(VaeSettings, dict(settings))
    if all((path / name).is_file() for name in ORIGINAL):
        encoder, decoder = (checkpoint.read_state_dict(path / name) for name in ORIGINAL)
        weights = tiny_from_original(encoder, decoder)
        spec = VaeSpec(kind="tiny", config=_tiny_config(weights), size=asked.size or (256, 256))
    else:
        if not any((path / name).is_file() for name in ("config.json", "vae/config.json")):
            raise UserError(
                f"'{path}' holds no autoencoder: neither config.json nor {' and '.join(ORIGINAL)}.",
                "Give the folder that diffusers' `save_pretrained` writes, or the one of TAESD's two files.",
            )
        kind, config, weights = read_folder(path, tuple(CLASSES))
        side = config.get("sample_size") or 256
        height, width = asked.size or (side if isinstance(side, list) else (side, side))
        spec = VaeSpec(kind=kind, config=config, size=(height, width))
    VaeTeacher(build_vae(weights, spec, path), spec, name=path.name, licence="")
    return weights, spec


def safetensors_of(folder: Path, stem: str) -> list[Path]:
    """The files that hold a part's weights: one, its half-precision variant, or several with an index.

    Raises:
        UserError: where there are none, saying why others are not read.
    """
    for variant in ("", ".fp16"):
        if (folder / f"{stem}{variant}.safetensors").is_file():
            return [folder / f"{stem}{variant}.safetensors"]
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = read_table(index, repair="Download the whole folder again.").get("weight_map")
        if isinstance(names, dict) and names:
            return [folder / Path(str(name)).name for name in sorted(set(names.values()))]
        raise UserError(f"'{index}' names no files of weights.", "Download the whole folder again.")
    others = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    why = f"; {shorten(others)} may run code when it is read, so it is not" if others else ""
    raise UserError(
        f"'{folder}' has no {stem}.safetensors (nor {stem}.fp16.safetensors){why}.",
        "Download the safetensors files of the model.",
    )


def part_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a network's folder, in the precision of its files.

    Raises:
        UserError: for missing or damaged files.
    """
    return {
        k: v for file in safetensors_of(folder, STEM) for k, v in checkpoint.read_state_dict(file).items()
    }


def read_folder(path: Path, kinds: Collection[Kind]) -> tuple[Kind, dict[str, Any], dict[str, Tensor]]:
    """Kind, arguments and weights of an autoencoder in diffusers' layout: of this folder, or of `vae` in it.

    Raises:
        UserError: for missing or damaged files, or an autoencoder of none of `kinds`.
    """
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    names = {CLASSES[kind].__name__: kind for kind in kinds}
    name, values = read_config(
        folder,
        names,
        repair="Download it again.",
        refusal="which is not an autoencoder that can be read",
        others=f"Use one of: {', '.join(names)}.",
    )
    kind = names[name]
    return kind, arguments_of(CLASSES[kind], values), modern_attention(part_weights(folder))


def tiny_from_original(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """State dict of `AutoencoderTiny` from TAESD's original files; of its encoder alone where decoder is None.

    The original decoder is a Sequential that begins with a clamp, which `AutoencoderTiny` computes outside of
    its layers: every index is one less there.

    Raises:
        UserError: for keys that are not TAESD's, or files that were swapped.

    Example:
        >>> list(tiny_from_original({"0.bias": torch.zeros(64)}, {"1.bias": torch.zeros(64)}))
        ['encoder.layers.0.bias', 'decoder.layers.0.bias']
    """
    for weights, what, first in ((encoder, "encoder", "0.bias"), (decoder, "decoder", "1.bias")):
        if weights is None:
            continue
        foreign = [k for k in weights if not re.fullmatch(r"\d+\.(conv\.[024]\.)?(weight|bias)", k)]
        if foreign or first not in weights:
            wrong = f"unexpected {shorten(foreign, 2)}" if foreign else f"there is no {first}"
            raise UserError(
                f"This is no TAESD {what} in its original layout: {wrong}.",
                f"Expected keys such as {first}, 3.conv.0.weight. Is it the other half?",
            )
    out = {f"encoder.layers.{k}": v for k, v in encoder.items()}
    for key, value in (decoder or {}).items():
        index, _, rest = key.partition(".")
        out[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    return out


def _tiny_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of AutoencoderTiny: width and latent channels by their shapes; TAESD's depth is the default."""
    first = weights["decoder.layers.0.weight"]
    width = [first.shape[0]] * 4
    return {
        "latent_channels": first.shape[1],
        "encoder_block_out_channels": width,
        "decoder_block_out_channels": width,
    }


def cost(spec: VaeSpec) -> Cost:
    """Of encoding and decoding, and of its part up to the finest level."""
    with torch.device("meta"):
        vae = CLASSES[spec.kind](**spec.config)
        image = torch.empty(1, vae.config["in_channels"], *spec.size)
    teacher = VaeTeacher(vae, spec, name="", licence="")
    z = latents(vae, image)
    finest = teacher.specs[0].stride
    count = sum(stride >= finest for stride, _ in levels_of(vae))
    encoder = gmacs(lambda: latents(vae, image))
    full, needed = (gmacs(lambda: decode(vae, z, count, whole=w)) for w in (True, False))  # noqa: B023
    return Cost(channels_by_stride(teacher.specs), ("encode", "sample"), encoder + full, encoder + needed)


def tiny() -> tuple[dict[str, Tensor], VaeSpec]:
    """A KL autoencoder of 64 px with levels at strides 4 and 8."""
    config = {
        "block_out_channels": [4, 8, 12, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 4,
    }
    spec = VaeSpec(kind="kl", config=config, size=(64, 64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLASSES[spec.kind](**spec.config).state_dict(), spec


FAMILY = Family(name="vae", spec=VaeSpec, load=load, convert={"vae": convert}, tiny=tiny, cost=cost)
