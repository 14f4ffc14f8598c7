"""What is read of the folders that the library diffusers writes: config.json and the names of old weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError, first_line


def read_table(path: Path, *, repair: str) -> dict[str, Any]:
    """The table in a JSON file.

    Args:
        repair: what to do about a file that cannot be read.

    Raises:
        UserError: for a file that is missing, damaged or holds something else.
    """
    try:
        found = parse_json(path.read_text("utf-8"))
        return {str(k): v for k, v in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        reason = first_line(error, 200)
        raise UserError(f"'{path}' cannot be read: {type(error).__name__} {reason}.", repair) from None


def read_config(
    folder: Path, classes: Collection[str], *, repair: str, others: str, refusal: str = "", default: str = ""
) -> tuple[str, dict[str, Any]]:
    """The class that a folder's config.json names, and all that it says.

    Args:
        classes: names of the classes that are read here.
        repair: what to do about a file that cannot be read.
        others: what to do about a network of another class.
        refusal: what such a network is said to be; none: "not a CLASS or CLASS".
        default: the class of a file that names none; none: it is refused.

    Raises:
        UserError: for a file that cannot be read, or a network of none of `classes`.
    """
    path = folder / "config.json"
    values = read_table(path, repair=repair)
    name = values.get("_class_name", default or None)
    if name not in classes:
        refusal = refusal or f"not a {' or '.join(classes)}"
        raise UserError(f"'{path}' describes a {name}, {refusal}.", others)
    return str(name), values


def arguments_of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries of a config.json that the class takes."""
    taken = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {k: v for k, v in values.items() if k in taken}


def modern_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the attention weights of folders that diffusers wrote before 2023 (google/ddpm-*, Stable Diffusion 1.x's VAE).

    Example:
        >>> import torch
        >>> list(modern_attention({"decoder.mid_block.attentions.0.proj_attn.bias": torch.zeros(2)}))
        ['decoder.mid_block.attentions.0.to_out.0.bias']
    """
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
    return {pattern.sub(lambda m: m[1] + names[m[2]], k): v for k, v in weights.items()}
