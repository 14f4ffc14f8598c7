"""A teacher that sees a batch in parts: the same random draws, the same maps up to the last bits, less memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dreamteacher.runtime.distributed.world import world_of
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.memory import ran_out, reason
from dreamteacher.teachers.base import Teacher

MOST_ON_GPU = 32  # images at once where no number is given; a choice, not measured
_DRAWS: tuple[Any, ...] = (torch.randn, torch.rand, torch.randint)


class RowsOfDraws(TorchFunctionMode):
    """Within: whoever draws `count` rows from `generator` gets rows `first` to `first + count` of a draw of `total`.

    So a part of a batch gets the random numbers that it has within the whole batch, if `generator` begins where it
    does for the whole one. Draws of several rows an image, one image's together, are divided likewise. Draws from other
    generators are left alone.

    Args:
        count, first, total: in images.

    Raises:
        UserError: for a draw that has no row for each image: torch.randn, rand and randint have.

    Example:
        >>> make = lambda: torch.Generator().manual_seed(0)
        >>> whole, generator = torch.randn(5, 2, generator=make()), make()
        >>> with RowsOfDraws(generator, 2, 3, 5):
        ...     part = torch.randn(2, 2, generator=generator)
        >>> torch.equal(part, whole[3:5])
        True
    """

    def __init__(self, generator: torch.Generator, count: int, first: int, total: int) -> None:
        super().__init__()
        self.generator, self.count, self.first, self.total = generator, count, first, total

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is None or kwargs["generator"] is not self.generator:
            return func(*args, **kwargs)
        if func not in _DRAWS:
            raise self._cannot(f"{getattr(func, '__name__', func)}")
        bounds, size = ((), args) if func is not torch.randint else (args[:-1], args[-1])
        if "size" in kwargs:
            bounds, size = args, kwargs.pop("size")
        elif len(size) == 1 and not isinstance(size[0], int):
            size = size[0]
        if not len(size) or not size[0] or size[0] % self.count:
            raise self._cannot(f"{func.__name__} of {tuple(size)}")
        each = size[0] // self.count
        whole = func(*bounds, (self.total * each, *size[1:]), **kwargs)
        return whole[self.first * each : (self.first + self.count) * each]

    def _cannot(self, draw: str) -> UserError:
        return UserError(
            f"The teacher draws by {draw}, which cannot be divided into parts of {self.count} images.",
            "Leave out --teacher-batch; or draw by randn, rand or randint, one row an image.",
        )


class InParts:
    """A teacher that is shown at most `most` images at a time; it encodes and samples as `Teacher` does.

    Parts are as equal as can be. When even such a part does not fit in memory, the batch is begun again in parts of
    half the size, which stays for the batches to come. A batch that fits is one call, bit for bit what the teacher
    alone gives.

    Args:
        most: images; 0: a whole batch, on a GPU MOST_ON_GPU.

    Raises:
        UserError: when one image does not fit.

    Test: rows and maps equal the whole batch's, for every family.
    """

    def __init__(self, teacher: Teacher, most: int = 0) -> None:
        self.teacher, self.most = teacher, most

    def encode(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        return self._run(
            len(images), generator, lambda at: self.teacher.encode(images[at], generator=generator)
        )

    def encode_latents(self, latents: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        return self._run(
            len(latents), generator, lambda at: self.teacher.encode_latents(latents[at], generator=generator)
        )

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        def part(at: slice) -> list[Tensor]:
            images, maps = self.teacher.sample(at.stop - at.start, generator=generator)
            return [images, *maps]

        images, *maps = self._run(n, generator, part)
        return images, maps

    def _run(self, n: int, generator: torch.Generator, act: Callable[[slice], list[Tensor]]) -> list[Tensor]:
        begin = generator.get_state()
        while True:
            most = self.most or (MOST_ON_GPU if generator.device.type == "cuda" else n)
            size = math.ceil(n / math.ceil(n / most))
            try:
                if size == n:
                    return act(slice(0, n))
                return self._joined(n, size, generator, begin, act)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                if size == 1:
                    raise UserError(
                        f"The teacher '{self.teacher.name}' runs out of memory on one image: {reason(error)}.",
                        "Use a smaller --size, --precision bfloat16, or a smaller teacher.",
                    ) from None
            # Only here, where the exception no longer holds the memory of what failed.
            self.most = (size + 1) // 2
            generator.set_state(begin)
            print(
                f"The teacher ran out of memory on {size} images: from now on it sees {self.most} at a time "
                f"(--teacher-batch {self.most}); its maps stay the same.",
                flush=True,
            )

    def _joined(
        self, n: int, size: int, generator: torch.Generator, begin: Tensor, act: Callable[[slice], list[Tensor]]
    ) -> list[Tensor]:  # fmt: skip
        found = []
        for first in range(0, n, size):
            at = slice(first, min(first + size, n))
            generator.set_state(begin)
            ranks = world_of(generator).ranks  # with several processes a draw is for the images of all
            with RowsOfDraws(generator, (at.stop - at.start) * ranks, first * ranks, n * ranks):
                found.append(act(at))
        return [torch.cat(level) for level in zip(*found, strict=True)]
