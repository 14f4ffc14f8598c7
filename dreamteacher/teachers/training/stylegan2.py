"""`train-teacher` of a StyleGAN2 on the user's own images, as the authors did for BDD100K."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.data import seeds
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.distributed.group import all_gather, all_reduce_mean, average_gradients
from dreamteacher.runtime.distributed.world import Draws, randn
from dreamteacher.teachers.stylegan2.teacher import Generator, StyleGan2Spec
from dreamteacher.teachers.training.augment import Adaptation, augment
from dreamteacher.teachers.training.discriminator import Discriminator
from dreamteacher.teachers.training.objective import Objective, Preset, TrainingPlan

R1_EVERY = 16  # steps between gradient penalties, so much heavier (Karras et al. 2020, section 3.1)
BETAS = (0.0, 0.99)
W_AVERAGE = 0.995  # decay of the mean style, per step


@dataclass(frozen=True, kw_only=True)
class StyleGan2Preset(Preset):
    """A StyleGAN2 and how to train it.

    Args:
        channels: width of each block, coarse to fine; z_dim, w_dim, mapping_layers: of the mapping network.
        gamma: weight of the R1 gradient penalty.
        half_life: images after which a weight counts half in the averaged generator.
        ramp: the half-life is at most this share of the images seen (None: no ramp-up).
        ada_images: real images over which augmentation may go from never to always, where it is switched on.
    """

    channels: tuple[int, ...]
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    gamma: float
    half_life: float = 10_000
    ramp: float | None = None
    ada_images: int = 500_000

    @property
    def unit(self) -> int:
        return 2 ** (len(self.channels) - 1)

    def line(self) -> str:
        return f"StyleGAN2, channels {self.channels}, gamma {self.gamma:g}"


_PAPER = StyleGan2Preset(
    channels=(512, 512, 512, 512, 512, 256, 128, 64), size=(512, 1024), batch_size=32, lr=2e-3,
    gamma=10.0, steps=780_000,
)  # fmt: skip

PRESETS: dict[str, StyleGan2Preset] = {
    # About an hour on one CPU core. Six blocks from 2 x 2, so that strides 4, 8, 16 and 32 all exist.
    "stylegan2-cpu-64": StyleGan2Preset(
        channels=(128, 128, 128, 64, 48, 32), z_dim=128, w_dim=128, mapping_layers=4, size=(64, 64),
        batch_size=32, lr=2.5e-3, gamma=0.3, half_life=5_000, ramp=0.05, ada_images=100_000, steps=4800,
    ),
    # StyleGAN2's configuration for 256 px in the ADA paper: 25 M images.
    "stylegan2-256": replace(
        _PAPER, channels=(512, 512, 512, 512, 256, 128, 64), size=(256, 256), batch_size=64, lr=2.5e-3,
        gamma=1.0, half_life=20_000, steps=390_000,
    ),
    # Table 16 of the paper: 512 x 1024, batch 32, gamma 10, no ADA, path-length term or style mixing. Widths
    # and 25 M images are StyleGAN2's own.
    "stylegan2-bdd100k": _PAPER,
}  # fmt: skip


def network_spec(preset: StyleGan2Preset, size: tuple[int, int], image_channels: int) -> StyleGan2Spec:
    """The StyleGan2Spec of a preset at a size."""
    return StyleGan2Spec(
        size=size, channels=preset.channels, z_dim=preset.z_dim, w_dim=preset.w_dim,
        mapping_layers=preset.mapping_layers, image_channels=image_channels,
    )  # fmt: skip


def build(spec: StyleGan2Spec, seed: int) -> tuple[Generator, Discriminator]:
    """Fresh networks whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generator(spec), Discriminator(spec)


def parameter_count(spec: StyleGan2Spec) -> int:
    """Trained numbers of both networks; nothing is allocated."""
    with torch.device("meta"):
        networks = build(spec, 0)
    return sum(p.numel() for network in networks for p in network.parameters())


def generator_loss(fake: Tensor) -> Tensor:
    """-log sigmoid of the logits (N,) of made images (Goodfellow et al. 2014)."""
    return F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(real) - log(1 - sigmoid(fake)), of logits (N,): the logistic loss."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Squared length of the gradient of each image's logit in its pixels, averaged over images.

    Source: Mescheder et al. 2018 (arXiv 1801.04406), eq. 9 without gamma / 2. Call it outside autocast: a second
    derivative in bfloat16 would be mostly rounding.
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def lazy_adam(parameters: list[nn.Parameter], lr: float, every: int | None) -> torch.optim.Adam:
    """Adam for a network that takes one more step, of a regulariser, every `every` steps (None: never).

    Source: Karras et al. 2020 (arXiv 1912.04958), appendix B: lr and exponents of the betas times
    c = every / (every + 1).
    """
    c = 1.0 if every is None else every / (every + 1)
    betas = (BETAS[0] ** c, BETAS[1] ** c)
    return torch.optim.Adam(parameters, lr=lr * c, betas=betas, eps=1e-8, fused=True)


def ema_weight(seen: int, batch: int, half_life: float, ramp: float | None) -> float:
    """How much of the averaged generator a step keeps, after `seen` images.

    Source: StyleGAN2: 0.5^(batch / half_life); the ramp-up is that of its ADA variant.
    """
    life = half_life if ramp is None else min(half_life, seen * ramp)
    return 0.5 ** (batch / max(life, 1e-8))


class StyleGan2Objective(Objective):
    """Generator, discriminator, the averaged generator, and the steps between them."""

    def __init__(
        self, preset: StyleGan2Preset, spec: StyleGan2Spec, plan: TrainingPlan, *, gamma: float, ada: float | None
    ) -> None:  # fmt: skip
        self.preset, self.spec, self.plan, self.gamma = preset, spec, plan, gamma
        device = plan.device
        self.g, self.d = build(spec, plan.seed)
        self.mean = build(spec, plan.seed)[0].requires_grad_(False)
        for network in (self.g, self.d, self.mean):
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.g_optimizer = lazy_adam(list(self.g.parameters()), plan.lr, None)
        self.d_optimizer = lazy_adam(list(self.d.parameters()), plan.lr, R1_EVERY)
        self.ada = None if ada is None else Adaptation(ada, preset.ada_images, *torch.zeros(3, device=device))

    def step(self, step: int, images: Tensor) -> dict[str, Tensor]:
        real = self._to_network(images)
        with self.update():  # three updates, one after the other
            seen = self._step_generator(step)
            seen |= self._step_discriminator(step, real)
            if step % R1_EVERY == 0:
                seen |= self._penalise(step, real)
            self._average(step)
        if self.ada is not None:
            seen["ada_p"] = self.ada.p.clone()
        return seen

    def _to_network(self, images: Tensor) -> Tensor:
        x = images.mean(1, keepdim=True) if self.spec.image_channels == 1 else images
        return (x * 2 - 1).contiguous(memory_format=torch.channels_last)

    def _draws(self, step: int, stream: str) -> torch.Generator:
        """Random numbers of a step for this process's rows."""
        return seeds.device_generator(self.plan.seed, step, stream, self.plan.device, self.plan.world)

    def _make(self, step: int, stream: str) -> Tensor:
        """A batch of images by the generator in training, which depends on seed, step and stream alone."""
        plan = self.plan
        source = self._draws(step, f"latents/{stream}")
        z = randn((plan.world.of(plan.batch_size), self.spec.z_dim), source, device=plan.device)
        noise = Draws(plan.device, source.initial_seed(), plan.world)
        ws = self.g.mapping(z)
        if stream == "g":
            mean = all_reduce_mean(ws[:, 0].detach().mean(0).to(self.g.mapping.w_avg.dtype))
            self.g.mapping.w_avg.lerp_(mean, 1 - W_AVERAGE)
        return self.g.synthesis(ws, noise="random", generator=noise)[0]

    def _disturb(self, images: Tensor, step: int, stream: str) -> Tensor:
        """What the discriminator sees of images."""
        if self.ada is None:
            return images
        source = self._draws(step, f"augment/{stream}")
        return augment(images, self.ada.p, source).contiguous(memory_format=torch.channels_last)

    def _step_generator(self, step: int) -> dict[str, Tensor]:
        self.d.requires_grad_(False)
        with autocast(self.plan.device, self.plan.precision):
            logits = self.d(self._disturb(self._make(step, "g"), step, "g"))
        loss = generator_loss(logits)
        norm = self._descend(self.g, self.g_optimizer, loss)
        self.d.requires_grad_(True)
        return {"loss/g": loss.detach(), "grad_norm/g": norm}

    def _step_discriminator(self, step: int, real: Tensor) -> dict[str, Tensor]:
        with autocast(self.plan.device, self.plan.precision):
            with torch.no_grad():
                fake = self._disturb(self._make(step, "d"), step, "fake")
            fake_logits = self.d(fake)
            logits = self.d(self._disturb(real, step, "real"))
        loss = discriminator_loss(logits, fake_logits)
        norm = self._descend(self.d, self.d_optimizer, loss)
        if self.ada is not None:
            self.ada.observe(step, all_gather(logits.detach()))
        sign = logits.detach().sign().mean()
        return {"loss/d": loss.detach(), "grad_norm/d": norm, "real_sign": sign}

    def _penalise(self, step: int, real: Tensor) -> dict[str, Tensor]:
        """The gradient penalty, at the images as the discriminator sees them; a step of its own."""
        penalty = r1_penalty(self.d, self._disturb(real, step, "r1"))
        norm = self._descend(self.d, self.d_optimizer, penalty * (self.gamma / 2 * R1_EVERY))
        return {"r1": penalty.detach(), "grad_norm/r1": norm}

    def _descend(self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        """A step of a network against the gradient of a loss; returns the gradient's length."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(network.parameters())
        norm = nn.utils.clip_grad_norm_(network.parameters(), math.inf)
        optimizer.step()
        return norm

    @torch.no_grad()
    def _average(self, step: int) -> None:
        batch, preset = self.plan.batch_size, self.preset
        keep = ema_weight(step * batch, batch, preset.half_life, preset.ramp)
        torch._foreach_lerp_(list(self.mean.parameters()), list(self.g.parameters()), 1 - keep)
        for mine, now in zip(self.mean.buffers(), self.g.buffers(), strict=True):
            mine.copy_(now)

    @torch.no_grad()
    def validate(self, images: Tensor, generator: torch.Generator) -> tuple[dict[str, float], Tensor]:
        """Mean logits of undisturbed real images and of samples: how far the two are told apart."""
        device = self.plan.device
        z = torch.randn(64, self.spec.z_dim, generator=generator).to(device)
        with autocast(device, self.plan.precision):
            made = self.mean.synthesis(self.mean.mapping(z), noise="const")[0]
            row = {
                "logit/real": self.d(self._to_network(images)).mean().item(),
                "logit/fake": self.d(made).mean().item(),
            }
        return row, ((made.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    def _trained(self) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
        networks = {"generator": self.g, "discriminator": self.d, "ema": self.mean}
        return networks, {"g": self.g_optimizer, "d": self.d_optimizer}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        networks, optimizers = self._trained()
        for name, optimizer in optimizers.items():
            packed, meta[name] = checkpoint.pack_optimizer(optimizer)
            tensors |= {f"{name}/{k}": v for k, v in packed.items()}
        for name, network in networks.items():
            tensors |= {f"{name}/{k}": v for k, v in network.state_dict().items()}
        if self.ada is not None:
            tensors |= {f"ada/{k}": v for k, v in self.ada.tensors().items()}
        return tensors, meta

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
        networks, optimizers = self._trained()
        for name, network in networks.items():
            checkpoint.load_exactly(network, checkpoint.under(f"{name}/", tensors), path)
        for name, optimizer in optimizers.items():
            checkpoint.unpack_optimizer(optimizer, checkpoint.under(f"{name}/", tensors), meta[name])
        if self.ada is not None:
            for key, value in self.ada.tensors().items():
                value.copy_(tensors[f"ada/{key}"])

    def weights(self) -> dict[str, Tensor]:
        return self.mean.state_dict()

    def facts(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "ada": None if self.ada is None else self.ada.target}
