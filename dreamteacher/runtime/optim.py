"""Optimizers, the learning-rate schedule, and an exponential moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
from torch import nn

from dreamteacher.runtime.settings import OptimizerName


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and kernels decay; biases, norms and other vectors do not.

    Nor does what a timm model names in `no_weight_decay` (position embeddings, class tokens).
    """
    modules = list(modules)
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    return _two_groups(parameters, _no_decay(modules), weight_decay)


def _two_groups(
    parameters: Sequence[nn.Parameter], no_decay: Set[int], weight_decay: float
) -> list[dict[str, object]]:
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for parameter in parameters:
        groups[parameter.ndim < 2 or id(parameter) in no_decay].append(parameter)
    return [
        {"params": p, "weight_decay": decay} for p, decay in zip(groups, (weight_decay, 0.0), strict=True)
    ]


def _no_decay(modules: Iterable[nn.Module]) -> Set[int]:
    """The ids of the parameters that timm models inside these modules want no weight decay for."""
    found: set[int] = set()
    for part in (part for module in modules for part in module.modules()):
        names: Any = getattr(part, "no_weight_decay", None)
        if callable(names):
            wanted = set(names())
            found |= {id(p) for name, p in part.named_parameters() if name in wanted}
    return found


def build_optimizer(
    name: OptimizerName, groups: list[dict[str, object]], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW from torch or LAMB from timm (the paper's choice for ImageNet)."""
    if name == "lamb":
        from timm.optim import Lamb

        # timm's LAMB would clip at norm 1 by itself: clipping is the loop's setting.
        return Lamb(groups, lr=lr, betas=betas, max_grad_norm=None)
    # Fused: one pass over memory; unfused, AdamW takes a third of a small step on a CPU.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def lr_at(step: int, *, total: int, warmup: int, peak: float, final: float = 0.0) -> float:
    """The learning rate for step `step` of 0 .. total-1: linear warm-up, then a half cosine down to `final`.

    Example:
        >>> [round(lr_at(s, total=4, warmup=2, peak=1.0), 3) for s in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def poly_lr_at(step: int, *, total: int, warmup: int, peak: float, power: float = 0.9) -> float:
    """The learning rate for step `step` of 0 .. total-1: linear warm-up, then `peak` (1 - step / total)^power.

    Example:
        >>> [round(poly_lr_at(s, total=4, warmup=1, peak=1.0, power=1.0), 2) for s in range(4)]
        [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - step / total) ** power


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """An exponential moving average of a module's parameters; buffers are copied.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that short runs do not keep their first weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the module's present weights; call it after every optimizer step."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, nn.Parameter)}
        torch._foreach_lerp_([self.tensors[k] for k in current], list(current.values()), weight)
        for key, buffer in module.state_dict().items():
            if key not in current:
                self.tensors[key].copy_(buffer)


def layer_depths(model: Any) -> dict[str, int]:
    """Parameter name -> depth of its group in a timm model, 0 for the stem, without gaps.

    A group is a stage as timm splits the model; a stage of six blocks or more makes one group of each three
    blocks (the first takes what is left over). So a ResNet-50 has 6 groups: stem, stages 1 and 2, two halves of
    stage 3, stage 4; and a ConvNeXt-B has 13.

    Args:
        model: a timm model; one that does not say how it is grouped is one group.

    Source: the groups of SparK's fine-tuning (arXiv 2301.03580), which follow ConvNeXt's (arXiv 2201.03545).
    """
    from timm.models import group_parameters

    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        return {name: 0 for name, _ in model.named_parameters()}
    stages = group_parameters(model, matcher(coarse=True), reverse=True)
    blocks = group_parameters(model, matcher(coarse=False), reverse=True)
    members: dict[int, list[int]] = {}
    for name, stage in stages.items():
        members.setdefault(stage, []).append(blocks[name])
    order = {stage: sorted(set(found)) for stage, found in members.items()}

    def group(name: str) -> tuple[int, int]:
        """The stage, and in a long one which three of its blocks: counted from its end."""
        found = order[stages[name]]
        left = len(found) - 1 - found.index(blocks[name])
        return stages[name], max(0, len(found) // 3 - 1 - left // 3) if len(found) >= 6 else 0

    keys = {name: group(name) for name in stages}
    ranks = {key: i for i, key in enumerate(sorted(set(keys.values())))}
    last = f"{model.feature_info[-1]['module']}."  # a norm or a convolution after it is no layer more
    deepest = max((ranks[key] for name, key in keys.items() if name.startswith(last)), default=len(ranks))
    return {name: min(ranks[key], deepest) for name, key in keys.items()}


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, object]]:
    """`parameter_groups` of a timm model by depth, each with the `factor` on its learning rate.

    The deepest group has the factor `layer_decay` (above 0, up to 1), the one before its square, and so on: what
    comes after the backbone has 1.
    """
    depths, no_decay = layer_depths(model), _no_decay([model])
    deepest = max(depths.values())
    parts: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(depths[name], []).append(parameter)
    return [
        {**group, "factor": layer_decay ** (deepest + 1 - depth)}
        for depth, parameters in sorted(parts.items())
        for group in _two_groups(parameters, no_decay, weight_decay)
        if group["params"]
    ]
