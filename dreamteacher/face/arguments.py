"""Keywords of a call from Python: into a config, and back into what an error says of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, TypeVar

from dreamteacher.distill.config import (
    MakeFeaturesConfig,
    MakeLabelsConfig,
    PretrainConfig,
    TrainInterpreterConfig,
)
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.exports.config import ExportConfig
from dreamteacher.reports.config import InspectConfig, ReportConfig
from dreamteacher.runtime.errors import UserError, did_you_mean
from dreamteacher.teachers.published.config import GetTeacherConfig
from dreamteacher.teachers.training.config import TrainTeacherConfig

CONFIGS = (
    PretrainConfig, TrainTeacherConfig, TrainInterpreterConfig, GetTeacherConfig, MakeFeaturesConfig,
    MakeLabelsConfig, EvaluateConfig, ExportConfig, ReportConfig, InspectConfig,
)  # fmt: skip

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])


# --- into a config -------------------------------------------------------------------------------------------


def make_config(verb: str, cls: type[C], config: C | None, settings: Mapping[str, Any]) -> C:
    """A config of keywords: strings for paths, one number for a square size, single values for tuples.

    Args:
        verb: as the error calls it.
        config: where to begin; None: the defaults.
        settings: keywords; those of a config within are a dict or that config.

    Raises:
        UserError: for a keyword that the config does not have, one that is missing, or a value of another kind.

    Example:
        >>> config = make_config("pretrain", PretrainConfig, None, {"out": "runs/x", "size": 64, "t": 50})
        >>> config.out.name, config.size, config.t
        ('x', (64, 64), (50,))
    """
    if config is not None and not isinstance(config, cls):
        raise UserError(
            f"{verb} takes a {cls.__name__}, not a {type(config).__name__}.", f"Give keywords: {verb}(...)."
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in settings:
        if name not in fields:
            raise UserError(
                f"{verb} has no argument '{name}'.{did_you_mean(name, fields)}",
                f"`help(dreamteacher.{cls.__name__})` lists its arguments.",
            )
    missing = [
        name
        for name, f in fields.items()
        if f.default is f.default_factory is dataclasses.MISSING and name not in settings and config is None
    ]
    if missing:
        raise UserError(
            f"{verb} needs {', '.join(missing)}.", f"`help(dreamteacher.{cls.__name__})` lists its arguments."
        )
    given = {name: _value(verb, name, hints[name], value) for name, value in settings.items()}
    return cls(**given) if config is None else dataclasses.replace(config, **given)  # type: ignore[type-var]


def _value(verb: str, name: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else make_config(f"{verb}'s {name}", hint, None, dict(value))
    try:
        return _fitting(hint, value)
    except (TypeError, ValueError):
        raise UserError(
            f"{verb} takes {_kind(hint)} for {name}, not {str(value)[:60]!r}.{_meant(hint, value)}",
            f"Give {name}=... of that kind.",
        ) from None


def _fitting(hint: Any, value: Any) -> Any:
    """The value as the hint wants it; TypeError or ValueError where it cannot be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _fitting(next(a for a in args if a is not type(None)), value)
    if origin is tuple:
        many = isinstance(value, list | tuple | range)
        if len(args) == 2 and args[1] is ...:
            return tuple(_fitting(args[0], v) for v in (value if many else (value,)))
        values = tuple(value) if many else (value,) * len(args)  # one number for a square
        return tuple(_fitting(a, v) for a, v in zip(args, values, strict=True))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(value)
        return value
    if hint is Path:
        return Path(os.fspath(value))
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and hasattr(value, "__index__") and not isinstance(value, bool):
        return value.__index__()
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(value)
    return value


def _kind(hint: Any) -> str:
    """The kind of values that a hint names, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return f"{_kind(next(a for a in args if a is not type(None)))} or None"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        several = len(args) == 2 and args[1] is ...
        return f"{_kind(args[0])} or several" if several else f"{len(args)} values"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path"}
    return words.get(hint, str(hint))


def _meant(hint: Any, value: Any) -> str:
    origin = typing.get_origin(hint)
    words = typing.get_args(hint) if origin is typing.Literal else ()
    return did_you_mean(str(value), map(str, words))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is dataclasses.MISSING else field.default


def keywords(config: type) -> Callable[[F], F]:
    """Shows a config's settings as keywords of a function, for `help` and for editors that look while it runs."""

    def shown(function: F) -> F:
        hints = typing.get_type_hints(config)
        own = list(Signature.from_callable(function, eval_str=False).parameters.values())
        given = [p for p in own if p.kind is not Parameter.VAR_KEYWORD]
        taken = {p.name for p in given}
        more = [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name])
            for f in dataclasses.fields(config)
            if f.name not in taken
        ]
        returns = function.__annotations__.get("return", Signature.empty)
        function.__signature__ = Signature(  # type: ignore[attr-defined]
            sorted([*given, *more], key=lambda p: p.kind), return_annotation=returns
        )
        return function

    return shown


# --- what an error says --------------------------------------------------------------------------------------


def in_arguments(text: str) -> str:
    """What an error says, with arguments of Python in the place of flags; commands for a shell stay as they are.

    Example:
        >>> print(in_arguments("Use --batch-size 8 and --size 64 96, or add --overwrite to `dreamteacher export`."))
        Use batch_size=8 and size=(64, 96), or add overwrite=True to `dreamteacher export`.
        >>> print(in_arguments("Leave out --no-flip, lower --finetune.lr, or choose --dataset synthesized."))
        Leave out flip=False, lower finetune.lr, or choose dataset="synthesized".
    """
    parts = re.split(r"(`[^`]*`)", text)
    commands = re.compile(r"`\s*(?!--)\S+ .*`", re.DOTALL)
    return "".join(p if commands.fullmatch(p) else _FLAG.sub(_argument, p) for p in parts)


_NUMBER = r"-?\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?\b(?!\.\d|%)"
_FLAG = re.compile(
    rf"(?<![\w-])--([a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)*)(?P<values>(?:[ =](?:{_NUMBER}|[A-Za-z][\w-]*))*)"
)


def _argument(found: re.Match[str]) -> str:
    name, tail = found[1].replace("-", "_"), found["values"]
    kinds = _settings()
    if name not in kinds and name.startswith("no_") and kinds.get(name[3:]) is bool:
        return f"{name[3:]}=False{tail}"
    hint = kinds.get(name)
    if hint is bool:
        return f"{name}=True{tail}"
    words = tail[1:].split(" ") if tail else []
    numbers = []
    for word in words:
        if not re.fullmatch(_NUMBER, word):
            break
        numbers.append(word)
    if numbers:
        rest = "".join(f" {word}" for word in words[len(numbers) :])
        return f"{name}={numbers[0] if len(numbers) == 1 else '(' + ', '.join(numbers) + ')'}{rest}"
    if words and (words[0] in _words(hint) or (words[0].isupper() and len(words[0]) > 1)):
        shown = words[0] if words[0].isupper() else f'"{words[0]}"'
        return f"{name}={shown}{''.join(f' {word}' for word in words[1:])}"
    return name + tail


def _words(hint: Any) -> tuple[str, ...]:
    """The words that a setting takes, if it takes words."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple(map(str, typing.get_args(hint)))
    return tuple(word for arg in typing.get_args(hint) for word in _words(arg))


@functools.cache
def _settings() -> dict[str, Any]:
    """Every setting of the verbs and its type; of two that share a name, one that takes words or none."""

    def of(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, hint in typing.get_type_hints(config).items():
            yield prefix + name, hint
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                yield from of(hint, f"{prefix}{name}.")

    found: dict[str, Any] = {}
    for config in CONFIGS:
        for name, hint in of(config):
            if name not in found or _words(hint):
                found[name] = hint
    return found


@contextlib.contextmanager
def called_from_python(verbose: bool = True) -> Iterator[None]:
    """The boundary of every call: errors speak of arguments; nothing is printed where nobody wants it."""
    with contextlib.ExitStack() as stack:
        if not verbose:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        except UserError as error:
            error.args = (in_arguments(str(error)),)
            raise
        except RuntimeError as error:
            from dreamteacher.data.batches import worker_died

            died = worker_died(error)
            if died is None:
                raise
            raise UserError(*in_arguments(str(died)).split("\n", 1)) from error
