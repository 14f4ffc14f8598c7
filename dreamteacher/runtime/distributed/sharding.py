"""Networks over several processes: replicated (DDP), or each process holding a part of the weights (FSDP)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dreamteacher.runtime.distributed.world import launched

WHOLE_MB = 1 << 20  # more than any network here: its gradients are one bucket
UNITS = 10  # a network is cut into about so many units, of which two are whole in memory at a time


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


def shard(
    network: nn.Module, device: torch.device, run: Callable[[], Any], *, whole: bool, also: Sequence[str] = ()
) -> None:
    """FSDP: each process keeps a part of every weight; a unit's weights are gathered while it runs.

    Units are modules that `run` calls, each of about a tenth of the parameters.

    Args:
        network: on `device`, or with `whole` on the CPU: a unit is moved when it is cut. Its weights become DTensors.
        run: runs the network on a small input.
        whole: what is in no unit becomes a unit too: for a network that is only ever called as a whole. Otherwise
            it stays replicated.
        also: methods of the network that run it, beside `forward`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    called: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: called.append(m)) for m in network.modules()]
    was_training = network.training
    network.eval()
    with torch.no_grad():
        run()
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    for parameter in network.parameters():  # FSDP takes no channels_last
        parameter.data = parameter.data.contiguous()
    ran = {id(m) for m in called}
    least = sum(p.numel() for p in network.parameters()) / UNITS

    def cut(module: nn.Module) -> int:
        """Cuts what is below; returns how many numbers of `module` are left in no unit."""
        left = sum(p.numel() for p in module.parameters(recurse=False))
        left += sum(cut(child) for child in module.children())
        if left and left >= least and id(module) in ran and module is not network:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            for method in also:
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)
            return 0
        return left

    cut(network)
    if whole:
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for method in also:
        register_fsdp_forward_method(network, method)


def gradients_stay(network: nn.Module, stay: bool) -> Any:
    """A context in which backward only adds up gradients here (`stay`), to be averaged with those of a later one.

    Not so of a network that is cut: it averages at every backward, or each process would hold whole gradients.
    """
    if stay and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part, put together (all processes call it); others as they are."""
    return tensor.full_tensor() if _cut(tensor) else tensor  # type: ignore[attr-defined]


def whole_on_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor whole on the CPU of the first process, none in the others (all processes call it).

    One after the other, so that no device holds more than one whole tensor.
    """
    found = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        if launched().first:
            found[name] = together.detach().cpu()
    return found


def _cut(tensor: Tensor) -> bool:
    if launched().ranks == 1:
        return False  # and torch's part for it need not be loaded
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def parts_of(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts of whole tensors, cut as the tensors of the same names are; others as they are."""
    return {k: part_of(v, like[k]) if k in like else v for k, v in tensors.items()}


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """As `parts_of`, of one tensor; one of another shape stays whole."""
    if not _cut(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, places = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, places, src_data_rank=None)
