"""Steps of a pretraining without a run folder, for benchmarks and tests: the body of the loop in distill/pretrain.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.dataset import FeatureBatch, Part, PartStream
from dreamteacher.distill.network import build_network, spread
from dreamteacher.distill.step import Distillation, loss_weights
from dreamteacher.losses import total_loss
from dreamteacher.models.interpreter import Interpreter
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import Student
from dreamteacher.runtime import optim
from dreamteacher.runtime.distributed.ddp import gradients_stay
from dreamteacher.runtime.distributed.world import ALONE, World
from dreamteacher.runtime.meter import Meter


class Stepper:
    """One pretraining in memory.

    Args:
        student, regressor: on the device that they are trained on.
        steps: in all, for the schedule.
    """

    def __init__(
        self, config: PretrainConfig, student: Student, regressor: FeatureRegressor, steps: int,
        interpreter: Interpreter | None = None, world: World = ALONE,
    ) -> None:  # fmt: skip
        self.config, self.steps = config, steps
        self.device = next(student.parameters()).device
        self.network = build_network(config, student, regressor, interpreter, world)
        groups = optim.parameter_groups([self.network], config.weight_decay)
        self.optimizer = optim.build_optimizer(config.optimizer, groups, config.lr, config.betas)
        self.average = optim.Ema(self.network, config.ema) if config.ema else None
        self.distillation = Distillation(
            config, self.network, [spec.name for spec in regressor.teacher_specs],
            spread=spread(self.network, self.device, world), interpreter=interpreter,
        )  # fmt: skip
        self.weights = loss_weights(config)
        self.warmup = round(steps * config.warmup_epochs / config.epochs)
        self.meter = Meter()

    def step(self, step: int, stream: Iterator[FeatureBatch]) -> Part:
        """One update (number `step`, from 0) on what comes next; returns the last part."""
        part = self.gradients(step, stream)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip or float("inf"))
        self.meter.watch(step, {"gradient": norm})
        self.meter.add(step, {"grad_norm": norm})
        lr = optim.lr_at(step, total=self.steps, warmup=self.warmup, peak=self.config.lr)
        optim.set_lr(self.optimizer, lr)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network)
        return part

    def gradients(self, step: int, stream: Iterator[FeatureBatch]) -> Part:
        """The gradients of what comes next, added up part by part; returns the last part."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        batches = PartStream(lambda first: stream, self.config.accumulate)
        for part in batches.of(step):
            with gradients_stay(self.distillation.spread, not part.last):
                losses = self.distillation.losses(part)
                total = total_loss(losses, self.weights)
                (total / self.config.accumulate).backward()
            self.meter.watch(step, self.distillation.watched(part) | {"loss": total})
            self.meter.add(step, losses | {"loss": total}, self.config.accumulate)
        return part


def wait(device: torch.device) -> None:
    """Waits for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize()
