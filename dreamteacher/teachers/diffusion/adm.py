"""Published diffusion U-Nets become teachers of the family "diffusion": guided-diffusion's (ADM) state dicts,
and folders of diffusers' `UNet2DModel` (google/ddpm-*-256 and others).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import from_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.diffusers_folder import modern_attention, read_config, read_table
from dreamteacher.teachers.diffusion.adm_keys import AdmNetwork, foreign, network_of, renamed
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, DiffusionTeacher, Schedule, build_unet


@dataclass(frozen=True, kw_only=True)
class AdmFlags:
    """What is known of a guided-diffusion network, under its published names.

    The first five are not in the weights and decide every number, so they have no default (of the two about
    heads, one is enough). All that follows is read from the weights, and checked where it is given.

    Args:
        image_size: pixels per side that it was trained at.
        noise_schedule: "linear" or "cosine".
        use_new_attention_order: rows of the qkv layers are [q, k, v][head][channel], not [head][q, k, v][channel].
        num_head_channels: width of a head, the number grows with the level; -1: see num_heads.
        num_heads: heads at every level; counts only without num_head_channels.
        num_heads_upsample: -1, or the same as num_heads.
        attention_resolutions: downsampling factors with attention (not rows of pixels).
        dropout, use_checkpoint, use_fp16, conv_resample: without effect on the maps, or seen in the weights.
        diffusion_steps: steps of the schedule.
        timestep: t of the features (spec: 150 for ImageNet, 50 elsewhere).
        null_class: the class that means "no label", where there is one (the published networks have none).
    """

    image_size: int | None = None
    noise_schedule: Literal["linear", "cosine"] | None = None
    use_new_attention_order: bool | None = None
    num_head_channels: int | None = None
    num_heads: int | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    learn_sigma: bool | None = None
    model_channels: int | None = None
    channel_mult: tuple[float, ...] | None = None
    num_res_blocks: int | None = None
    attention_resolutions: tuple[int, ...] | None = None
    num_classes: int | None = None
    use_scale_shift_norm: bool | None = None
    resblock_updown: bool | None = None
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_fp16: bool = False
    conv_resample: bool = True
    num_heads_upsample: int = -1
    diffusion_steps: int = 1000
    timestep: int = 50
    null_class: int | None = None

    @property
    def head_width(self) -> int | None:
        """Channels of a head, or none when their number is fixed."""
        width = self.num_head_channels
        return None if width is None or width == -1 else width

    def heads_of(self, width: int) -> int:
        """The number of heads at an attention over `width` channels."""
        return width // self.head_width if self.head_width else self.num_heads or 1

    def missing(self) -> list[str]:
        """The names of what the weights cannot tell and was not given."""
        needed = ["image_size", "noise_schedule", "use_new_attention_order"]
        names = [n for n in needed if getattr(self, n) is None]
        return names if self.head_width or self.num_heads else [*names, "num_head_channels or num_heads"]


def convert(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], DiffusionSpec]:
    """A guided-diffusion checkpoint as the state dict of diffusers' UNet2DModel, and the spec that builds it.

    Args:
        path: a plain state dict, .pt (read with weights_only) or .safetensors.
        settings: see AdmFlags.

    Source: Dhariwal & Nichol 2021; key map in `adm_keys.pairs`. Golden: adm_*.safetensors.
    """
    flags = from_json(AdmFlags, dict(settings))
    if missing := flags.missing():
        raise UserError(
            f"The weights of a guided-diffusion network do not say: {', '.join(missing)}.",
            "Give these flags as they were in training; wrong ones run, and give wrong features.",
        )
    weights = checkpoint.read_state_dict(path)
    network = network_of(weights, path)
    _check_flags(flags, network, path)
    spec = _spec(flags, network)
    new_order = bool(flags.use_new_attention_order)
    return renamed(weights, _shapes(spec), network, flags.heads_of, path, new_order=new_order), spec


def _check_flags(flags: AdmFlags, network: AdmNetwork, path: Path) -> None:
    """Raises UserError at the first flag that says something else than the weights."""
    found = {
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "learn_sigma": network.out_channels == 2 * network.in_channels,
        "model_channels": network.model_channels,
        "channel_mult": tuple(w / network.model_channels for w in network.widths),
        "num_res_blocks": network.blocks,
        "attention_resolutions": tuple(2**i for i, there in enumerate(network.attention) if there),
        "num_classes": network.classes,
        "use_scale_shift_norm": network.scale_shift,
        "resblock_updown": network.updown,
    }
    for name, value in found.items():
        given = getattr(flags, name)
        given = tuple(sorted(given)) if name == "attention_resolutions" and given is not None else given
        if given is not None and given != value:
            raise UserError(
                f"The flag {name} is {given}, and the weights of '{path}' have {value}.",
                "Leave the flag out (the weights tell it), or give the file that it belongs to.",
            )
    if network.in_channels not in (1, 3):
        foreign(path, f"it takes {network.in_channels} channels, not an image")
    divisor = flags.head_width or flags.num_heads or 1
    levels = zip(network.widths, network.attention, strict=True)
    odd = [w for w in (*(w for w, there in levels if there), network.widths[-1]) if w % divisor]
    if odd or flags.num_heads_upsample not in (-1, flags.num_heads):
        heads = f"heads of {divisor} channels" if flags.head_width else f"{divisor} heads"
        more = f"and {flags.num_heads_upsample} in the decoder" if not odd else f"over {odd[0]} channels"
        raise UserError(
            f"Attention with {heads} {more} cannot be in '{path}'.",
            "Give num_head_channels or num_heads as in training, the same for all levels.",
        )


def _spec(flags: AdmFlags, network: AdmNetwork) -> DiffusionSpec:
    """The spec of that network; see the spec of UNet2DModel for each key."""
    kind = "resnet" if network.updown else "conv"
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if network.updown
        else ("DownBlock2D", "UpBlock2D")
    )
    size = flags.image_size or 0
    return DiffusionSpec(
        unet={
            "sample_size": size,
            "in_channels": network.in_channels,
            "out_channels": network.out_channels,
            "block_out_channels": list(network.widths),
            "layers_per_block": network.blocks,
            "down_block_types": ["AttnDownBlock2D" if a else down for a in network.attention],
            "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(network.attention)],
            "downsample_type": kind,
            "upsample_type": kind,
            "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
            "attention_head_dim": flags.head_width,
            "norm_num_groups": 32,
            "attn_norm_num_groups": 32,  # else the middle attention has no norm
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "time_embedding_type": "positional",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "time_embedding_dim": network.time_width,
        },
        image_channels=network.in_channels,
        size=(size, size),
        schedule=cast(Schedule, flags.noise_schedule),
        steps=flags.diffusion_steps,
        timestep=flags.timestep,
        heads=None if flags.head_width else flags.num_heads,
        classes=network.classes,
        null_class=flags.null_class,
        time_width=network.model_channels if network.model_channels != network.widths[0] else None,
    )


def _shapes(spec: DiffusionSpec) -> dict[str, tuple[int, ...]]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return {k: tuple(v.shape) for k, v in build_unet(spec).state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class DiffusersFlags:
    """What may be said of a UNet2DModel folder.

    Args:
        timestep: t of the features.
        noise_schedule: needed where the folder has no scheduler_config.json.
        image_size: pixels per side, needed where config.json has no sample_size.
    """

    timestep: int = 50
    noise_schedule: Schedule | None = None
    image_size: int | None = None


def convert_diffusers(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], DiffusionSpec]:
    """A local folder of diffusers' UNet2DModel, alone or in a DDPM pipeline, as weights and spec.

    Args:
        path: holds config.json and diffusion_pytorch_model.safetensors (or .bin), or a folder `unet` that does;
            with a scheduler_config.json there or in `scheduler`, the noise schedule is read from it.
        settings: see DiffusersFlags.
    """
    flags = from_json(DiffusersFlags, dict(settings))
    folder = path / "unet" if (path / "unet" / "config.json").is_file() else path
    kind = "UNet2DModel"
    _, config = read_config(
        folder,
        [kind],
        repair=f"Give a whole folder of diffusers' {kind}, or of a pipeline that holds one.",
        others="For a Stable Diffusion folder use the family stable-diffusion.",
        default=kind,
    )
    schedule, steps = _schedule(path, flags)
    sample = config.get("sample_size") or flags.image_size
    if sample is None:
        raise UserError(
            f"'{folder / 'config.json'}' has no sample_size.", "Give image_size (pixels per side)."
        )
    height, width = (sample, sample) if isinstance(sample, int) else sample
    spec = DiffusionSpec(
        unet={k: v for k, v in config.items() if not k.startswith("_") and k != "num_class_embeds"},
        image_channels=config.get("in_channels", 3),
        size=(height, width),
        schedule=schedule,
        steps=steps,
        timestep=flags.timestep,
        classes=config.get("num_class_embeds") or 0,
    )
    if spec.image_channels not in (1, 3):
        raise UserError(
            f"The network of '{folder}' takes {spec.image_channels} channels, not images of 1 or 3.",
            "Latent networks are read with the family stable-diffusion.",
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        unet = build_unet(spec)
        DiffusionTeacher(unet, spec, name=path.name, licence="-")  # raises for what we cannot run
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    file = next((folder / n for n in names if (folder / n).is_file()), folder / names[0])
    weights = modern_attention(checkpoint.read_state_dict(file))
    checkpoint.check_fits(unet, weights, file)
    return weights, spec


def _schedule(path: Path, flags: DiffusersFlags) -> tuple[Schedule, int]:
    """The schedule of a pipeline's scheduler, or of the flag, and its number of steps."""
    files = [path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        if flags.noise_schedule is None:
            raise UserError(
                f"'{path}' has no scheduler_config.json, so its noise schedule is not known.",
                "Give noise_schedule: linear (DDPM), cosine or scaled_linear.",
            )
        return flags.noise_schedule, 1000
    name, steps, predicts = read_schedule(file, get_args(Schedule))
    if predicts != "epsilon" or (flags.noise_schedule or name) != name:
        raise UserError(
            f"'{file}' says that the network predicts {predicts} on the schedule {name}; "
            f"expected epsilon on {flags.noise_schedule or name}.",
            "Networks that predict epsilon can be used; leave noise_schedule out where the folder tells it.",
        )
    return name, steps


def read_schedule(file: Path, usable: Collection[Schedule]) -> tuple[Schedule, int, str]:
    """The schedule, its number of steps and what is predicted, from diffusers' scheduler_config.json.

    Raises:
        UserError: for a file that cannot be read, or a schedule that is none of `usable`.
    """
    found = read_table(file, repair="Download the whole folder again.")
    steps, kind = found.get("num_train_timesteps", 1000), found.get("beta_schedule", "linear")
    given = found.get("beta_start", 1e-4), found.get("beta_end", 0.02)
    changed = [k for k in ("trained_betas", "rescale_betas_zero_snr") if found.get(k)]
    try:
        known: dict[str, tuple[Schedule, tuple[float, float]]] = {
            "linear": ("linear", (0.1 / steps, 20 / steps)),
            "scaled_linear": ("scaled_linear", (0.00085, 0.012)),
            "squaredcos_cap_v2": ("cosine", given),
        }
        name, expected = known[kind]
        if name in usable and not changed and steps > 0 and all(map(math.isclose, given, expected)):
            return name, steps, found.get("prediction_type", "epsilon")
    except (TypeError, ValueError, KeyError, ZeroDivisionError):
        pass  # a number or name that makes no schedule
    more = f", with {' and '.join(changed)}" if changed else ""
    raise UserError(
        f"'{file}' has the schedule {kind} from {given[0]} to {given[1]} in {steps} steps{more}.",
        f"Of {', '.join(usable)} the published ones can be used: linear 0.0001 to 0.02 (1000 steps), "
        "scaled_linear 0.00085 to 0.012, cosine (squaredcos_cap_v2).",
    )
