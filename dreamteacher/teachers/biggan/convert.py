"""Published BigGAN weights: read safely, sizes seen in shapes, spectral norm and BatchNorm worked into plain ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.errors import UserError, first_line, shorten

KeyNaming = Literal["biggan-pytorch", "bigbigan", "icgan"]
SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")
# BN_eps and SN_eps of each published code; the output's BatchNorm has 1e-5 everywhere.
EPS: dict[str, tuple[float, float]] = {
    "biggan-pytorch": (1e-5, 1e-12), "bigbigan": (1e-4, 1e-4), "icgan": (1e-5, 1e-6),
}  # fmt: skip
OUTPUT_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class BigGanSettings:
    """The flags that a network was trained with, under their published names.

    What can be seen in the weights may stay None; where it is given it must agree with them.

    Args:
        layout: whose names the tensors have: BigGAN-PyTorch, the BigBiGAN port (used with class 0), IC-GAN.
        resolution: pixels a side; bottom_width: pixels a side of the first map.
        G_ch: width multiplier; G_attn: resolutions with self-attention, "64" or "32_64" ("0": none).
        dim_z: width of the latent, as given or as rounded down to equal pieces.
        shared_dim, shared_dim_feat: widths of the class and of the feature embedding (0: not said).
        n_classes: rows of the class embedding.
        hier: every block gets a piece of the latent; class_cond, instance_cond: and the class, the feature.
        BN_eps, SN_eps: None for the published values of the layout.
        cross_replica, mybn, norm_style: the kind of BatchNorm; G_param: "SN" where weights are spectrally normed.
    """

    layout: KeyNaming
    resolution: int | None = None
    bottom_width: int | None = None
    G_ch: int | None = None
    G_attn: str | None = None
    dim_z: int | None = None
    shared_dim: int | None = None
    shared_dim_feat: int | None = None
    n_classes: int | None = None
    hier: bool | None = None
    class_cond: bool | None = None
    instance_cond: bool | None = None
    BN_eps: float | None = None
    SN_eps: float | None = None
    cross_replica: bool | None = None
    mybn: bool = False
    norm_style: str = "bn"
    G_param: str | None = None


def find_generator(path: Path) -> Path:
    """The file itself, or the one file of averaged generator weights (G_ema*) in a folder or below it.

    Raises:
        UserError: nothing there, or a folder with none or several.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"There is no file '{path}'.", "Check the path.")
    found = sorted(
        p for p in path.rglob("*G_ema*") if p.is_file() and p.suffix in SUFFIXES and "optim" not in p.name
    )
    if len(found) != 1:
        names = f" ({shorten(p.relative_to(path).as_posix() for p in found)})" if found else ""
        raise UserError(
            f"'{path}' holds {len(found)} files of averaged generator weights{names}, not one.",
            "Name the file itself: G_ema.pth or the like.",
        )
    return found[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """`checkpoint.read_state_dict`, floating-point values as float32."""
    found = checkpoint.read_state_dict(path)
    return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}


def spectral_norm(weight: Tensor, u: Tensor, eps: float) -> Tensor:
    """sigma of a weight as evaluation mode has it: v W^T u^T after ONE power iteration from the stored u.

    Args:
        weight: out x ...; u: 1 x out, as stored, of any length.
        eps: the least length that a vector is divided by.

    Source: Miyato et al. 2018, algorithm 1. Golden: biggan_hier64 and the others, whose u is not converged.

    Example:
        >>> float(spectral_norm(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[2.0, 0.0]]), 1e-12))
        3.0
    """
    matrix = weight.flatten(1)
    v = F.normalize(u @ matrix, eps=eps)
    back = v @ matrix.T
    return (back @ F.normalize(back, eps=eps).T).squeeze()


class Conditioning(NamedTuple):
    """What every block's BatchNorm is told, in the order in which it is joined: class, feature, latent piece."""

    class_cond: bool
    instance_cond: bool
    hier: bool


class _State:
    """A published state dict, read name by name: what is missing or left over is an error."""

    def __init__(self, tensors: Mapping[str, Tensor], where: Path, eps: float) -> None:
        self.where, self.eps = where, eps
        last = "output_layer.2.weight"
        ends = [k for k in tensors if k == last or k.endswith(f".{last}")]
        if len(ends) != 1:
            raise UserError(
                f"'{where}' is no generator of the BigGAN family: it has {len(ends)} tensors '{last}' "
                f"among {shorten(tensors, 2)}.",
                "Give the generator's own weights (G_ema.pth), not the discriminator's or the optimiser's.",
            )
        prefix = ends[0].removesuffix(last)  # of a wrapper: "module."
        self.left = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    def get(self, name: str, dims: int) -> Tensor:
        """A tensor that must be there with so many dimensions; it stays."""
        value = self.left.get(name)
        if value is None or value.dim() != dims or not value.numel() or not value.is_floating_point():
            found = "is missing" if value is None else f"is {value.dtype} {tuple(value.shape)}"
            raise UserError(
                f"'{self.where}' is no generator of this layout: '{name}' {found}.",
                "Check `layout`; BigGAN-deep and networks without a shared embedding are not supported.",
            )
        return value

    def take(self, name: str, dims: int) -> Tensor:
        """The same in float64, and it is done with."""
        value = self.get(name, dims).double()
        del self.left[name]
        return value

    def weight(self, name: str, dims: int) -> Tensor:
        """A layer's weight divided by its sigma, if it is spectrally normed (then a u0 lies beside it)."""
        value = self.take(f"{name}.weight", dims)
        if f"{name}.u0" not in self.left:
            return value
        u = self.take(f"{name}.u0", 2)
        if u.shape != (1, len(value)):
            raise UserError(
                f"'{self.where}': {name}.u0 is {tuple(u.shape)}, not {(1, len(value))}.",
                "The file is damaged: download it again.",
            )
        return value / spectral_norm(value, u, self.eps)

    def finish(self) -> None:
        """Nothing may be left but what evaluation never uses: logged values, counters."""
        unused = re.compile(r"(^|\.)(u\d+|sv\d+|num_batches_tracked)$")
        left = [k for k in self.left if not unused.search(k)]
        if left:
            raise UserError(
                f"'{self.where}' holds {len(left)} tensors that this layout does not have ({shorten(left, 2)}).",
                "Check `layout`, and that the file holds one generator alone.",
            )


def to_plain(
    tensors: Mapping[str, Tensor], settings: BigGanSettings, where: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A published state dict as plain weights (float32, BigGanNetwork's names) and the fields of its BigGanSpec.

    Every spectrally normed weight is divided by its sigma; BatchNorm's 1 / sqrt(var + eps) goes into the gains,
    the attention's gamma into its last convolution. All of it in float64, rounded once.

    Raises:
        UserError: foreign, damaged or unsupported weights; settings that disagree with them, or do not suffice.
    """
    bn_eps, sn_eps = _eps(settings)
    state = _State(tensors, where, sn_eps)
    _refuse_unsupported(settings, state)
    fields, conditioning = _sizes(state, settings)
    try:
        plain = _plain(state, settings, fields, conditioning, bn_eps)
    except RuntimeError as error:  # tensors that belong together have different lengths
        raise UserError(
            f"'{where}' does not fit together: {first_line(error)}",
            "The file is damaged or of another kind: download it again.",
        ) from error
    broken = [k for k, v in plain.items() if not bool(torch.isfinite(v).all())]
    if broken:
        raise UserError(
            f"'{where}' gives NaN or infinity in {len(broken)} weights ({shorten(broken, 2)}).",
            "The file is damaged: download it again.",
        )
    return {k: v.float().contiguous() for k, v in plain.items()}, fields


def _plain(
    state: _State, settings: BigGanSettings, fields: dict[str, Any], conditioning: Conditioning, bn_eps: float
) -> dict[str, Tensor]:
    """The weights in float64; nothing of the state may be left over."""
    plain: dict[str, Tensor] = {}
    if conditioning.class_cond:
        plain["classes.weight"] = state.take("shared.weight", 2)
    if conditioning.instance_cond:
        plain["features.weight"] = state.weight("shared_feat", 2)
        plain["features.bias"] = state.take("shared_feat.bias", 1)
    if settings.layout == "bigbigan":  # trained without classes: its first row stands for "no class"
        plain["classes.weight"] = plain["classes.weight"][:1]
        fields["classes"] = 1
    plain["linear.weight"] = state.weight("linear", 2)
    plain["linear.bias"] = state.take("linear.bias", 1)
    for i in range(len(fields["channels"]) - 1):
        for name, value in _block(state, i, bn_eps, i in fields["attention"]):
            plain[f"blocks.{i}.{name}"] = value
    plain.update(_output(state))
    for embedding in ("shared", "shared_feat"):  # there, but not used without its condition
        for k in [k for k in state.left if k.startswith(f"{embedding}.")]:
            del state.left[k]
    state.finish()
    return plain


def _eps(settings: BigGanSettings) -> tuple[float, float]:
    if settings.layout not in EPS:
        raise UserError(f"There is no layout {settings.layout!r}.", f"Layouts: {', '.join(EPS)}.")
    bn, sn = EPS[settings.layout]
    return (
        bn if settings.BN_eps is None else settings.BN_eps,
        sn if settings.SN_eps is None else settings.SN_eps,
    )


def _refuse_unsupported(settings: BigGanSettings, state: _State) -> None:
    replicas = "blocks.0.0.bn1.bn.running_mean" in state.left
    if settings.layout != "icgan" and (settings.cross_replica or replicas):
        raise UserError(
            f"'{state.where}' was trained with cross_replica, whose evaluation in that code adds BatchNorm's "
            "gain instead of multiplying it.",
            "Use a checkpoint trained without the option; if it is IC-GAN's, whose code is right, set layout icgan.",
        )
    if settings.mybn or settings.norm_style != "bn":
        raise UserError(
            f"mybn {settings.mybn}, norm_style '{settings.norm_style}' cannot be read: only plain "
            "BatchNorm is known.",
            "Use a checkpoint with mybn False and norm_style 'bn'.",
        )


def _sizes(state: _State, settings: BigGanSettings) -> tuple[dict[str, Any], Conditioning]:
    """The fields of a BigGanSpec from the shapes, and what conditions the blocks; the settings must agree."""
    depth = 0
    while f"blocks.{depth}.0.conv1.weight" in state.left:
        depth += 1
    convs = [state.get(f"blocks.{i}.0.conv1.weight", 4) for i in range(max(depth, 1))]
    channels = [convs[0].shape[1], *(c.shape[0] for c in convs)]
    rows, latent = state.get("linear.weight", 2).shape
    bottom = math.isqrt(rows // channels[0])
    attention = [i for i in range(depth) if f"blocks.{i}.1.gamma" in state.left]
    shared = state.get("shared.weight", 2)
    feat = state.get("shared_feat.weight", 2) if "shared_feat.weight" in state.left else None
    width = state.get("blocks.0.0.bn1.gain.weight", 2).shape[1]
    parts = (shared.shape[1], feat.shape[0] if feat is not None else 0, latent)
    chosen = _conditioning(settings, width, parts, state.where)
    slots = depth + 1 if chosen.hier else 1
    seen = {
        "resolution": bottom * 2**depth, "bottom_width": bottom, "dim_z": latent * slots,
        "G_ch": channels[0] // (16 if bottom * 2**depth > 32 else 4), "n_classes": len(shared),
        "G_attn": "_".join(str(bottom * 2 ** (i + 1)) for i in attention) or "0",
        "shared_dim": parts[0], "shared_dim_feat": parts[1],
        "cross_replica": "blocks.0.0.bn1.bn.running_mean" in state.left,
        "G_param": "SN" if "linear.u0" in state.left else "none",
    }  # fmt: skip
    _check(settings, seen, slots, state.where)
    fields = {
        "channels": channels, "bottom": bottom, "attention": attention, "latent": latent,
        "hierarchical": chosen.hier,
        "classes": len(shared) if chosen.class_cond else 0,
        "class_width": parts[0] if chosen.class_cond else 0,
        "features": feat.shape[1] if chosen.instance_cond and feat is not None else 0,
        "feature_width": parts[1] if chosen.instance_cond else 0,
    }  # fmt: skip
    return fields, chosen


def _conditioning(
    settings: BigGanSettings, width: int, parts: tuple[int, int, int], where: Path
) -> Conditioning:
    """The conditions whose widths (`parts`) sum to that of the blocks' condition: there must be exactly one way.

    It is ambiguous when two widths are equal, for example the class embedding's and a latent piece's.
    """
    choices = [(c, f, h) for c in (False, True) for f in (False, True) for h in (False, True)]
    possible = [
        Conditioning(*choice)
        for choice in choices
        if sum(p for p, used in zip(parts, choice, strict=True) if used) == width
        and (choice[1] is False or parts[1])
        and (settings.layout == "icgan" or choice[:2] == (True, False))
    ]
    flags = {name: getattr(settings, name) for name in Conditioning._fields}
    fitting = [c for c in possible if all(v in (None, getattr(c, k)) for k, v in flags.items())]
    if len(fitting) == 1:
        return fitting[0]
    widths = f"class {parts[0]}, feature {parts[1]}, latent piece {parts[2]}"
    ways = "; ".join(", ".join(f"{k} {v}" for k, v in c._asdict().items()) for c in (fitting or possible)[:3])
    if fitting:
        raise UserError(
            f"'{where}': a condition {width} wide can come about in {len(fitting)} ways ({widths}).",
            f"Say which: {ways}.",
        )
    given = ", ".join(f"{k} {v}" for k, v in flags.items() if v is not None) or "the layout"
    raise UserError(
        f"'{where}': a condition {width} wide does not fit {given} ({widths}).",
        f"From the shapes: {ways}." if possible else "Check `layout`.",
    )


def _check(settings: BigGanSettings, seen: Mapping[str, Any], slots: int, where: Path) -> None:
    """Settings that were given must agree with what the shapes say."""
    first, last = seen["bottom_width"] * 2, seen["resolution"]

    def plain(name: str, value: Any) -> Any:
        if name == "dim_z":  # rounded down to equal pieces, as training did
            return value // slots * slots
        if name == "G_attn":
            return {r for r in map(int, re.findall(r"\d+", str(value))) if first <= r <= last}
        return value

    for name, value in seen.items():
        given = getattr(settings, name)
        if given is None or (name in ("shared_dim", "shared_dim_feat") and given == 0):
            continue
        if plain(name, given) != plain(name, value):
            raise UserError(
                f"'{where}' has {name} {value}, not {given} as given.",
                f"Leave {name} out (it is read from the weights), or give the file that it belongs to.",
            )


def _norm(state: _State, name: str, eps: float) -> tuple[Tensor, Tensor]:
    """BatchNorm's stored mean and 1 / sqrt(var + eps), under either code's names."""
    inner = f"{name}.bn.running_" if f"{name}.bn.running_mean" in state.left else f"{name}.stored_"
    mean, var = state.take(f"{inner}mean", 1), state.take(f"{inner}var", 1)
    return mean, (var + eps).rsqrt()


def _block(state: _State, i: int, eps: float, attention: bool) -> Iterator[tuple[str, Tensor]]:
    ours = {"conv1": "conv1", "conv2": "conv2", "conv_sc": "shortcut"}
    for theirs, name in ours.items():
        yield f"{name}.weight", state.weight(f"blocks.{i}.0.{theirs}", 4)
        yield f"{name}.bias", state.take(f"blocks.{i}.0.{theirs}.bias", 1)
    for theirs, name in {"bn1": "norm1", "bn2": "norm2"}.items():
        key = f"blocks.{i}.0.{theirs}"
        mean, inverse = _norm(state, key, eps)
        yield f"{name}.mean", mean
        yield f"{name}.scale.weight", state.weight(f"{key}.gain", 2) * inverse[:, None]
        yield f"{name}.scale.bias", inverse  # the gain is 1 + its linear layer
        yield f"{name}.shift.weight", state.weight(f"{key}.bias", 2)
    if attention:
        key = f"blocks.{i}.1"
        for theirs, name in {"theta": "query", "phi": "key", "g": "value"}.items():
            yield f"attention.{name}.weight", state.weight(f"{key}.{theirs}", 4)
        yield "attention.out.weight", state.weight(f"{key}.o", 4) * state.take(f"{key}.gamma", 0)


def _output(state: _State) -> dict[str, Tensor]:
    key = "output_layer.0"
    gain, bias = ("bn.weight", "bn.bias") if f"{key}.bn.weight" in state.left else ("gain", "bias")
    mean, inverse = _norm(state, key, OUTPUT_EPS)
    return {
        "norm.mean": mean,
        "norm.scale": state.take(f"{key}.{gain}", 1) * inverse,
        "norm.shift": state.take(f"{key}.{bias}", 1),
        "conv.weight": state.weight("output_layer.2", 4),
        "conv.bias": state.take("output_layer.2.bias", 1),
    }
