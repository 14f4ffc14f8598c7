"""A compiled step equals the plain one; what cannot be compiled runs as it is."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.losses import whitened_mse
from dreamteacher.runtime import compile
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from tests.distill.test_gpu_path import generator

CPU = torch.device("cpu")


@pytest.fixture
def config(image_folder: Path, tiny_teacher: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        images=image_folder, out=tmp_path / "run", teacher=str(tiny_teacher), student="test_resnet",
        width=8, batch_size=8, epochs=3, warmup_epochs=0, lr=2e-3, device="cpu", precision="float32",
        log_every=1, save_every=2, probe_every=0,
    )  # fmt: skip


# torch's own compiler looks at .grad of tensors that are no leaves.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@compiles
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_loss_equals_the_plain_one_with_its_gradients(monkeypatch):
    """Down to the machine code."""
    torch._dynamo.reset()
    student, target = (torch.randn(2, 3, 4, 4, generator=generator()) * k for k in (1, 2))
    found = []
    for function in (whitened_mse, compile.compiled(whitened_mse, strict=True)):
        x = student.clone().requires_grad_()
        loss = function([x], [target])[0]
        loss.backward()
        found += [torch.stack([loss.detach(), x.grad.norm()]), x.grad]
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[3], found[1], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_compiled_runs_as_it_is_or_is_an_error(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(compile, "BACKEND", broken)
    soft, strict = (compile.compiled(lambda x: x + 1, strict=s) for s in (False, True))
    assert [soft(torch.ones(1)).item() for _ in range(2)] == [2.0, 2.0]
    assert capsys.readouterr().out.count("Not compiled") == 1
    with pytest.raises(UserError, match="no compiler found"):
        strict(torch.ones(1))


@compiles
@pytest.mark.skipif(
    not hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"), reason="torch is older"
)
def test_a_backward_pass_that_cannot_be_compiled_has_the_same_way_back(monkeypatch, capsys):
    from functorch.compile import nop
    from torch._dynamo.backends.common import aot_autograd

    def broken(graph, inputs):
        raise RuntimeError("no kernel for this gradient")

    monkeypatch.setattr(compile, "BACKEND", aot_autograd(fw_compiler=nop, bw_compiler=broken))
    torch._dynamo.reset()
    soft, strict = (compile.compiled(lambda x: (x * x).sum(), strict=s) for s in (False, True))
    x = torch.ones(2, requires_grad=True)
    soft(x).backward()
    assert x.grad.tolist() == [2, 2]
    assert capsys.readouterr().out.count("Not compiled") == 1
    with pytest.raises(UserError, match="no kernel for this gradient"):
        strict(x)
    assert not torch._functorch.config.force_non_lazy_backward_lowering


def test_auto_compiles_long_runs_on_a_gpu_with_triton_alone(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    assert compile.wants_compile("auto", cuda, 1000)
    assert not compile.wants_compile("auto", cuda, 999)
    assert not compile.wants_compile("auto", CPU, 10**6)
    assert not compile.wants_compile("auto", cuda, 1000, whole=False)
    assert compile.wants_compile("on", CPU, 1)
    assert compile.wants_compile("on", cuda, 1, whole=False)
    assert not compile.wants_compile("off", cuda, 10**6)
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: None)
    assert not compile.wants_compile("auto", cuda, 10**6)


@compiles
@pytest.mark.slow
def test_compiled_pretraining_equals_the_plain_one_and_compiles_once(config, monkeypatch):
    """Teacher (in parts), student, regressor and losses, through all of the compiler but its kernels.

    At a small rate: AdamW's first update is one of `lr` in the direction of each gradient, also of those that are
    nothing but rounding.
    """
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    config = dataclasses.replace(config, epochs=1, lr=1e-5)
    plain = pretrain(dataclasses.replace(config, out=config.out.with_name("plain"), compile="off"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast = pretrain(dataclasses.replace(config, compile="on", teacher_batch=4))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    rows = [read_rows(run / "metrics.jsonl") for run in (plain, fast)]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
