"""The one config system: frozen dataclasses <-> JSON, exactly, both ways."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from dreamteacher.runtime.errors import UserError, did_you_mean

T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for files of others: whatever is wrong with the text is a ValueError.

    Example:
        >>> parse_json("[" * 100_000)
        Traceback (most recent call last):
        ValueError: nested too deep
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values: tuples become lists, paths strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=Path.as_posix))


def from_json(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_json`: `from_json(type(c), to_json(c)) == c`.

    Raises:
        UserError: for a key that the config does not have (a file of another version, or a typing error),
            one that is missing, or a value of another kind.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names, mend = [f.name for f in fields], "Mend or restore the file."
    if not isinstance(values, dict):
        raise UserError(f"{cls.__name__} must be a table of settings, not {str(values)[:40]!r}.", mend)
    for field in fields:
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and field.name not in values:
            raise UserError(f"{cls.__name__} lacks the setting '{field.name}'.", mend)
    for key in values:
        if key not in names:
            raise UserError(
                f"{cls.__name__} has no setting '{key}'.{did_you_mean(key, names)}",
                "Remove the key, or read the file with the version that wrote it.",
            )
    typed = {}
    for key, value in values.items():
        try:
            typed[key] = _typed(hints[key], value)
        except (TypeError, ValueError, OverflowError):
            words = typing.get_args(hints[key]) if typing.get_origin(hints[key]) is typing.Literal else ()
            way = f"It is one of: {', '.join(map(str, words))}." if words else mend
            raise UserError(f"{cls.__name__}: '{key}' cannot be {str(value)[:40]!r}.", way) from None
    return cls(**typed)


def _typed(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(a for a in args if a is not type(None)), value)
    if origin is typing.Literal and value not in args:
        raise ValueError("not one of the words")
    plain: Any = {tuple: (list, tuple), list: list, dict: dict}.get(origin)
    plain = hint if hint in (int, str, bool) else plain
    if plain and (not isinstance(value, plain) or (hint is int and isinstance(value, bool))):
        raise TypeError("of another kind")
    if origin is tuple:
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        return tuple(_typed(h, v) for h, v in zip(inner, value, strict=True))
    if origin is list:
        return [_typed(args[0], v) for v in value]
    if hint in (Path, float):
        return hint(value)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]
    return value


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings in which two resolved configs differ, as "key: old -> new" (dotted for nested ones)."""
    changes = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += [f"{key}.{c}" for c in changed_keys(a, b)]
        elif a != b:
            changes.append(f"{key}: {a} -> {b}")
    return changes


def describe(title: str, facts: dict[str, Any], width: int = 96) -> str:
    """Settings for the screen: several to a line, aligned, at most 25 lines for what we print."""
    cells = [f"{key} {_short(value)}" for key, value in _flat(facts)]
    lines, line = [], ""
    for cell in cells:
        if line and len(line) + len(cell) + 3 > width:
            lines.append(line)
            line = ""
        line += (" | " if line else "  ") + cell
    return "\n".join([title, *lines, line])


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(_short(v) for v in value) or "-"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
