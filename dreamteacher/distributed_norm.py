"""BatchNorm over the whole batch when several processes have a part of it each."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.distributed_group import timeout

BatchNorm = Literal["global", "local"]


class _Normalise(torch.autograd.Function):
    """Batch normalisation of N x C x H x W with the moments of all processes' rows; also returns them.

    With x^ = (x - m) / s, of n values a channel, and d the gradient of the output:
    dx = w / s (d - mean(d) - x^ mean(d x^)). The means are over all processes; the gradients of weight and bias are
    of these rows, to be averaged as all others are. One exchange of a few numbers a channel in each direction.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        mine = torch.cat(
            [mean.double(), variance.double(), mean.new_tensor([x.numel() / x.shape[1]]).double()]
        )
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group)
        table, channels = torch.stack(parts), x.shape[1]
        counts = table[:, -1:]
        count = counts.sum()
        means, variances = table[:, :channels], table[:, channels:-1]
        whole = (means * counts).sum(0) / count
        spread = ((variances + (means - whole).square()) * counts).sum(0) / count
        m, v = whole.to(x.dtype), spread.to(x.dtype)
        ctx.save_for_backward(x, weight, m, v, count)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, m, v, weight, bias, training=False, eps=eps), m, v, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        local, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([d_bias, d_weight]).double()
        dist.all_reduce(sums, group=ctx.group)
        d_mean, dx_mean = (sums / count).to(x.dtype)
        scale = (variance + ctx.eps).rsqrt()
        slope = weight * scale.square() * dx_mean
        offset = weight * scale * d_mean - slope * mean
        dx = local.addcmul_(x, -slope.view(1, -1, 1, 1)).sub_(offset.view(1, -1, 1, 1))
        return dx, d_weight, d_bias, None, None


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose moments in training are those of all processes' rows. On the CPU.

    Tests: output, gradients and running moments equal `nn.BatchNorm2d`'s on the whole batch, in float64.
    """

    group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        weight = torch.ones_like(x[0, :, 0, 0]) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        with torch.autocast(x.device.type, enabled=False):
            y, mean, variance, count = _Normalise.apply(x, weight, bias, self.eps, self.group)
        if self.running_mean is not None and self.running_var is not None:
            self._keep(mean, variance * (count / (count - 1)))
        return y.to(input.dtype)

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


def make_global(module: nn.Module, device: torch.device) -> None:
    """Every BatchNorm below `module` takes its moments over the batch of all processes; names and values stay.

    On a GPU it is torch's SyncBatchNorm, which has no CPU version; on the CPU `GlobalBatchNorm2d`.
    """
    from timm.layers import BatchNormAct2d, convert_sync_batchnorm

    if device.type == "cuda":
        convert_sync_batchnorm(module)  # `module` itself is none, so it is changed in place
        return
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
