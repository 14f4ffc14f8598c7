"""`train-teacher` of a diffusion model on the user's own images, as the authors did for BDD100K."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from dreamteacher.data import seeds
from dreamteacher.runtime import checkpoint, optim
from dreamteacher.runtime.distributed.ddp import replicate
from dreamteacher.runtime.distributed.device import autocast, seeded
from dreamteacher.runtime.distributed.world import Draws, randint, randn
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, DiffusionTeacher, build_unet, q_sample
from dreamteacher.teachers.training.objective import Objective, Preset, TrainingPlan


@dataclass(frozen=True, kw_only=True)
class DiffusionPreset(Preset):
    """A U-Net and how to train it; `attention` in network feature rows.

    Args:
        channels: width of each level, fine to coarse; layers: residual blocks per level.
        attention: levels (0 is the finest) with self-attention; head: its head width.
        patch: pixels per side folded into channels before the network.
        groups: groups of GroupNorm; resample: residual blocks up and down, as in ADM.
        ema: decay of the averaged weights; timestep: t of the teacher's features.
    """

    channels: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]
    head: int
    patch: int
    groups: int
    resample: bool
    dropout: float
    ema: float
    timestep: int

    @property
    def unit(self) -> int:
        return self.patch * 2 ** (len(self.channels) - 1)

    def line(self) -> str:
        return f"channels {self.channels}, patch {self.patch}, t = {self.timestep}"


_ADM_256 = DiffusionPreset(
    channels=(256, 256, 512, 512, 1024, 1024), layers=2, attention=(3, 4, 5), head=64, patch=1, groups=32,
    resample=True, dropout=0.1, size=(256, 256), batch_size=256, lr=1e-4, steps=500_000, ema=0.9999,
    timestep=50,
)  # fmt: skip
_CPU_64 = DiffusionPreset(
    channels=(32, 64, 128, 128, 128), layers=1, attention=(2, 3, 4), head=32, patch=2, groups=8,
    resample=False, dropout=0.0, size=(64, 64), batch_size=32, lr=5e-4, steps=6000, ema=0.999, timestep=100,
)  # fmt: skip

PRESETS: dict[str, DiffusionPreset] = {
    # An hour on two CPU cores. Strides 2 to 32; attention at 8 and below.
    "cpu-64": _CPU_64,
    # Hours on one GPU.
    "gpu-64": replace(
        _ADM_256, channels=(128, 256, 256, 384, 384), attention=(2, 3, 4), patch=2, size=(64, 64),
        steps=100_000, timestep=100,
    ),
    # Table 16 of the paper: LSUN and FFHQ; ImageNet (no dropout, T = 150); BDD100K (128 x 256, 300 epochs).
    "adm-256": _ADM_256,
    "adm-imagenet-256": replace(_ADM_256, dropout=0.0, timestep=150),
    "adm-bdd100k": replace(
        _ADM_256, channels=(128, 128, 256, 256, 384, 512), attention=(4, 5), head=32, size=(128, 256),
        dropout=0.0, steps=82_000,
    ),
}  # fmt: skip


def network_spec(
    preset: DiffusionPreset, size: tuple[int, int], image_channels: int, schedule: str
) -> DiffusionSpec:
    """The DiffusionSpec of a preset at a size.

    Raises:
        UserError: where attention would get no head. The coarsest level always has attention.
    """
    levels = range(len(preset.channels))
    for i in {*preset.attention, levels[-1]}:
        if preset.channels[i] < preset.head:
            raise UserError(
                f"Attention at level {i} would have no head: {preset.channels[i]} channels, heads of {preset.head}.",
                f"Widen the level, or make `head` at most {preset.channels[i]}.",
            )
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if preset.resample
        else ("DownBlock2D", "UpBlock2D")
    )
    channels = image_channels * preset.patch**2
    kind = "resnet" if preset.resample else "conv"
    unet: dict[str, Any] = {
        "sample_size": [s // preset.patch for s in size],
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(preset.channels),
        "layers_per_block": preset.layers,
        "down_block_types": ["AttnDownBlock2D" if i in preset.attention else plain[0] for i in levels],
        "up_block_types": ["AttnUpBlock2D" if i in preset.attention else plain[1] for i in reversed(levels)],
        "downsample_type": kind,
        "upsample_type": kind,
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": preset.head,
        "norm_num_groups": preset.groups,
        "attn_norm_num_groups": preset.groups,
        "dropout": preset.dropout,
        "time_embedding_dim": max(256, 4 * preset.channels[0]),
    }
    return DiffusionSpec(
        unet=unet,
        patch=preset.patch,
        image_channels=image_channels,
        size=size,
        schedule="cosine" if schedule == "cosine" else "linear",
        timestep=preset.timestep,
    )


def build(spec: DiffusionSpec, seed: int) -> UNet2DModel:
    """A fresh network whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_unet(spec)


def parameter_count(spec: DiffusionSpec) -> int:
    """Trained numbers; nothing is allocated."""
    with torch.device("meta"):
        unet = build(spec, 0)
    return sum(p.numel() for p in unet.parameters())


def epsilon_loss(
    unet: torch.nn.Module, x0: Tensor, t: Tensor, noise: Tensor, alpha_bar: Tensor, mask: None = None
) -> Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14), per image (N,).

    Args:
        x0: network input in [-1, 1], N x C x H x W; t: timesteps (N,); noise: as x0.
    """
    x = q_sample(x0, alpha_bar[t].to(x0.dtype), noise)
    return F.mse_loss(unet(x, t).sample.float(), noise, reduction="none").mean(dim=(1, 2, 3))


class DiffusionObjective(Objective):
    """The U-Net, its averaged weights, and the steps on the loss of predicted noise."""

    def __init__(self, preset: DiffusionPreset, spec: DiffusionSpec, plan: TrainingPlan) -> None:
        self.spec, self.plan = spec, plan
        unet = build(spec, plan.seed)
        self.unet = unet.to(plan.device, memory_format=torch.channels_last).train()  # type: ignore[arg-type]
        self.ema = optim.Ema(self.unet, preset.ema)
        groups = optim.parameter_groups([self.unet], weight_decay=0.0)
        self.optimizer = optim.build_optimizer("adamw", groups, plan.lr, (0.9, 0.99))
        self.network: torch.nn.Module = self.unet
        if plan.world.ranks > 1:
            self.network = replicate(self.unet, plan.device, self._look)
        # It brings images in and samples out; its weights are the averaged ones, put there before each look.
        self.ema_teacher = DiffusionTeacher(build(spec, plan.seed), spec, name="in training", licence="-")
        self.ema_teacher.to(plan.device)

    def _look(self, network: torch.nn.Module) -> Tensor:
        """A scalar that depends on all weights, from one small input."""
        levels = len(self.spec.unet["block_out_channels"])
        x = torch.zeros(1, self.spec.unet["in_channels"], 2**levels, 2**levels, device=self.plan.device)
        return network(x, torch.zeros(1, dtype=torch.long, device=self.plan.device)).sample.sum()

    def step(self, step: int, images: Tensor) -> dict[str, Tensor]:
        plan, device = self.plan, self.plan.device
        generator = Draws(
            device, seeds.step_generator(plan.seed, step, "diffusion").initial_seed(), plan.world
        )
        x0 = self.ema_teacher.to_network(images)
        t = randint(self.spec.steps, (len(x0),), generator, device=device)
        noise = randn(x0.shape, generator, device=device, dtype=x0.dtype)
        # Dropout takes no generator. Each process drops on its own: a layer's masks of a whole batch at 256 px are GBs.
        dropout = seeds.step_generator(plan.seed, step, f"dropout/{plan.world.rank}").initial_seed()
        with seeded(dropout, device), autocast(device, plan.precision):
            loss = epsilon_loss(self.network, x0, t, noise, self.ema_teacher.alpha_bar).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        warmup = min(500, plan.steps // 10)
        lr = optim.lr_at(step, total=plan.steps, warmup=warmup, peak=plan.lr, final=0.02 * plan.lr)
        with self.update():
            optim.set_lr(self.optimizer, lr)
            self.optimizer.step()
            self.ema.update(self.unet)
        return {"loss": loss.detach(), "grad_norm": norm}

    @torch.no_grad()
    def validate(self, images: Tensor, generator: torch.Generator) -> tuple[dict[str, float], Tensor]:
        """The averaged network's loss at fixed timesteps and noise, and DDIM samples."""
        device = self.plan.device
        self.ema_teacher.unet.load_state_dict(self.ema.tensors)
        x0 = self.ema_teacher.to_network(images)
        row: dict[str, float] = {}
        with autocast(device, self.plan.precision):
            for t in (50, 100, 250, 500):
                noise = torch.randn(x0.shape, generator=generator).to(x0)
                times = torch.full((len(x0),), t, device=device)
                loss = epsilon_loss(
                    self.ema_teacher.unet, x0, times, noise, self.ema_teacher.alpha_bar
                ).mean()
                row[f"loss/t{t}"] = loss.item()
            sheet = self.ema_teacher.generate(64, generator=torch.Generator(device).manual_seed(0))
        return row, sheet

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return checkpoint.pack({"unet": self.unet}, self.optimizer, self.ema)

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
        checkpoint.unpack({"unet": self.unet}, self.optimizer, self.ema, tensors, meta, path)

    def weights(self) -> dict[str, Tensor]:
        return self.ema.tensors

    def facts(self) -> dict[str, Any]:
        return {}
