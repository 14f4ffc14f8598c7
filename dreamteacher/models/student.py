"""Students: full timm backbones that give one map per stride, and their weights under timm's own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamteacher.models.plain_vit import (
    PLAIN_MODULES,
    SWIN_MODULES,
    fit,
    grid_of,
    pooled_tokens,
    size_settings,
)
from dreamteacher.models.pyramid import STRIDES
from dreamteacher.runtime import checkpoint, tensor_file
from dreamteacher.runtime.errors import UserError, did_you_mean, first_line, shorten
from dreamteacher.spec import FeatureSpec

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
WORKING_FAMILIES = "resnet*, resnext*, regnet*, convnext*, efficientnet*, mobilenetv3*, swin*, vit_*"

_PROBE_SIZE = (64, 128)
# timm modules all of whose models are students at any image size.
_FAMILY_MODULES = (
    "convnext",
    "densenet",
    "dla",
    "dpn",
    "efficientnet",
    "fastvit",
    "ghostnet",
    "hgnet",
    "hrnet",
    "mambaout",
    "mobilenetv3",
    "nfnet",
    "regnet",
    "repvit",
    "res2net",
    "resnest",
    "resnet",
    "resnetv2",
    "rexnet",
    "sknet",
    *PLAIN_MODULES,
    *SWIN_MODULES,
)


class Weights(NamedTuple):
    """A weight file: its tensors by name, and the string metadata of a safetensors file (else empty)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Student(nn.Module):
    """A timm model without its classifier, read level by level.

    A plain ViT has one level: the last block's tokens behind the final norm, without class and register tokens,
    as a map. Necks make four of it (`pyramid.SimplePyramid`).

    The full model is kept (and exported), because timm's `features_only` wrapper renames parameters. Layers
    that come after the last map (a final norm, EfficientNet's `conv_head`) are part of it and stay untrained.
    Dropout and stochastic depth, which a few timm models have by default, are switched off: they would draw
    from the global random state, and the method has none.

    Args:
        name: timm's name of the architecture.
        model: the timm model, made with `num_classes=0`.

    Raises:
        UserError: when the model gives no maps at strides 8, 16 and 32, and is no plain ViT.

    Example:
        >>> student = create_student("resnet18")
        >>> [(s.name, s.channels) for s in student.specs]
        [('s4', 64), ('s8', 128), ('s16', 256), ('s32', 512)]
        >>> tuple(student.pooled(torch.rand(2, 3, 64, 64)).shape)
        (2, 512)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, model: nn.Module) -> None:
        from timm.layers import DropPath

        super().__init__()
        self.name = name
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = normalisation(model)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
                module.p = 0.0
            elif isinstance(module, DropPath):
                module.drop_prob = 0.0
        self.grid = grid_of(model)
        self.indices = level_indices(name, model)
        self.specs = self._measured_specs()

    @property
    def features_channels(self) -> int:
        """Channels of the last map, and of `pooled`."""
        return self.specs[-1].channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images N x 3 x H x W in [0, 1] -> one map per spec, fine to coarse."""
        model: Any = self.model
        settings: dict[str, Any] = {"indices": list(self.indices.values()), "intermediates_only": True}
        if self.grid is not None:
            settings["norm"] = True  # what timm calls the features of a ViT
        return model.forward_intermediates(self._normalised(images), **settings)

    def pooled(self, images: Tensor) -> Tensor:
        """Images N x 3 x H x W in [0, 1] -> the last map averaged over positions, N x C.

        A plain ViT's is pooled as timm does it for this network: its class token, or the mean of the patches.
        """
        if self.grid is not None:
            return pooled_tokens(self.model, self._normalised(images))
        return self.forward(images)[-1].mean(dim=(2, 3))

    def _normalised(self, images: Tensor) -> Tensor:
        x = fit((images - self.mean) / self.std, self.grid)
        return x.contiguous(memory_format=torch.channels_last)

    def _measured_specs(self) -> tuple[FeatureSpec, ...]:
        """The levels as one small image shows them: what a model says of itself is not always so."""
        height, width = _PROBE_SIZE
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, 3, height, width, device=self.mean.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise _no_pyramid(
                self.name, f"it takes no {height}x{width} image, {first_line(error)}"
            ) from error
        finally:
            self.model.train(was_training)
        for stride, m in zip(self.indices, maps, strict=True):
            if m.ndim != 4 or m.shape[-2:] != (height // stride, width // stride):
                raise _no_pyramid(self.name, f"its map for stride {stride} has shape {tuple(m.shape)}")
        measured = zip(self.indices, maps, strict=True)
        return tuple(FeatureSpec(f"s{stride}", m.shape[1], stride) for stride, m in measured)


def student_names() -> list[str]:
    """timm names of the families known to work as students, sorted (others with a pyramid work too)."""
    import timm

    names = {name for module in _FAMILY_MODULES for name in timm.list_models(module=module)}
    return sorted(name for name in names if not name.startswith("test_"))


def create_student(name: str, *, init: str = "random", seed: int = 0) -> Student:
    """A student by its timm name, in training mode, on the CPU.

    Args:
        name: timm name, "resnet50" or with a tag, "resnet50.a1_in1k".
        init: "random"; "imagenet" (timm's pretrained weights, downloaded or from the local cache); or the
            path of a .safetensors or .pth file, an export folder or a run folder. Files have timm's names
            (torchvision's ResNet files do); a classifier in them is left out, half precision becomes float32.
        seed: of the random weights; the global random state is left as it was.

    Raises:
        UserError: for an unknown name, a model without a pyramid, or weights that do not fit.
    """
    _check_name(name)
    weights = None if init in ("random", "imagenet") else read_weights(weight_file(init))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _imagenet_model(name) if init == "imagenet" else _timm_model(name, pretrained=False)
    if weights is not None:
        load_weights(model, weights, name=name, source=init)
    return Student(name, model)


def level_indices(name: str, model: nn.Module) -> dict[int, int]:
    """Stride -> index of timm's last feature of that stride, for strides 4 to 32, fine to coarse.

    A plain ViT has one of them, the last block.

    Raises:
        UserError: when there is none at stride 8, 16 or 32.
    """
    grid = grid_of(model)
    if grid is not None and grid.stride in STRIDES:
        return {grid.stride: len(model.blocks) - 1}  # type: ignore[arg-type]
    info: Iterable[Mapping[str, Any]] = getattr(model, "feature_info", None) or []
    last = {level["reduction"]: i for i, level in enumerate(info)}
    indices = {stride: last[stride] for stride in STRIDES if stride in last}
    if not callable(getattr(model, "forward_intermediates", None)):
        raise _no_pyramid(name, "timm gives no intermediate maps for it")
    if not {8, 16, 32} <= set(indices):
        raise _no_pyramid(name, f"its maps have strides {', '.join(map(str, sorted(last))) or 'unknown'}")
    return indices


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per colour that timm gives for a model (ImageNet's where it gives none)."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean") or IMAGENET_DEFAULT_MEAN, cfg.get("std") or IMAGENET_DEFAULT_STD
    return tuple(mean), tuple(std)


def weight_file(init: str) -> Path:
    """The weight file that a path means: itself, or the one in a run or export folder.

    Raises:
        UserError: when there is none; an unfinished run is told apart.
    """
    path = Path(init).expanduser()
    if path.is_dir():
        found = [path / n for n in ("backbone.safetensors", "model.safetensors") if (path / n).is_file()]
        if found:
            return found[0]
        if any(path.glob("checkpoint-*.safetensors")):
            problem = f"The run in '{path}' has no backbone.safetensors: it has not finished."
            raise UserError(problem, "Resume it with the command that started it, or give another folder.")
        raise UserError(
            f"'{path}' holds neither backbone.safetensors nor model.safetensors.",
            "Give a run folder, an export folder, or a weight file.",
        )
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        return path
    if path.is_file():
        raise UserError(f"'{path}' is no weight file.", f"Weight files end in {', '.join(WEIGHT_SUFFIXES)}.")
    hint = did_you_mean(init, ("random", "imagenet"))
    raise UserError(
        f"init '{init}' is neither 'random' nor 'imagenet', and there is no such file or folder.{hint}",
        "Give one of the two words, or the path of a weight file, a run folder or an export folder.",
    )


def recorded_student(init: str) -> str:
    """The timm name that a run or an export was made with, from its weights' metadata.

    Raises:
        UserError: when `init` records none (random, imagenet, or a file of another origin).
    """
    name = None
    if init not in ("random", "imagenet"):
        path = weight_file(init)
        name = _metadata(path).get("student")
    if name is None:
        raise UserError(f"init '{init}' does not say which network it is.", "Name it: --student resnet18.")
    return name


def is_ours(path: Path) -> bool:
    """Whether a weight file comes from a pretraining or an export of this package."""
    facts = _metadata(path)
    return facts.get("format") == "dreamteacher-backbone" or "dreamteacher" in facts.get("producer", "")


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    try:
        return tensor_file.read_metadata(path)
    except tensor_file.UNREADABLE:
        return {}  # `read_weights` says what is wrong with it


def read_weights(path: Path) -> Weights:
    """The state dict in a .safetensors file, or in a .pth file read without running any code in it.

    A state dict may lie under 'state_dict' or 'model'; a leading 'module.' of every name is removed.

    Raises:
        UserError: when the file is missing, damaged, or holds no state dict.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return _read_safetensors(path)
    tensors = checkpoint.read_state_dict(path)
    if all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return Weights(tensors, {})


def load_weights(model: nn.Module, weights: Weights, *, name: str, source: str) -> None:
    """Copies weights into a timm model; every tensor must be there with its shape.

    A classifier that the model does not have is left out, and BatchNorm's step counters may be missing.

    Args:
        model: a timm model; gets the values in its own precision.
        name: the student's name, for the message.
        source: where the weights came from, for the message.

    Raises:
        UserError: with counts and first names of what is missing, unexpected, or of another shape.
    """
    made_for = weights.metadata.get("student", name)
    if _architecture(made_for) != _architecture(name):
        raise UserError(f"'{source}' holds a {made_for}, not a {name}.", f"Set the student to '{made_for}'.")
    expected = model.state_dict()
    heads = _classifier_prefixes(model)
    tensors = {k: v for k, v in weights.tensors.items() if k in expected or not k.startswith(heads)}
    missing = [k for k in expected if k not in tensors and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in tensors if k not in expected]
    reshaped = [k for k in expected if k in tensors and tensors[k].shape != expected[k].shape]
    if missing or unexpected or reshaped:
        found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
        parts = [f"{len(keys)} {what} ({shorten(keys)})" for what, keys in found.items() if keys]
        raise UserError(
            f"'{source}' does not fit {name} ({len(expected)} tensors): {'; '.join(parts)}.",
            "Give weights with timm's names for this student (torchvision's ResNet names are the same).",
        )
    broken = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise UserError(
            f"'{source}' holds NaN or infinity in {len(broken)} tensors ({shorten(broken)}).",
            "Use another checkpoint: training from these weights cannot work.",
        )
    model.load_state_dict({**expected, **tensors})


def _read_safetensors(path: Path) -> Weights:
    try:
        return Weights(tensor_file.read(path), tensor_file.read_metadata(path))
    except tensor_file.UNREADABLE as error:
        raise UserError(
            f"'{path}' is not a readable safetensors file ({str(error)[:80]}).", "Copy or download it again."
        ) from error


def check_student(name: str, init: str = "random") -> None:
    """Raises UserError for a name that timm does not have, or an `init` that is no place of weights; reads none."""
    _check_name(name)
    if init not in ("random", "imagenet"):
        weight_file(init)


def _check_name(name: str) -> None:
    import timm

    if timm.is_model(name):
        return
    hint = did_you_mean(_architecture(name), timm.list_models())
    raise UserError(f"timm has no model '{name}'.{hint}", f"Families that work: {WORKING_FAMILIES}.")


def _timm_model(name: str, *, pretrained: bool) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **size_settings(name))
    except RuntimeError as error:
        if pretrained:
            raise
        problem = f"timm cannot make '{name}': {first_line(error)}."
        raise UserError(problem, "Leave out the tag after the dot.") from error


def _imagenet_model(name: str) -> nn.Module:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        problem = f"timm has no pretrained weights for '{name}'."
        raise UserError(problem, "Use init 'random', or a weight file.")
    try:
        return _timm_model(name, pretrained=True)
    except Exception as error:  # the download goes through several libraries, each with errors of its own
        hub = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors"
        address = hub if cfg.hf_hub_id else cfg.url
        raise UserError(
            f"The pretrained weights of '{name}' cannot be fetched: {first_line(error)}.",
            f"Without a network: get {address}\nelsewhere, and give its path as init.",
        ) from error


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{n}." for n in ([names] if isinstance(names, str) else names))


def _no_pyramid(name: str, reason: str) -> UserError:
    return UserError(
        f"'{name}' cannot be a student: {reason}. A student gives maps at strides 4, 8, 16, 32, or is a plain ViT.",
        f"Families that work: {WORKING_FAMILIES}.",
    )


def _architecture(name: str) -> str:
    return name.split(".", 1)[0]
