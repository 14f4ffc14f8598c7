"""What a family of teachers is: one object at the end of its module, found by one line of `registry.FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from dreamteacher.teachers.base import Teacher

    Made: TypeAlias = tuple[dict[str, Tensor], Any]


class Cost(NamedTuple):
    """What one image costs at the teacher's own size.

    Args:
        levels: stride -> channels of the maps, fine to coarse.
        modes: of "encode" and "sample".
        full: GMACs (10^9 multiply-accumulates) of a whole pass: a denoising step, an autoencoder's encoding and
            decoding, a GAN's image.
        needed: GMACs up to the last level that is taken; what a teacher computes.
    """

    levels: dict[int, int]
    modes: tuple[str, ...]
    full: float
    needed: float


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of teachers.

    Args:
        name: as in teacher.json, in the table, in `spec.family`, and as the teachers' own `family`.
        spec: the dataclass of all that rebuilds a network and is not in its weights; plain JSON values
            (teacher.json, "network"). Its class attribute `family` is `name`.
        load: (weights, spec, where, *, name, licence, and the `settings`) -> the teacher, strictly: `where` is
            named when the weights do not fit. They become the network's own, in float32; where they are that,
            without a copy. UserError for them, for a spec that makes no network, for settings out of range.
        settings: of those of `registry.load_teacher` (timesteps, noise, blocks, psi), the ones that `load` takes.
        convert: kind of published checkpoint -> its conversion, (file or folder, published flags) -> weights and
            spec, in the precision of the file. It runs no code of others. The same kinds stand in the table.
            UserError for unknown flags, for missing, damaged or foreign files, and for what `load` would refuse.
        tiny: weights and spec of a small network with seeded random values, for tests.
        cost: what a teacher of a spec has and what an image costs; it allocates no weight.
        instances: (width of the instance features, classes told beside them) of a spec, 0 where there are none;
            None for a family whose networks are never told of instances.
    """

    name: str
    spec: type
    load: Callable[..., Teacher]
    tiny: Callable[[], Made]
    cost: Callable[[Any], Cost]
    settings: frozenset[str] = frozenset()
    convert: Mapping[str, Callable[[Path, Mapping[str, Any]], Made]] = field(default_factory=dict)
    instances: Callable[[Any], tuple[int, int]] | None = None
