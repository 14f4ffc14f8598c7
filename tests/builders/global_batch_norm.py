"""BatchNorm over the images of all processes, on the CPU: the oracle of runs in several processes.

The package has torch's SyncBatchNorm for it, which is for GPUs alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dreamteacher.runtime.distributed.group import timeout


class _Normalise(torch.autograd.Function):
    """Batch normalisation of N x C x H x W with the moments of all processes' rows; also returns them.

    With x^ = (x - m) / s, of n values a channel, and d the gradient of the output:
    dx = w / s (d - mean(d) - x^ mean(d x^)). The means are over all processes, which have as many rows each; the
    gradients of weight and bias are of these rows, to be averaged as all others are. One exchange of two numbers a
    channel in each direction, in float64.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(weight.dtype)  # of bfloat16, as the moments would be rounded to it
        mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)
        moments = torch.stack([mean, variance]).double()
        moments[1] += moments[0].square()
        ranks = dist.get_world_size(group)
        dist.all_reduce(moments, group=group)
        m, second = moments / ranks
        v = (second - m.square()).clamp(min=0).to(weight.dtype)
        m = m.to(weight.dtype)
        ctx.save_for_backward(x, weight, m, v)
        ctx.eps, ctx.group, ctx.count = eps, group, ranks * x.numel() // x.shape[1]
        return F.batch_norm(x, m, v, weight, bias, training=False, eps=eps), m, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        local, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([d_bias, d_weight]).double()
        dist.all_reduce(sums, group=ctx.group)
        d_mean, dx_mean = (sums / ctx.count).to(weight.dtype)
        scale = weight * (variance + ctx.eps).rsqrt()
        others = F.batch_norm(x, mean, variance, scale * dx_mean, scale * d_mean, training=False, eps=ctx.eps)
        return local.sub_(others), d_weight, d_bias, None, None


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose moments in training are those of all processes' rows. On the CPU.

    Tests: output, gradients and running moments equal `nn.BatchNorm2d`'s on the whole batch, in float64.
    """

    group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if weight is None:
            weight = input.new_ones(input.shape[1], dtype=torch.promote_types(input.dtype, torch.float32))
            bias = torch.zeros_like(weight)
        with torch.autocast(input.device.type, enabled=False):
            y, mean, variance = _Normalise.apply(input, weight, bias, self.eps, self.group)
        if self.running_mean is not None and self.running_var is not None:
            count = dist.get_world_size(self.group) * input.numel() // input.shape[1]
            self._keep(mean, variance * (count / (count - 1)))
        return y

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class _GlobalBatchNormAct2d(GlobalBatchNorm2d):
    """timm's BatchNormAct2d: dropout and activation behind the norm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def make_global(module: nn.Module) -> None:
    """Every BatchNorm below `module` takes its moments over the batch of all processes; names and values stay."""
    group = dist.new_group(timeout=timeout())  # its own: moments need not wait behind gradients
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.BatchNorm2d):
                continue
            new = _GlobalBatchNormAct2d if isinstance(child, BatchNormAct2d) else GlobalBatchNorm2d
            changed = new(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            changed._parameters, changed._buffers = child._parameters, child._buffers
            for part, inner in child.named_children():
                changed.add_module(part, inner)
            changed.group = group
            changed.train(child.training)
            setattr(parent, name, changed)
