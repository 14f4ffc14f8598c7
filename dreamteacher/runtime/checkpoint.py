"""Atomic safetensors checkpoints: whole or absent, never half-written, and nothing in them can run code."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dreamteacher.runtime import tensor_file
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError, first_line, shorten
from dreamteacher.runtime.optim import Ema

PATTERN = "checkpoint-*.safetensors"


def atomic_write(path: Path, write: Any) -> None:
    """Calls write(temporary path), then fsyncs and renames it to `path`; on any failure nothing is left.

    The temporary file lies in a hidden folder beside `path`, so that nothing that a library puts beside it
    (safetensors has a temporary file of its own) outlives a kill unseen: `sweep` removes the folder.

    Raises:
        UserError: when the disk is full or the place cannot be written.
    """
    place = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = place / path.name
    try:
        place.mkdir(exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise UserError(
            f"Could not write '{path}': {reason}.",
            "Free space or choose another --out, then run the same command: it resumes.",
        ) from error
    finally:
        shutil.rmtree(
            place, ignore_errors=True
        )  # the place itself may be what is wrong: keep the first error


def sweep(folder: Path, *names: str) -> None:
    """Removes what killed writers of these files, or of any in the folder, left half-written.

    Only for who alone writes them: what another process is writing right now would be taken from it.
    """
    for name in names or ("*",):
        for left in folder.glob(f".{name}.*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small UTF-8 file atomically; file names that are not UTF-8 keep their bytes.

    Half characters, which JSON of others may hold and UTF-8 cannot, become question marks.
    """
    errors = "surrogateescape"
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError:
        errors = "replace"
    atomic_write(path, lambda temporary: temporary.write_text(text, "utf-8", errors))


def save(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Writes tensors and JSON facts into one safetensors file, atomically; logs beside it reach the disk before.

    Args:
        tensors: name -> tensor, any memory format or device.
        meta: JSON values, kept under the metadata key "dreamteacher".
    """
    # One contiguous CPU copy a tensor: safetensors stores plain row-major arrays and refuses shared storage.
    plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    text = json.dumps(meta)
    facts = {"dreamteacher": text, "sha256": digest(plain, text)}
    for log in path.parent.glob("*.jsonl"):  # or, after a power cut, a run would resume without lines of them
        with open(log, "rb") as file, contextlib.suppress(OSError):
            os.fsync(file.fileno())
    atomic_write(path, lambda temporary: save_file(plain, temporary, facts))


def digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """SHA-256 of the facts and each tensor's name, dtype, shape and bytes: safetensors has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.nbytes:
            digest.update((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save` wrote.

    Raises:
        UserError: when the file is missing, truncated, altered, not safetensors, or not one of ours.
    """
    try:
        return _read(path)
    except _DAMAGE as error:
        raise UserError(
            f"'{path}' cannot be read: {first_line(error, 200)}.",
            "The file is missing, truncated or of another kind: delete it to fall back on an earlier one.",
        ) from None


_DAMAGE = (*tensor_file.UNREADABLE, ValueError)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As `load`, with one of _DAMAGE for what is damaged, and a UserError for what is whole and not ours."""
    facts = tensor_file.read_metadata(path)
    if "dreamteacher" not in facts:
        raise UserError(
            f"'{path}' is a safetensors file, but not one that dreamteacher wrote.",
            "Remove it from the run folder; where weights are wanted, give a file from `dreamteacher export`.",
        )
    tensors = tensor_file.read(path)
    if "sha256" in facts and facts["sha256"] != digest(tensors, facts["dreamteacher"]):
        raise ValueError("its content has changed since it was written")
    return tensors, parse_json(facts["dreamteacher"])


def before(folder: Path) -> str:
    """For the error that stops a run: what there is to go back to."""
    return "The last checkpoint is from before." if latest(folder) else "No checkpoint was written yet."


def latest(folder: Path, *, whole: bool = False) -> Path | None:
    """The newest checkpoint of a run folder that can be read, or None when there is none at all.

    A damaged newest file is passed over, so that an earlier one still serves.

    Args:
        whole: compare every byte with the checksum, not only open the file; and rename damaged files to
            damaged-*, where `prune` does not count them as kept. Only for who alone writes to the folder.

    Raises:
        UserError: when checkpoints exist and none can be read.
    """
    damaged: list[tuple[Path, str]] = []
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            if whole:
                _read(path)
            else:
                tensor_file.read_metadata(path)
        except _DAMAGE as error:
            damaged.append((path, first_line(error, 200)))
            continue
        for bad, reason in damaged if whole else ():
            aside = bad.with_name(f"damaged-{bad.name}")
            bad.replace(aside)
            print(
                f"'{bad}' is damaged ({reason}): it is now '{aside.name}', and '{path.name}' serves.",
                flush=True,
            )
        return path
    if damaged:
        raise UserError(
            f"None of the checkpoints in '{folder}' can be read: {shorten(p.name for p, _ in damaged)} "
            f"({damaged[0][1]}).",
            "They are truncated, altered or foreign. Remove them to start the run anew.",
        )
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies; names sort by step."""
    return folder / f"checkpoint-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name.

    Example:
        >>> step_of(checkpoint_path(Path("run"), 12))
        12
    """
    return int(path.stem.partition("-")[2])


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for path in sorted(folder.glob(PATTERN))[:-keep]:
        path.unlink(missing_ok=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as flat tensors and JSON scalars; `unpack_optimizer` is its inverse."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    groups: list[dict[str, Any]] = [{} for _ in state["param_groups"]]
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if torch.is_tensor(value) else scalars)[f"optimizer/{index}/{key}"] = value
    for index, entries in enumerate(state["param_groups"]):
        for key, value in entries.items():
            if torch.is_tensor(value):  # timm's LAMB counts its steps in the group, as a tensor
                tensors[f"optimizer/group{index}/{key}"] = value
            elif key != "params":
                groups[index][key] = value
    return tensors, {"scalars": scalars, "groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
) -> None:
    """Restores what `pack_optimizer` took, bitwise."""
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, meta["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *meta["scalars"].items()]:
        if not name.startswith("optimizer/"):
            continue
        _, place, key = name.split("/")
        if place.startswith("group"):
            groups[int(place.removeprefix("group"))][key] = value.clone()
            continue
        if torch.is_tensor(value):
            # Moments lie in memory as their parameter does (channels_last): same kernels, same last bits.
            like = parameters[int(place)]
            same = value.shape == like.shape
            value = torch.empty_like(like, dtype=value.dtype).copy_(value) if same else value.clone()
        state.setdefault(int(place), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it.

    Example:
        >>> sorted(under("a/", {"a/x": torch.ones(1), "a/y": torch.ones(1), "b/x": torch.ones(1)}))
        ['x', 'y']
    """
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def pack(
    modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer, average: Ema | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that a training goes on from: weights as NAME/..., the optimizer, and an average of the weights as ema/..."""
    tensors, scalars = pack_optimizer(optimizer)
    for name, module in modules.items():
        tensors |= {f"{name}/{k}": v for k, v in module.state_dict().items()}
    if average is not None:
        tensors |= {f"ema/{k}": v for k, v in average.tensors.items()}
    return tensors, {"optimizer": scalars, "ema_updates": average.updates if average else 0}


def unpack(
    modules: Mapping[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    average: Ema | None,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    path: Path,
) -> None:
    """Restores what `pack` gave, bitwise.

    Raises:
        UserError: when the weights are of another network; `path` is their file.
    """
    for name, module in modules.items():
        load_exactly(module, under(f"{name}/", tensors), path)
    if average is not None:
        for key, value in under("ema/", tensors).items():
            average.tensors[key].copy_(value)  # in place: the memory layout stays
        average.updates = meta["ema_updates"]
    unpack_optimizer(optimizer, tensors, meta["optimizer"])


def adopt_exactly(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """`load_exactly` in float32, where the tensors become the module's own without a copy: it may be without memory.

    Raises:
        UserError: as `load_exactly`.
    """
    check_fits(module, tensors, path)
    module.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)


def load_exactly(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """`load_state_dict(strict=True)` after `check_fits`, which raises."""
    check_fits(module, tensors, path)
    module.load_state_dict(dict(tensors))


def check_fits(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Compares names and shapes alone: the module may be without memory.

    Raises:
        UserError: naming missing, unexpected and wrongly shaped keys.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in tensors]
    unexpected = [k for k in tensors if k not in own]
    shapes = [
        f"{k} {tuple(tensors[k].shape)} != {tuple(own[k].shape)}"
        for k in own
        if k in tensors and tensors[k].shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        parts = [f"{len(keys)} {what} ({shorten(keys, 2)})" for what, keys in found.items() if keys]
        raise UserError(
            f"'{path}' does not fit the network ({len(own)} tensors): {'; '.join(parts)}.",
            "It was made for another architecture: name the one that it was made with.",
        )


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a foreign file: .safetensors, or torch's own format read without running anything.

    In torch's format the state dict may lie under 'state_dict' or 'model'.

    Raises:
        UserError: when the file is missing, damaged, or holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"No weight file at '{path}', so it cannot be read.", "Check the path.")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = tensor_file.read(path)
        else:
            with warnings.catch_warnings():  # torch warns of pickles that it then refuses: our error says it
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one error for damaged and for refused files
        raise UserError(
            f"'{path}' cannot be read as plain weights (damaged, or a pickle that holds more than tensors).",
            "Copy or download it again, or save the state dict alone: torch.save(model.state_dict(), path).",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    found = {str(k): v for k, v in content.items()} if isinstance(content, Mapping) else {}
    if not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(
            f"'{path}' holds no state dict (names -> tensors), nor one under 'state_dict' or 'model'.",
            "Save the state dict alone: torch.save(model.state_dict(), path), or as .safetensors.",
        )
    return found
