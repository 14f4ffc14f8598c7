"""`train-teacher`: a diffusion teacher on the user's own images, as the authors did for BDD100K."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from dreamteacher import __version__, checkpoint, data, optim
from dreamteacher.config import describe, to_json
from dreamteacher.distributed import Precision, autocast, pick_device, resolve_precision
from dreamteacher.errors import UserError
from dreamteacher.rundir import Progress, RunDir, Signals
from dreamteacher.teachers import save_teacher
from dreamteacher.teachers.diffusion import DiffusionSpec, DiffusionTeacher, build_unet, q_sample

PresetName = Literal["cpu-64", "gpu-64", "adm-256", "adm-imagenet-256", "adm-bdd100k"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A network and how long to train it. Sizes in pixels, `attention` in network feature rows.

    Args:
        channels: width of each level, fine to coarse; layers: residual blocks per level.
        attention: levels (0 is the finest) with self-attention; head: its head width.
        patch: pixels per side folded into channels before the network.
        groups: groups of GroupNorm; resample: residual blocks up and down, as in ADM.
    """

    channels: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]
    head: int
    patch: int
    groups: int
    resample: bool
    dropout: float
    size: tuple[int, int]
    batch_size: int
    lr: float
    steps: int
    ema: float
    timestep: int


_ADM_256 = Preset(
    channels=(256, 256, 512, 512, 1024, 1024), layers=2, attention=(3, 4, 5), head=64, patch=1, groups=32,
    resample=True, dropout=0.1, size=(256, 256), batch_size=256, lr=1e-4, steps=500_000, ema=0.9999,
    timestep=50,
)  # fmt: skip
_CPU_64 = Preset(
    channels=(32, 64, 128, 128, 128), layers=1, attention=(2, 3, 4), head=32, patch=2, groups=8,
    resample=False, dropout=0.0, size=(64, 64), batch_size=32, lr=5e-4, steps=6000, ema=0.999, timestep=100,
)  # fmt: skip

PRESETS: dict[PresetName, Preset] = {
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


@dataclass(frozen=True, kw_only=True)
class TrainTeacherConfig:
    """Train a diffusion teacher on a folder of images."""

    images: Path
    """Folder of images, searched recursively."""
    out: Path
    """Folder for the teacher; the same command resumes a run that was stopped."""
    preset: PresetName = "cpu-64"
    """Network and schedule: cpu-64 takes about an hour on 2 cores; adm-* are the paper's Table 16."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; none: the preset's."""
    steps: int | None = None
    """Training steps; none: the preset's."""
    batch_size: int | None = None
    """Images a step; none: the preset's."""
    lr: float | None = None
    """Peak learning rate; none: the preset's."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """What the network sees; auto: grey when every image is."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule (the paper's teachers: linear)."""
    flip: bool = True
    """Horizontal flips."""
    seed: int = 0
    """Seeds weights, order, noise and timesteps."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Precision = "auto"
    """Autocast dtype; auto: bfloat16 where the hardware has it."""
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 1000
    """Steps between sample sheets and validation lines."""
    name: str | None = None
    """Name in the card; none: the folder's."""
    licence: str = "yours (trained by you; the images' terms may bind you)"
    """Licence of the weights, for the card."""
    workers: int = 2
    """Processes or threads that decode images."""
    cache_gb: float = 2.0
    """Images are kept decoded in memory up to this size, else streamed."""
    strict: bool = False
    """Stop before the first step when any image is damaged."""
    dry_run: bool = False
    """Only print what would be done."""


def network_spec(preset: Preset, size: tuple[int, int], image_channels: int, schedule: str) -> DiffusionSpec:
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


def epsilon_loss(
    unet: torch.nn.Module, x0: Tensor, t: Tensor, noise: Tensor, alpha_bar: Tensor, mask: None = None
) -> Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14), per image (N,).

    Args:
        x0: network input in [-1, 1], N x C x H x W; t: timesteps (N,); noise: as x0.
    """
    x = q_sample(x0, alpha_bar[t].to(x0.dtype), noise)
    return F.mse_loss(unet(x, t).sample.float(), noise, reduction="none").mean(dim=(1, 2, 3))


def train_teacher(config: TrainTeacherConfig) -> Path | None:
    """Trains a teacher and returns its folder (None for a dry run); the same call resumes.

    Raises:
        UserError: before anything is written, for what can be known then; SystemExit(128 + n) on a signal.
    """
    preset = PRESETS[config.preset]
    size = config.size or preset.size
    steps, batch = config.steps or preset.steps, config.batch_size or preset.batch_size
    lr = config.lr or preset.lr
    device = pick_device(config.device)
    unit = preset.patch * 2 ** (len(preset.channels) - 1)
    if size[0] % unit or size[1] % unit:
        raise UserError(
            f"--size {size[0]} {size[1]} does not fit the preset '{config.preset}'.",
            f"Both must be multiples of {unit}.",
        )
    images = data.load_images(
        config.images, size, strict=config.strict, cache_gb=config.cache_gb, workers=config.workers
    )
    if batch > len(images):
        raise UserError(
            f"A batch of {batch} is more than the {len(images)} readable images.",
            f"Use --batch-size {len(images)}.",
        )
    grey = config.channels == "grey" or (config.channels == "auto" and _all_grey(images))
    spec = network_spec(preset, size, 1 if grey else 3, config.schedule)
    resolved = {"verb": "train-teacher", "version": __version__, "config": to_json(config)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = build_unet(spec)
    parameters = sum(p.numel() for p in unet.parameters())
    RunDir.check(config.out, resolved, needed_bytes=0 if config.dry_run else parameters * 32)
    name = config.name or config.out.name
    print(describe(f"train-teacher '{name}'", {
        "images": len(images), "skipped": len(images.bad), "size": size, "channels": "grey" if grey else "rgb",
        "parameters": f"{parameters / 1e6:.1f} M", "steps": steps, "batch": batch, "lr": lr,
        "epochs": f"{steps * batch / len(images):.0f}", "device": device,
        "precision": str(resolve_precision(device, config.precision)).removeprefix("torch."),
        "disk": f"{parameters * 32 / 1e6:.0f} MB", "out": config.out,
    }), flush=True)  # fmt: skip
    if config.dry_run:
        return None
    with contextlib.closing(RunDir(config.out)) as run:
        _Training(config, preset, spec, unet, images, run, device, steps, batch, lr, resolved).loop()
    card = {
        "name": name, "licence": config.licence, "trained_on": config.images.name, "images": len(images),
        "steps": steps, "batch_size": batch, "seed": config.seed, "parameters": parameters,
        "version": __version__,
    }  # fmt: skip
    path = checkpoint.latest(config.out)
    assert path is not None
    tensors, _ = checkpoint.load(path)
    ema = {k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")}
    save_teacher(config.out, ema, spec, card)
    print(f"Teacher in '{config.out}'. Use it: dreamteacher pretrain --teacher {config.out} --images ...")
    return config.out


def _all_grey(images: data.ImageSet) -> bool:
    index = torch.linspace(0, len(images) - 1, min(len(images), 256)).long()
    rgb = images.get(index).int()
    return bool((rgb[:, 0] - rgb[:, 1]).abs().max() <= 2 and (rgb[:, 1] - rgb[:, 2]).abs().max() <= 2)


class _Training:
    """State of one training: network, EMA, optimizer, and the loop over them."""

    def __init__(
        self, config: TrainTeacherConfig, preset: Preset, spec: DiffusionSpec, unet: UNet2DModel,
        images: data.ImageSet, run: RunDir, device: torch.device, steps: int, batch: int, lr: float,
        resolved: dict[str, Any],
    ) -> None:  # fmt: skip
        self.config, self.spec, self.images, self.run, self.device = config, spec, images, run, device
        self.steps, self.batch, self.lr = steps, batch, lr
        self.unet = unet.to(device, memory_format=torch.channels_last).train()  # type: ignore[arg-type]
        self.ema = optim.Ema(self.unet, preset.ema)
        groups = optim.parameter_groups([self.unet], weight_decay=0.0)
        self.optimizer = optim.build_optimizer("adamw", groups, lr, (0.9, 0.99))
        # The teacher shares the network that is trained: it only brings images in and samples out.
        self.eyes = self._teacher(build_unet(spec))
        self.eyes.to(device)
        self.resolved = resolved
        self.first = 0
        self.losses: list[float] = []  # since the last line of metrics

    def _teacher(self, unet: UNet2DModel) -> DiffusionTeacher:
        return DiffusionTeacher(unet, self.spec, name="in training", licence="-")

    def loop(self) -> None:
        """Trains from the last checkpoint to the last step."""
        resume = self.run.open(self.resolved)
        if resume is not None:
            self._restore(resume)
        stream = data.batches(
            self.images, batch_size=self.batch, seed=self.config.seed, first_step=self.first,
            last_step=self.steps, flip=self.config.flip, workers=self.config.workers,
        )  # fmt: skip
        progress = Progress(self.steps, self.first, self.batch, "train-teacher")
        with Signals() as signals:
            step = self.first
            while step < self.steps:
                begin = time.perf_counter()
                images = next(stream).images.to(self.device, non_blocking=True)
                progress.wait(time.perf_counter() - begin)
                self.losses.append(self._step(step, images))
                step += 1
                progress.update(step, f"loss {self.losses[-1]:.4f}")
                if step % 50 == 0 or step == self.steps:
                    mean = sum(self.losses) / len(self.losses)
                    self.run.append(
                        "metrics.jsonl", {"step": step, "images_seen": step * self.batch, "loss": mean}
                    )
                    self.run.append("timing.jsonl", {"step": step, **progress.rates()})
                    self.losses.clear()
                if step % self.config.sample_every == 0 or step == self.steps:
                    self._validate(step)
                if step % self.config.save_every == 0 or step == self.steps or signals.number:
                    self._save(step)
                if signals.number and step < self.steps:
                    progress.close()
                    print(f"Stopped at step {step}: saved. The same command resumes.", flush=True)
                    raise SystemExit(128 + signals.number)
        progress.close()

    def _step(self, step: int, images: Tensor) -> float:
        generator = data.step_generator(self.config.seed, step, "diffusion")
        x0 = self.eyes.to_network(images)
        t = torch.randint(self.spec.steps, (len(x0),), generator=generator).to(self.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        with autocast(self.device, self.config.precision):
            loss = epsilon_loss(self.unet, x0, t, noise, self.eyes.alpha_bar).mean()
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss is {loss.item()} at step {step}.",
                f"Lower --lr (now {self.lr:g}), or use --precision float32; the last checkpoint is kept.",
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        warmup = min(500, self.steps // 10)
        lr = optim.lr_at(step, total=self.steps, warmup=warmup, peak=self.lr, final=0.02 * self.lr)
        optim.set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.ema.update(self.unet)
        return loss.item()

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """The EMA network's loss at fixed timesteps and noise, and a sheet of 64 samples."""
        self.eyes.unet.load_state_dict(self.ema.tensors)
        generator = torch.Generator().manual_seed(0)
        count = min(64, len(self.images))
        pick = torch.randperm(len(self.images), generator=generator)[:count]
        x0 = self.eyes.to_network((self.images.get(pick).float() / 255).to(self.device))
        row: dict[str, Any] = {"step": step, "images_seen": step * self.batch}
        with autocast(self.device, self.config.precision):
            for t in (50, 100, 250, 500):
                noise = torch.randn(x0.shape, generator=generator).to(x0)
                times = torch.full((count,), t, device=self.device)
                row[f"loss/t{t}"] = (
                    epsilon_loss(self.eyes.unet, x0, times, noise, self.eyes.alpha_bar).mean().item()
                )
            sheet = self.eyes.generate(64, generator=torch.Generator(self.device).manual_seed(0))
        self.run.append("metrics.jsonl", row)
        picture = to_pil_image(make_grid(sheet.cpu(), nrow=8, padding=2, pad_value=1.0))
        checkpoint.atomic_write(self.run.path / "samples.png", lambda p: picture.save(p, format="PNG"))

    def _save(self, step: int) -> None:
        tensors, scalars = checkpoint.pack_optimizer(self.optimizer)
        tensors |= {f"unet/{k}": v for k, v in self.unet.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.tensors.items()}
        meta = {"kind": "train-teacher", "step": step, "optimizer": scalars, "losses": self.losses}
        meta["ema_updates"] = self.ema.updates
        checkpoint.save(checkpoint.checkpoint_path(self.run.path, step), tensors, meta)
        checkpoint.prune(self.run.path, keep=2)

    def _restore(self, path: Path) -> None:
        tensors, meta = checkpoint.load(path)
        unet = {k.removeprefix("unet/"): v for k, v in tensors.items() if k.startswith("unet/")}
        checkpoint.load_exactly(self.unet, unet, path)
        for key, value in self.ema.tensors.items():
            value.copy_(tensors[f"ema/{key}"])
        self.ema.updates = meta["ema_updates"]
        checkpoint.unpack_optimizer(self.optimizer, tensors, meta["optimizer"])
        self.first, self.losses = meta["step"], meta["losses"]
        for name in ("metrics.jsonl", "timing.jsonl"):
            self.run.rewind(name, self.first)
        print(f"Resuming from step {self.first} ({json.dumps(path.name)}).", flush=True)
