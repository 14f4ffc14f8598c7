"""Published StyleGAN2 files: the official pickles by a restricted reader that runs nothing, and plain state dicts.

An official pickle is a dict of training_set_kwargs, G, D, G_ema and augment_pipe. Each network in it is the text of
a Python module, the name of a class in it, and the attributes of the object. The official loader executes that text;
here it is text, and the weights are gathered from the attributes.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from dreamteacher.runtime.config import from_json
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.teachers.stylegan2.inert_pickle import (
    DISTRUST,
    Inert,
    NumpyDType,
    flat_storage,
    numpy_scalar,
    parameter,
    read_inert,
    tensor,
)
from dreamteacher.teachers.stylegan2.teacher import StyleGan2Spec, spec_of

NETWORKS = ("G", "D", "G_ema", "augment_pipe")
SUFFIXES = (".pkl", ".safetensors", ".pt", ".pth")
LONGEST = 200  # letters of a part's name with those of the parts that it is in


@dataclass(frozen=True, kw_only=True)
class StyleGan2Settings:
    """What a published file cannot tell, or what to take of it.

    Args:
        conv_clamp: `synthesis_kwargs.conv_clamp` for a plain state dict; None: no clamp. A pickle tells it itself
            and this must agree if given.
        network: "G_ema" (the moving average, which the paper uses) or "G".
        sha256: of the whole file, hex; None: not checked. A pickle has no checksum of its own, so this alone
            finds a changed weight.

    Raises:
        UserError: for values out of range.
    """

    conv_clamp: float | None = None
    network: str = "G_ema"
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.network not in ("G_ema", "G"):
            raise UserError(f"There is no generator '{self.network}'.", "Use network G_ema or G.")
        if self.conv_clamp is not None and not self.conv_clamp > 0:
            raise UserError(
                f"A conv_clamp of {self.conv_clamp} is out of range.",
                "Use the published number (256), or leave it out for none.",
            )


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of an official pickle.

    Args:
        class_name: in the official code, "Generator" or the like.
        init_kwargs: what it was constructed with, plain data.
        state: its state dict under the official names: parameters and persistent buffers.
        conv_clamps: the different values of `conv_clamp` in its layers.
    """

    class_name: str
    init_kwargs: dict[str, Any]
    state: dict[str, Tensor]
    conv_clamps: frozenset[float | None]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An official pickle.

    Args:
        training_set_kwargs: the settings of its data set, plain data; None where the file has none.
        networks: those of G, D, G_ema and augment_pipe that it has.
    """

    training_set_kwargs: dict[str, Any] | None
    networks: dict[str, Network]


@dataclass(frozen=True, eq=False)
class _Module(Inert):
    """A network or a part of one as the pickle describes it: a class by name, and attributes."""

    class_name: str
    attributes: dict[str, Any]


def read_pickle(path: Path, *, sha256: str | None = None) -> Snapshot:
    """Reads an official StyleGAN2(-ADA) pickle; nothing that it names is called, its source text is not run.

    Args:
        sha256: of the whole file; compared before anything is read, if given.

    Raises:
        UserError: for a file that asks for a name or an operation outside the short list, a TensorFlow network, a
            damaged or foreign file, or another sha256.

    Golden: stylegan2_format.pkl, stylegan2_format_protocol4.pkl, hostile_*.pkl.
    """
    return _snapshot(_content(path, sha256), path)


def convert(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], StyleGan2Spec]:
    """A published generator (.pkl, .safetensors, .pt or .pth) as weights and spec.

    Args:
        settings: of `StyleGan2Settings`, published names.

    Raises:
        UserError: for a damaged, foreign or unsafe file, other keys than a generator's, or unknown settings.

    Golden: stylegan2_format_expected, icgan_stylegan2_*.
    """
    wanted = from_json(StyleGan2Settings, dict(settings))
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"'{path}' is no StyleGAN2 file: the name must end in {', '.join(SUFFIXES)}.",
            "Give the published pickle, or a state dict.",
        )
    content = _content(path, wanted.sha256)
    clamp = wanted.conv_clamp
    if path.suffix == ".pkl":
        network = _take(_snapshot(content, path).networks, wanted.network, path)
        state, clamp = network.state, _conv_clamp(network, wanted.conv_clamp, path)
    else:
        state = _plain_state(content, wanted.network, path)
    bad = [key for key, value in state.items() if not value.is_floating_point() or not value.isfinite().all()]
    if bad:
        raise UserError(f"'{path}' has weights that are no finite numbers: {shorten(bad, 2)}.", DISTRUST)
    try:
        return state, spec_of(state, conv_clamp=clamp)
    except UserError as error:
        problem, _, way_out = str(error).partition("\n")
        raise UserError(f"'{path}': {problem}", way_out) from None


def _content(path: Path, sha256: str | None) -> bytes:
    """The bytes of a file, which are the very ones that were checked."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be read: {error.strerror}.", "Give the path of a published StyleGAN2 file."
        ) from None
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256.lower():
        raise UserError(
            f"'{path}' is not the file that was published: its sha256 is {found[:16]}..., not {sha256[:16]}...",
            "It is incomplete or was replaced: download it again.",
        )
    return content


# --- the official pickle ------------------------------------------------------------------------------------


def _snapshot(content: bytes, path: Path) -> Snapshot:
    found = read_inert(content, _ALLOWED, path)
    try:
        if type(found) is not dict or not any(isinstance(found.get(name), _Module) for name in NETWORKS):
            raise ValueError("it holds none of the networks " + ", ".join(NETWORKS))
        networks: dict[str, Network] = {}
        for name in [name for name in found if name in NETWORKS]:  # in the file's order; others are ignored
            if isinstance(found[name], _Module):
                networks[name] = _network(found[name])
            elif found[name] is not None:
                raise ValueError(f"its {name} is no network")
        if sum(t.nbytes for n in networks.values() for t in n.state.values()) > len(content):
            raise ValueError("its tensors are larger than itself")
        if "G" in networks and "G_ema" in networks and _shape(networks["G"]) != _shape(networks["G_ema"]):
            raise ValueError("its G and G_ema are not of one architecture")
        kwargs = _plain(found.get("training_set_kwargs"))
        if kwargs is not None and type(kwargs) is not dict:
            raise ValueError("its training_set_kwargs are no table")
        return Snapshot(training_set_kwargs=kwargs, networks=networks)
    except ValueError as error:
        raise UserError(f"'{path}' is no official StyleGAN2 pickle: {error}.", DISTRUST) from None


def _persistent(facts: Any) -> _Module:
    """An object by the text of its module, its class and its attributes. The text is dropped here."""
    kinds = {"type": str, "version": int, "module_src": str, "class_name": str, "state": dict}
    if type(facts) is not dict or {key: type(value) for key, value in facts.items()} != kinds:
        raise ValueError("an object that is not described by type, version, module_src, class_name and state")
    if facts["type"] != "class":
        raise ValueError("an object that is not described as the official files do")
    return _Module(facts["class_name"], facts["state"])


# Every name that an official pickle may ask for, and what stands in its place.
_ALLOWED: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent,
    "dnnlib.util EasyDict": dict,
    "collections OrderedDict": dict,
    "builtins set": set,
    "torch.storage _load_from_bytes": flat_storage,
    "torch._utils _rebuild_tensor_v2": tensor,
    "torch._utils _rebuild_parameter": parameter,
    "numpy dtype": NumpyDType,
    "numpy.core.multiarray scalar": numpy_scalar,  # numpy 1
    "numpy._core.multiarray scalar": numpy_scalar,  # numpy 2
}


def _network(root: _Module) -> Network:
    """Gathers a network's weights in the order of a torch state dict.

    Raises:
        ValueError: for parts that a network does not have.
    """
    state: dict[str, Tensor] = {}
    clamps: set[float | None] = set()
    seen: set[int] = set()
    todo = [("", root)]
    while todo:
        prefix, module = todo.pop()
        if len(prefix) > LONGEST:
            raise ValueError("its parts are nested without an end")
        if id(module) in seen:  # also what would make this loop endless
            raise ValueError(f"the part {ascii(prefix)[:60]} occurs twice")
        seen.add(id(module))
        for key, value in _weights(module):
            if prefix + key in state:
                raise ValueError(f"two tensors are called {ascii(prefix + key)[:60]}")
            state[prefix + key] = value
        if "conv_clamp" in module.attributes:
            clamps.add(_clamp(module.attributes["conv_clamp"]))
        parts = _named(module, "_modules", lambda value: isinstance(value, _Module))
        todo += [(f"{prefix}{key}.", part) for key, part in reversed(parts)]
    init_kwargs = _plain(root.attributes.get("_init_kwargs"))
    if type(init_kwargs) is not dict:
        raise ValueError("a network without _init_kwargs")
    return Network(
        class_name=root.class_name, init_kwargs=init_kwargs, state=state, conv_clamps=frozenset(clamps)
    )


def _shape(network: Network) -> tuple[Any, ...]:
    """What a moving average has in common with the network that it averages."""
    sizes = {key: (value.shape, value.dtype) for key, value in network.state.items()}
    return network.class_name, network.init_kwargs, network.conv_clamps, sizes


def _weights(module: _Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and the buffers that a state dict keeps."""
    passing = module.attributes.get("_non_persistent_buffers_set", set())  # since torch 1.5
    if type(passing) is not set:
        raise ValueError("a module whose set of passing buffers is none")
    yield from _named(module, "_parameters", lambda value: isinstance(value, Tensor))
    for key, value in _named(module, "_buffers", lambda value: isinstance(value, Tensor)):
        if key not in passing:
            yield key, value


def _named(module: _Module, table: str, fits: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """The members in one of a module's tables; None stands for a member that is absent."""
    members = module.attributes.get(table)
    if type(members) is not dict:
        raise ValueError(f"a {ascii(module.class_name)[:60]} without {table}")
    for key, value in members.items():
        named = type(key) is str and re.fullmatch(r"\w{1,200}", key, re.ASCII)
        if not named or not (value is None or fits(value)):
            raise ValueError(f"{ascii(key)[:60]} in {table} is none of them")
    return [(key, value) for key, value in members.items() if value is not None]


def _plain(value: Any) -> Any:
    """A copy of plain settings. Raises ValueError for other values, deep nesting, or more than 10,000 of them."""
    left = iter(range(10_000))

    def copy(value: Any, depth: int) -> Any:
        if next(left, None) is None or depth > 16:
            raise ValueError("settings without an end")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            return type(value)(copy(item, depth + 1) for item in value)
        if type(value) is dict:
            return {str(key): copy(item, depth + 1) for key, item in value.items()}
        raise ValueError(f"a {type(value).__name__} among the settings")

    return copy(value, 0)


def _clamp(value: Any) -> float | None:
    if value is not None and (type(value) not in (int, float) or not value > 0):
        raise ValueError("a conv_clamp that is no positive number")
    return None if value is None else float(value)


# --- what to take -------------------------------------------------------------------------------------------


def _take(networks: Mapping[str, Network], name: str, path: Path) -> Network:
    """One network by name, or a UserError that names those that are there."""
    if name not in networks:
        raise UserError(
            f"'{path}' has no '{name}'; it has {shorten(networks, 4)}.",
            "Name its generator by the setting network (G_ema or G), or give another file.",
        )
    return networks[name]


def _conv_clamp(network: Network, wanted: float | None, path: Path) -> float | None:
    """The clamp of a pickle's generator: its arguments, its layers and the user must not contradict each other."""
    synthesis = network.init_kwargs.get("synthesis_kwargs")
    named = synthesis.get("conv_clamp") if type(synthesis) is dict else None
    if network.conv_clamps != {named}:
        raise UserError(
            f"'{path}' contradicts itself: conv_clamp is {named} in its settings and "
            f"{shorten(sorted(map(str, network.conv_clamps))) or 'not told'} in its layers.",
            "Get the original again; or give its weights as .safetensors and name conv_clamp yourself.",
        )
    if wanted not in (None, named):
        raise UserError(
            f"'{path}' has a conv_clamp of {named}, not of {wanted}.", "Leave conv_clamp out for a pickle."
        )
    return None if named is None else float(named)


def _plain_state(content: bytes, name: str, path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors or torch file, by itself or as an entry called `name`."""
    try:
        if path.suffix == ".safetensors":
            found: Any = load_safetensors(content)
        else:
            with warnings.catch_warnings():  # torch warns of what it then refuses: our error says it
                warnings.simplefilter("ignore")
                found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one error for damaged and for refused files
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for '{asked[1]}'" if asked else type(error).__name__
        raise UserError(f"'{path}' holds no state dict that can be read safely: {why}.", DISTRUST) from None
    if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
        found = found[name]
    if not isinstance(found, Mapping) or not all(
        type(key) is str and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise UserError(
            f"'{path}' is no state dict, nor has it one called '{name}'.",
            "Give a file that maps the published names (mapping.*, synthesis.*) to tensors.",
        )
    return dict(found)
