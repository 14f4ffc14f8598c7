"""Safetensors files as they are read everywhere: tensors, the text beside them, and what can go wrong.

Callers turn UNREADABLE into an error of their own, which says what the file was to them. What may be of torch's own
format is read by `checkpoint.read_state_dict`, which refuses code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

UNREADABLE = (OSError, SafetensorError)  # a file that is missing, truncated, or of another format


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU, in their own precision.

    Raises:
        OSError, SafetensorError: see UNREADABLE.
    """
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file keeps beside its tensors; no tensor is read, but a truncated file is noticed.

    Raises:
        OSError, SafetensorError: see UNREADABLE.
    """
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
