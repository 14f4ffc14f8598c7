"""The interpreter: a small head that reads labels off the maps of a frozen generative teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamteacher.models.regressor import resize
from dreamteacher.runtime import checkpoint, tensor_file
from dreamteacher.runtime.config import from_json, parse_json, to_json
from dreamteacher.runtime.errors import UserError, first_line, shorten
from dreamteacher.spec import FeatureSpec

WEIGHTS, SPEC = "interpreter.safetensors", "interpreter.json"


def _normed(*layers: nn.Module, channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.GroupNorm(groups, channels), nn.SiLU())


class Interpreter(nn.Module):
    """Teacher maps, fine to coarse -> logits at the finest map's size.

    From the coarsest level up: a 1x1 convolution per level, bilinear enlargement, concatenation with the next level,
    a depth-wise separable convolution; GroupNorm and Swish after each; dropout, then a 1x1 convolution to classes.
    With `pooled` the finest map is averaged before that: one row of logits an image, for image-level labels.

    Args:
        specs: the teacher's levels, fine to coarse (of all timesteps that it reads).
        classes: number of classes.
        width: channels of every inner map, a multiple of 32 or of `groups`.
        dropout: probability of dropping a channel before the last layer.
        groups: of GroupNorm.
        pooled: image-level labels.
        seed: of the initial weights; the global random state is left as it was.

    Source: the paper, section 7 of its appendix (after BigDatasetGAN): width 256, GroupNorm(32), dropout 0.1.

    Example:
        >>> specs = [FeatureSpec("s4", 12, 4), FeatureSpec("s8", 20, 8)]
        >>> interpreter = Interpreter(specs, classes=3, width=32)
        >>> interpreter([torch.zeros(2, 12, 16, 24), torch.zeros(2, 20, 8, 12)]).shape
        torch.Size([2, 3, 16, 24])
    """

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        classes: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
        groups: int = 32,
        pooled: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.specs, self.classes, self.pooled = tuple(specs), classes, pooled
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.enter = nn.ModuleList(
                _normed(nn.Conv2d(s.channels, width, 1, bias=False), channels=width, groups=groups)
                for s in specs
            )
            self.merge = nn.ModuleList(
                _normed(
                    nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False),
                    nn.Conv2d(2 * width, width, 1, bias=False),
                    channels=width, groups=groups,
                )
                for _ in specs[1:]
            )  # fmt: skip
            self.dropout = nn.Dropout2d(dropout)
            self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits N x classes x H x W of the finest map's size, or N x classes with `pooled`.

        Raises:
            ValueError: when there are not as many maps as levels.
        """
        if len(maps) != len(self.specs):
            raise ValueError(f"the interpreter reads {len(self.specs)} levels, got {len(maps)} maps")
        x = self.enter[-1](maps[-1])
        for i in range(len(maps) - 2, -1, -1):
            finer = self.enter[i](maps[i])
            x = self.merge[i](torch.cat([resize(x, (finer.shape[-2], finer.shape[-1])), finer], dim=1))
        if self.pooled:
            x = x.mean((2, 3), keepdim=True)
            return self.classify(self.dropout(x)).flatten(1)
        return self.classify(self.dropout(x))


@dataclass(frozen=True, kw_only=True)
class InterpreterSpec:
    """Everything that rebuilds an interpreter and says whose maps it reads (interpreter.json).

    Args:
        teacher: as it was named; sha256: of its weights, so that no other teacher's maps are read by mistake.
        t, blocks, noise, psi: what its maps were made with.
        levels: channels of each level by its name, fine to coarse; strides: input pixels per position of each.
        classes: their names in id order.
        pooled: image-level labels instead of masks.
        width: channels inside; dropout: before the last layer.
        size: (height, width) of the labelled images as they were shown; ignore_index: id that was not learned.
        labelled: how many labelled images it learned from.
    """

    teacher: str
    sha256: str
    t: tuple[int, ...]
    blocks: tuple[int, ...]
    noise: str
    psi: float
    levels: tuple[int, ...]
    strides: tuple[int, ...]
    classes: tuple[str, ...]
    pooled: bool
    width: int
    dropout: float
    size: tuple[int, int]
    ignore_index: int
    labelled: int

    def specs(self) -> tuple[FeatureSpec, ...]:
        """The levels that it reads."""
        pairs = zip(self.levels, self.strides, strict=True)
        return tuple(FeatureSpec(f"s{stride}", channels, stride) for channels, stride in pairs)

    def build(self, seed: int = 0) -> Interpreter:
        """The network with fresh weights: groups of 8 channels, as the paper's 32 of 256."""
        return Interpreter(
            self.specs(), len(self.classes), width=self.width, dropout=self.dropout,
            groups=max(1, self.width // 8), pooled=self.pooled, seed=seed,
        )  # fmt: skip

    def check_reads(self, specs: Sequence[FeatureSpec], sha256: str) -> None:
        """Raises UserError unless these are the levels, of the teacher, that it was trained on."""
        if sha256 != self.sha256:
            raise UserError(
                f"The interpreter was trained on maps of another teacher ('{self.teacher}'): the sha256 differs.",
                f"Use --teacher {self.teacher}, or train an interpreter on this one.",
            )
        if [(s.channels, s.stride) for s in specs] != list(zip(self.levels, self.strides, strict=True)):
            steps = " ".join(map(str, self.t)) or "none"
            raise UserError(
                f"The interpreter reads {self._words(self.specs())}; the teacher gives {self._words(specs)}.",
                f"Use the timesteps and blocks that it was trained with: --t {steps}"
                + (f" --blocks {' '.join(map(str, self.blocks))}." if self.blocks else "."),
            )

    @staticmethod
    def _words(specs: Sequence[FeatureSpec]) -> str:
        return shorten((f"{s.channels} channels at stride {s.stride}" for s in specs), 4)


def save_interpreter(folder: Path, spec: InterpreterSpec, weights: Mapping[str, Tensor]) -> None:
    """Writes interpreter.safetensors and, last, interpreter.json: a folder that has both is whole."""
    kept = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    checkpoint.atomic_write(folder / WEIGHTS, lambda path: save_file(kept, path))
    checkpoint.write_text(folder / SPEC, json.dumps(to_json(spec), indent=2) + "\n")


def read_interpreter_spec(folder: Path) -> InterpreterSpec:
    """What `save_interpreter` wrote beside the weights.

    Raises:
        UserError: when the folder holds no finished interpreter, or its file is damaged.
    """
    if not ((folder / SPEC).is_file() and (folder / WEIGHTS).is_file()):
        raise UserError(
            f"'{folder}' holds no finished interpreter ({SPEC} and {WEIGHTS} are not both there).",
            "Give the --out folder of `dreamteacher train-interpreter`; the same command resumes it.",
        )
    try:
        values = parse_json((folder / SPEC).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder / SPEC}' cannot be read: {error}.", "Train it again.") from None
    spec = from_json(InterpreterSpec, values)
    if not spec.levels or len(spec.levels) != len(spec.strides) or len(spec.classes) < 2 or spec.width % 8:
        raise UserError(f"'{folder / SPEC}' describes no interpreter.", "Restore it, or train it again.")
    return spec


def load_interpreter(folder: Path) -> tuple[Interpreter, InterpreterSpec]:
    """A trained interpreter, frozen and in evaluation mode, and its spec.

    Raises:
        UserError: as `read_interpreter_spec`, or when weights and spec do not fit.
    """
    spec = read_interpreter_spec(folder)
    try:
        with torch.device("meta"):  # what does not fit takes no memory
            shapes = spec.build()
        weights = tensor_file.read(folder / WEIGHTS)
    except (*tensor_file.UNREADABLE, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"The interpreter in '{folder}' cannot be read: {first_line(error, 200)}.",
            "Copy the whole folder again.",
        ) from None
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in shapes.state_dict().items()}:
        checkpoint.load_exactly(shapes, weights, folder / WEIGHTS)  # raises, and says what does not fit
    interpreter = spec.build()
    checkpoint.load_exactly(interpreter, weights, folder / WEIGHTS)
    return interpreter.requires_grad_(False).eval(), spec
