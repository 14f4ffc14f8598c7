"""Errors that a user can mend: what came, what was expected, what to do, in at most three lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something outside this program is wrong: a path, a name, a file, a setting, a full disk.

    The command line prints it without a traceback and exits with code 2.

    Args:
        problem: what was expected and what came, one line.
        way_out: what to do about it, at most two lines.

    Example:
        >>> print(UserError("No images in 'photos'.", "Give a folder that holds .jpg or .png files."))
        No images in 'photos'.
        Give a folder that holds .jpg or .png files.
    """

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(f"{problem}\n{way_out}")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence (with a leading blank) that names the closest choice, or nothing.

    Example:
        >>> did_you_mean("resnet81", ["resnet18", "convnext_tiny"])
        " Did you mean 'resnet18'?"
        >>> did_you_mean("qqq", ["resnet18"])
        ''
    """
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException, most: int = 120) -> str:
    """What an error says, on one line of at most `most` characters without a full stop; else its type's name.

    Example:
        >>> first_line(ValueError("the header is damaged.\\nAt byte 12."))
        'the header is damaged'
        >>> first_line(ValueError())
        'ValueError'
    """
    said = str(error).strip().splitlines()
    return (said[0] if said else type(error).__name__)[:most].rstrip(". ")


def shorten(names: Iterable[str], most: int = 3) -> str:
    """The first few names and how many more there are: error messages stay short.

    Example:
        >>> shorten(["a", "b", "c", "d", "e"])
        'a, b, c (+2 more)'
    """
    names = list(names)
    tail = f" (+{len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + tail
