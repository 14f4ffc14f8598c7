"""What a GPU would see of `train-teacher`, checked without one: no waiting in a step, its dtype."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dreamteacher.data import batches, image_set, seeds
from dreamteacher.runtime import prefetch
from dreamteacher.runtime.distributed.device import resolve_precision
from dreamteacher.runtime.distributed.world import Draws
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.teachers.training import config as training_config
from dreamteacher.teachers.training import diffusion as training_diffusion
from dreamteacher.teachers.training import stylegan2, train
from dreamteacher.teachers.training.diffusion import DiffusionObjective
from dreamteacher.teachers.training.objective import TrainingPlan
from dreamteacher.teachers.training.stylegan2 import StyleGan2Objective
from tests.distill.test_gpu_path import NoWaiting, cuda_autocast, nothing_is_kept, on_fake_gpu  # noqa: F401 - a fixture
from tests.teachers.training.test_stylegan2 import TINY as TINY_GAN
from tests.teachers.training.test_train import TINY

CUDA = torch.device("cuda")


def objective_of(
    kind: str, plan: TrainingPlan
) -> tuple[DiffusionObjective | StyleGan2Objective, list[nn.Module]]:
    """A tiny one, and its networks."""
    if kind == "diffusion":
        spec = training_diffusion.network_spec(TINY, (64, 64), 1, "linear")
        diffusion = DiffusionObjective(dataclasses.replace(TINY, dropout=0.5), spec, plan)
        return diffusion, [diffusion.unet, diffusion.ema_teacher]
    gan_spec = stylegan2.network_spec(TINY_GAN, (64, 64), 1)
    gan = StyleGan2Objective(TINY_GAN, gan_spec, plan, gamma=0.1, ada=0.6)
    return gan, [gan.g, gan.d, gan.mean]


@pytest.mark.usefixtures("nothing_is_kept")
@pytest.mark.parametrize("kind", ["diffusion", "stylegan2"])
def test_a_step_on_a_gpu_never_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps, with augmentation and penalty, on tensors that say they are on a GPU."""

    def draws(device: torch.device, seed: int, share: object) -> Draws:
        assert device == CUDA
        return Draws("cpu", seed)  # there is no other here

    for module in (seeds, stylegan2):
        monkeypatch.setattr(module, "Draws", draws)
    for module in (training_diffusion, stylegan2):
        monkeypatch.setattr(module, "autocast", cuda_autocast)
    monkeypatch.setattr(training_diffusion, "seeded", lambda *_: contextlib.nullcontext())
    plan = TrainingPlan(
        seed=0, steps=9, batch_size=4, lr=1e-3, device=torch.device("cpu"), precision="bfloat16"
    )
    objective, networks = objective_of(kind, plan)
    objective.plan = dataclasses.replace(plan, device=CUDA)

    def backward(loss: torch.Tensor) -> None:  # autograd's engine asks the driver for its GPUs
        for network in networks:
            for p in network.parameters():
                p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", lambda out, x, **_: (torch.zeros_like(x),))
    optimizers = (
        (objective.g_optimizer, objective.d_optimizer) if kind != "diffusion" else (objective.optimizer,)
    )  # type: ignore[union-attr]
    for optimizer in optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks:
            on_fake_gpu(network)
        if isinstance(objective, DiffusionObjective):
            objective.ema.tensors = {k: torch.empty_like(v) for k, v in objective.unet.state_dict().items()}
        elif objective.ada is not None:
            objective.ada = dataclasses.replace(
                objective.ada, **{k: torch.empty((), device=CUDA) for k in objective.ada.tensors()}
            )
        images = torch.rand(4, 3, 64, 64, device=CUDA)
        with NoWaiting():
            found = {k: v for step in range(4) for k, v in objective.step(step, images).items()}
    assert {v.device for v in found.values()} <= {CUDA, torch.device("cuda", 0)}
    assert {"diffusion": "grad_norm", "stylegan2": "grad_norm/r1"}[kind] in found


def test_the_loop_sends_bytes_beside_the_step(image_folder, tmp_path, monkeypatch) -> None:
    """Each batch is asked for once, in order, as bytes; the step gets it as floats."""
    sent: list[torch.dtype] = []
    send = prefetch.Copies.send

    def watched(self: prefetch.Copies, tensors: list[torch.Tensor]) -> prefetch.Sent:
        sent.extend(t.dtype for t in tensors)
        return send(self, tensors)

    monkeypatch.setattr(prefetch.Copies, "send", watched)
    seen: list[torch.Tensor] = []
    look = SimpleNamespace(
        step=lambda step, images: seen.append(images) or {"loss": torch.ones(())},
        validate=lambda images, generator: ({}, torch.zeros(64, 3, 4, 4)),
        state=lambda: ({"weight": torch.zeros(1)}, {}),
        load_state=None,
    )
    images = image_set.load_images(image_folder, (64, 64))
    plan = TrainingPlan(seed=3, steps=3, batch_size=8, lr=1, device=torch.device("cpu"), precision="float32")
    config = training_config.TrainTeacherConfig(images=image_folder, out=tmp_path, seed=3)
    with contextlib.closing(RunDir(tmp_path / "run")) as run:
        train._train(config, plan, look, images, run, {"config": {}})  # type: ignore[arg-type]
    assert sent == [torch.uint8] * 3
    plain = batches.batches(images, batch_size=8, seed=3, first_step=0, last_step=3, flip=True)
    for got, batch in zip(seen, plain, strict=True):
        assert torch.equal(got, batch.images)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_auto_is_bfloat16_only_where_the_gpu_in_use_has_it(
    major: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where torch emulates it (compute capability below 8), and not because another GPU has it."""
    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major if device == second else 0)
    )  # fmt: skip
    assert resolve_precision(second, "auto") == dtype
    assert resolve_precision(second, "bfloat16") == torch.bfloat16
