"""A module of one's own as the teacher: any `nn.Module`, and a way to name its maps."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from dreamteacher.runtime.distributed.world import world_of
from dreamteacher.runtime.errors import UserError, did_you_mean, first_line, shorten
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import STRIDES, Teacher

Reader = Callable[[nn.Module, Tensor], tuple[Any, Mapping[int, Tensor]]]
_OUTPUT = "output"
_AS_FUNCTION = "Give `levels` as a function (module, input) -> (output, {stride: map})."


class ModuleTeacher(Teacher):
    """Any network whose maps lie at some of the strides 4, 8, 16 and 32.

    Args:
        module: the network; it is taken over (frozen, in evaluation mode), its memory layout left as it is.
        name: what it is called in run folders and model cards.
        size: (height, width) in pixels of its images.
        levels: stride -> the submodule whose result is that level's map ("block3", "decoder.up.1"; within
            a forward function also an operation, named as `torchvision.models.feature_extraction` does). The
            module is then traced by torch.fx, and in `encode` nothing runs that no level needs. Or, for what
            cannot be traced, a function (module, network input) -> (its output, {stride: map}).
        licence: of the weights.
        sample: (n, generator) -> network input that makes n images; leave out where it cannot.
        to_images: the module's output -> float RGB in [0, 1], n x 3 x height x width; none: it is that already.
        encode: (images, generator) -> network input for real images (float RGB in [0, 1]); leave out where it
            cannot. `sample` and `encode` draw only from their generator, which is on the module's device.

    Channels are found, and strides verified, in one small run of each mode here.

    Raises:
        UserError: for unknown places, maps of another stride than stated, images of another shape or range, a
            module that cannot be traced or draws random numbers of its own, or when it can do nothing.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> teacher = ModuleTeacher(
        ...     net, name="mine", size=(32, 32), levels={8: "1"}, encode=lambda images, generator: images * 2 - 1
        ... )
        >>> teacher.specs
        (FeatureSpec(name='s8', channels=8, stride=8),)
    """

    family = "module"

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        size: tuple[int, int],
        levels: Mapping[int, str] | Reader,
        licence: str = "not recorded",
        sample: Callable[[int, torch.Generator], Tensor] | None = None,
        to_images: Callable[[Any], Tensor] | None = None,
        encode: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.licence, self.size = name, licence, size
        self._sample, self._encode, self._to_images = sample, encode, to_images
        self.modes = frozenset(m for m, f in (("encode", encode), ("sample", sample)) if f is not None)
        if not self.modes:
            raise UserError(
                f"The teacher '{name}' can do nothing: it has neither `sample` nor `encode`.",
                "Give the function that makes the network's input from noise, or from images.",
            )
        module.requires_grad_(False).train(False)
        self._reader: Reader | None = None
        self._places: dict[int, str] = {}
        with torch.random.fork_rng(devices=[]):
            if isinstance(levels, Mapping):
                self._places = dict(levels)
                self._check_strides(self._places)
                self.whole: nn.Module = _traced(module, self._places, name, whole=True)
                self.pruned: nn.Module = _traced(module, self._places, name, whole=False)
            else:
                self._reader, self.whole, self.pruned = levels, module, module
            self.freeze()
            self.specs = self._dry_run(module)
        self.multiple = self.specs[-1].stride
        if len(self.modes) == 1:
            self.keep_only(next(iter(self.modes)))

    def freeze(self) -> None:
        """As of any teacher, but the memory layout stays the user's: not every module bears channels_last."""
        self.requires_grad_(False)
        self.train(False)

    @torch.no_grad()
    def encode(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        if "encode" not in self.modes or self._encode is None:
            raise self._cannot("encode")
        self.check_size(*images.shape[-2:])
        _, maps = self._read(self.pruned, _input(self._encode, images, generator))
        return self._checked(maps, len(images), (images.shape[-2], images.shape[-1]))

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        if "sample" not in self.modes or self._sample is None:
            raise self._cannot("sample")
        output, maps = self._read(self.whole, _input(self._sample, n, generator))
        images = output if self._to_images is None else self._to_images(output)
        return images, self._checked(maps, n, self.size)

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Does nothing: a module of one's own may use its weights outside of autocast."""

    def keep_only(self, mode: str) -> None:
        super().keep_only(mode)
        if mode == "encode":
            self.whole = self.pruned
        else:
            self.pruned = self.whole

    def _read(self, network: nn.Module, x: Tensor) -> tuple[Any, Mapping[int, Tensor]]:
        """The network's output (where it is computed) and its maps by stride."""
        if self._reader is not None:
            return self._reader(network, x)
        found = network(x)
        return found.get(_OUTPUT), {s: found[str(s)] for s in self._places}

    def _checked(self, maps: Mapping[int, Tensor], n: int, size: tuple[int, int]) -> list[Tensor]:
        """The maps, fine to coarse, once each is n x C x height/stride x width/stride."""
        for stride, m in maps.items():
            which = f"'{self._places[stride]}'" if stride in self._places else f"The map of stride {stride}"
            if not isinstance(m, Tensor) or m.dim() != 4 or len(m) != n:
                came = str(tuple(m.shape)) if isinstance(m, Tensor) else type(m).__name__
                raise UserError(
                    f"{which} of '{self.name}' must be a map of {n} x C x H x W, not {came}.",
                    "Name a place that gives one tensor of four axes.",
                )
            if m.shape[2] * stride != size[0] or m.shape[3] * stride != size[1]:
                came = f"{size[0] / m.shape[2]:g}"
                came += "" if size[0] * m.shape[3] == size[1] * m.shape[2] else f" x {size[1] / m.shape[3]:g}"
                raise UserError(
                    f"{which} of '{self.name}' has stride {came}, not {stride}: it is {m.shape[2]} x "
                    f"{m.shape[3]} for images of {size[0]} x {size[1]}.",
                    f"Name another place for stride {stride}, or leave the level out.",
                )
        return [maps[stride] for stride in sorted(maps)]

    def _check_strides(self, strides: Mapping[int, Any]) -> None:
        wrong = [s for s in strides if s not in STRIDES]
        if wrong or not strides:
            raise UserError(
                f"'{self.name}' needs levels at some of the strides {', '.join(map(str, STRIDES))}, "
                + (f"not {', '.join(map(str, wrong))}." if wrong else "and has none."),
                "Stride is image pixels per pixel of the map.",
            )

    @torch.no_grad()
    def _dry_run(self, module: nn.Module) -> tuple[FeatureSpec, ...]:
        """Runs each mode on one image; the levels as they came."""
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        found: dict[str, tuple[FeatureSpec, ...]] = {}
        for mode, make in (("encode", self._encode), ("sample", self._sample)):
            if make is None:
                continue
            generator, state = torch.Generator(device).manual_seed(0), torch.get_rng_state()
            first: Any = torch.full((1, 3, *self.size), 0.5, device=device) if mode == "encode" else 1
            x = make(first, generator)
            output, maps = self._read(self.whole, x)
            plain = module(x) if self._reader is None else None
            if not torch.equal(state, torch.get_rng_state()):
                raise UserError(
                    f"'{self.name}' draws from the global random generator, so its maps could not be repeated.",
                    "Draw in `sample` and `encode`, from the generator they get, and hand it in with the input.",
                )
            self._check_strides(maps)
            ordered = self._checked(maps, 1, self.size)
            if self._reader is None:
                self._check_trace(plain, output, maps, self._read(self.pruned, x)[1])
            if mode == "sample":
                self._check_images(output if self._to_images is None else self._to_images(output))
            strides = sorted(maps)
            found[mode] = tuple(
                FeatureSpec(f"s{s}", m.shape[1], s) for s, m in zip(strides, ordered, strict=True)
            )
        if len(set(found.values())) > 1:
            each = [f"{', '.join(f'{s.stride}: {s.channels}' for s in f)} to {m}" for m, f in found.items()]
            raise UserError(
                f"'{self.name}' gives levels (stride: channels) {', but '.join(each)}.",
                "Both modes must give the same levels.",
            )
        return next(iter(found.values()))

    def _check_trace(
        self, plain: Any, output: Any, maps: Mapping[int, Tensor], cut: Mapping[int, Tensor]
    ) -> None:
        """What torch.fx recorded must compute what the module does, whole and cut."""
        same = not isinstance(plain, Tensor) or torch.equal(plain, output)
        if not same or not all(torch.equal(cut[s], maps[s]) for s in maps):
            raise UserError(
                f"'{self.name}' computes something else once it is traced by torch.fx.", _AS_FUNCTION
            )

    def _check_images(self, images: Any) -> None:
        expected = (1, 3, *self.size)
        if not isinstance(images, Tensor) or tuple(images.shape) != expected:
            came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UserError(
                f"Samples of '{self.name}' must be {expected}, not {came}.",
                "Give `to_images`: the module's output -> RGB images; and its `size` in pixels.",
            )
        low, high = float(images.min()), float(images.max())
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"Samples of '{self.name}' must lie in [0, 1]; they go from {low:.3g} to {high:.3g}.",
                "Give `to_images`, e.g. lambda x: (x.clamp(-1, 1) + 1) / 2.",
            )


class _Named(nn.Module):
    """Gives a module's result a name of its own, so that it can be asked for as any place in it can."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.output = module, nn.Identity()
        self.train(False)

    def forward(self, x: Any) -> Any:
        return self.output(self.module(x))


def _input(make: Callable[[Any, torch.Generator], Tensor], first: Any, generator: torch.Generator) -> Tensor:
    """What `sample` or `encode` of the user makes of n or of images; of `Draws`: of the whole batch, and its rows.

    The user's functions draw with torch's own functions, which know nothing of rows.
    """
    world = world_of(generator)
    if world.ranks == 1:
        return make(first, generator)
    whole = first * world.ranks if isinstance(first, int) else first.repeat_interleave(world.ranks, 0)
    return make(whole, generator)[world.rows]


def _traced(module: nn.Module, places: Mapping[int, str], name: str, *, whole: bool) -> fx.GraphModule:
    """A network that gives {str(stride): map}, and with `whole` also the module's output."""
    named = _Named(module)
    try:
        _, nodes = get_graph_node_names(named, suppress_diff_warning=True)
    except Exception as error:  # torch.fx runs the module's own code, which may raise anything
        raise UserError(
            f"'{name}' cannot be traced by torch.fx: {first_line(error)}", _AS_FUNCTION
        ) from error
    parts = [n.split(".")[1:] for n in nodes if n.startswith("module.")]
    known = dict.fromkeys(".".join(p[:i]) for p in parts for i in range(1, len(p) + 1))
    for place in places.values():
        if place not in known:
            raise UserError(
                f"Nothing called '{place}' runs in the forward pass of '{name}'.{did_you_mean(place, known)}",
                f"Its places: {shorten(dict.fromkeys(p[0] for p in parts if p), 8)}; or one inside of them.",
            )
    wanted = {f"module.{place}": str(stride) for stride, place in places.items()}
    network = create_feature_extractor(
        named, wanted | ({_OUTPUT: _OUTPUT} if whole else {}), suppress_diff_warning=True
    )
    end = next(node for node in network.graph.nodes if node.op == "output")
    results = dict(end.args[0])
    for key, node in results.items():
        if key != _OUTPUT:  # a layer that works in place may follow and would change what was read
            with network.graph.inserting_after(node):
                results[key] = network.graph.call_function(_copy, (node,))
    end.args = (results,)
    network.recompile()
    return network


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def own_file(name: str) -> Path:
    """The Python file of a teacher's name FILE.py:FUNCTION.

    Raises:
        UserError: when there is no such file.
    """
    file = name.rpartition(":")[0]
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f"There is no file '{file}'.", "A teacher of your own is named FILE.py:FUNCTION.")
    return path


def teacher_from_file(name: str) -> Teacher:
    """The teacher that a function of a Python file returns.

    The file is the user's own code: it is run, with everything it does, because the user named it. Modules
    beside it can be imported. Nothing else in this package runs code that it reads.

    Args:
        name: FILE.py:FUNCTION; the function takes no arguments.

    Raises:
        UserError: when there is no such file or function, it raises (type, line and first words are named), or
            what it returns is no `Teacher`.
    """
    file, _, function = name.rpartition(":")
    path = own_file(name)
    sys.path.append(str(path.parent))  # after whatever is installed
    try:
        with torch.random.fork_rng(devices=[]):
            found = vars(_run_file(path))
            if not callable(found.get(function)):
                own = [k for k, v in found.items() if isinstance(v, FunctionType) and not k.startswith("_")]
                functions = [k for k in own if found[k].__module__ == found["__name__"]]
                raise UserError(
                    f"'{file}' has no function '{function}'.{did_you_mean(function, functions)}",
                    f"It has: {shorten(functions, 5)}."
                    if functions
                    else "Define one that returns a Teacher.",
                )
            teacher = found[function]()
    except UserError:
        raise
    except Exception as error:
        raise _failed(file, path, error) from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(teacher, Teacher):
        raise UserError(
            f"'{name}' must return a Teacher, not {type(teacher).__name__}.",
            "Return a ModuleTeacher(...), or an object of a subclass of dreamteacher.teachers.base.Teacher.",
        )
    return teacher


def _run_file(path: Path) -> ModuleType:
    # Registered under a name of its own, as dataclasses and torch.fx look modules up by name.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # .py has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failed(file: str, path: Path, error: Exception) -> UserError:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    place = f" in line {lines[-1]}" if lines else ""
    words = first_line(error) if str(error) else ""
    return UserError(
        f"'{file}' stopped{place} with {type(error).__name__}{f': {words}' if words else ''}.",
        "Mend the file; with DREAMTEACHER_TRACEBACK=1 the whole trace is shown.",
    )
