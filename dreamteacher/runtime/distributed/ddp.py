"""Networks replicated over several processes (DDP)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WHOLE_MB = 1 << 20  # more than any network here: its gradients are one bucket


def replicate(network: nn.Module, device: torch.device, look: Callable[[nn.Module], Tensor]) -> nn.Module:
    """DDP around a network whose weights are the same everywhere: backward averages the gradients.

    Weights that `look` leaves without a gradient (layers behind a student's last map) are excluded. One backward
    pass is made before the first step, as DDP puts its buckets in order after it: a run that was resumed then sums in
    the same order as one that was not. On the CPU all gradients are exchanged at once, after backward: beside it their
    exchange would take cores from it, and from each BatchNorm that waits for the other processes.

    Args:
        look: runs a network on a small input, and gives a scalar.
    """
    was_training = network.training
    network.eval()
    look(network).backward()
    for parameter in network.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
    network.zero_grad(set_to_none=True)
    ids = [device.index] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    at_forward = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # torch < 2.13
    options: dict[str, Any] = {at_forward: False, "gradient_as_bucket_view": True}
    if device.type == "cpu":
        options["bucket_cap_mb"] = WHOLE_MB
    replica = DistributedDataParallel(network, ids, **options)
    look(replica).backward()
    network.zero_grad(set_to_none=True)
    network.train(was_training)
    return replica


def gradients_stay(network: nn.Module, stay: bool) -> Any:
    """A context in which backward only adds up gradients here (`stay`), to be averaged with those of a later one."""
    if stay and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()
