"""The contract that every generative teacher keeps."""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dreamteacher.data.pictures import Pictures, to_batch
from dreamteacher.runtime.errors import UserError, first_line
from dreamteacher.spec import FeatureSpec

STRIDES = (4, 8, 16, 32)


class Teacher(nn.Module, ABC):
    """A frozen generative model that gives feature maps of images. Never a submodule of what is trained.

    Attributes:
        name: what the user calls it; family: the kind of model ("diffusion", "stylegan2" ...).
        licence: of its weights, shown at run start and in model cards.
        specs: levels, fine to coarse; a level that the model lacks is absent.
        modes: what it can do, of "encode" and "sample".
        size: (height, width) that it was trained at.
        multiple: heights and widths must be multiples of this.
        timesteps: t of a diffusion model's maps; empty for others.
        compile_targets: methods ("walk", "network.forward") that take tensors, draw nothing, and are nearly all of a pass: what is
            worth compiling.
    """

    name: str
    family: str
    licence: str
    specs: tuple[FeatureSpec, ...]
    modes: frozenset[str]
    size: tuple[int, int]
    multiple: int
    timesteps: tuple[int, ...] = ()
    compile_targets: tuple[str, ...] = ()

    def freeze(self) -> None:
        """Call at the end of a constructor: no gradients, evaluation mode for good, channels_last."""
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    def take_levels(self, levels: Sequence[tuple[int, int]]) -> list[int]:
        """Sets `specs`; the places of the levels at strides 4 to 32, fine to coarse.

        Args:
            levels: (stride, channels) of all that the network has.
        """
        taken = sorted((i for i, level in enumerate(levels) if level[0] in STRIDES), key=lambda i: levels[i])
        if not taken:
            raise UserError(
                f"'{self.name}' has no level at stride 4, 8, 16 or 32: "
                f"{', '.join(str(stride) for stride, _ in levels)}.",
                "Use a deeper network.",
            )
        self.specs = tuple(FeatureSpec(f"s{levels[i][0]}", levels[i][1], levels[i][0]) for i in taken)
        return taken

    def encode(self, images: torch.Tensor, *, generator: torch.Generator) -> list[torch.Tensor]:
        """Feature maps of real images.

        Args:
            images: float RGB in [0, 1], N x 3 x H x W, H and W multiples of `multiple`.
            generator: source of every random number, on the images' device.

        Returns: one map per spec, N x C x H/stride x W/stride.
        """
        raise self._cannot("encode")

    @torch.no_grad()
    def features(
        self,
        pictures: Pictures,
        *,
        size: int | tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[torch.Tensor]:
        """Feature maps of whatever pictures are at hand: `encode` for a notebook.

        Args:
            pictures: one or several paths, PIL pictures or tensors (see `data.pictures.to_batch`).
            size: height and width that they are brought to, or one number for both; None: the teacher's own.
            generator: source of the noise; None: a new one with seed 0, so that the same pictures give the same maps.

        Returns: one map per spec, N x C x H/stride x W/stride.

        Raises:
            UserError: for what is no picture, a size that does not divide, a teacher that cannot encode.
        """
        height, width = (size, size) if isinstance(size, int) else size or self.size
        try:
            self.check_size(height, width)
        except UserError as error:  # its way out is a flag
            way = f"Give a size of multiples of {self.multiple}, or none for {self.size[0]} x {self.size[1]}."
            raise UserError(f"{first_line(error, 200)}.", way) from None
        device = next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device
        if generator is None:
            generator = torch.Generator(device).manual_seed(0)
        return self.encode(to_batch(pictures, (height, width)).to(device), generator=generator)

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """n new images (float RGB in [0, 1]) and their feature maps."""
        raise self._cannot("sample")

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """What `encode` makes of images before it draws any random number, float32: worth keeping where it is costly.

        Raises:
            UserError: for a teacher that works on the pixels.
        """
        raise self._no_latents()

    def encode_latents(self, latents: torch.Tensor, *, generator: torch.Generator) -> list[torch.Tensor]:
        """`encode` of images by what `latents` gave."""
        raise self._no_latents()

    def _no_latents(self) -> UserError:
        return UserError(
            f"The teacher '{self.name}' ({self.family}) has no latents that could be kept.",
            "Use --what maps; Stable Diffusion has latents.",
        )

    def keep_only(self, mode: str) -> None:
        """Frees the weights that `mode` ("encode" or "sample") never runs; nothing else is possible then."""
        self.modes = frozenset({mode})

    def wrap_compile_targets(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts what `wrap` makes of each `compile_targets` method in its place (see `compiled.compiled`)."""
        for place in self.compile_targets:
            owner, _, name = place.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, name, wrap(getattr(module, name)))

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Keeps kernels and matrices in the dtype that autocast gives them at every pass: the same maps, half the memory.

        From then on it runs within that autocast alone. Test: maps equal (0.0) for every family.
        """
        for module in self.modules():
            if type(module) in (nn.Conv2d, nn.Linear):
                module.to(dtype)

    def _cannot(self, mode: str) -> UserError:
        able = " and ".join(sorted(self.modes))
        return UserError(
            f"The teacher '{self.name}' ({self.family}) cannot {mode} images; it can {able}.",
            "Use the dataset kind that it serves: encoded (encode) or synthesized (sample).",
        )

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError when images of this size do not divide down to the coarsest level."""
        m = self.multiple
        if height % m or width % m:
            near = f"{max(m, round(height / m) * m)} {max(m, round(width / m) * m)}"
            raise UserError(
                f"The teacher '{self.name}' takes heights and widths that are multiples of {m}, "
                f"not {height} x {width}.",
                f"Use --size {near}.",
            )
