"""What makes one machine fast, checked without a GPU: parts, memory, compiling, copies, precision, no waiting."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_families import TINY, build
from test_pretrain import assert_equal, everything
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreamteacher import checkpoint, compiled, data, feature_dataset, prefetch, training
from dreamteacher import pretrain as loop
from dreamteacher.errors import UserError
from dreamteacher.features import FeatureSpec
from dreamteacher.losses import whitened_mse
from dreamteacher.pretrain import PretrainConfig, Training, pretrain
from dreamteacher.regressor import FeatureRegressor
from dreamteacher.rundir import Progress, read_rows
from dreamteacher.students import create_student
from dreamteacher.teachers import diffusion, load_teacher
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.diffusion import DiffusionTeacher, build_unet
from dreamteacher.teachers.in_parts import InParts, RowsOfDraws

CPU = torch.device("cpu")


@pytest.fixture
def config(image_folder: Path, tiny_teacher: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        images=image_folder, out=tmp_path / "run", teacher=str(tiny_teacher), student="test_resnet",
        width=8, batch_size=8, epochs=3, warmup_epochs=0, lr=2e-3, device="cpu", precision="float32",
        log_every=1, save_every=2, probe_every=0,
    )  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def maps_of(teacher: Teacher | InParts, mode: str, size: tuple[int, int], count: int) -> list[torch.Tensor]:
    if mode == "sample":
        images, maps = teacher.sample(count, generator=generator())
        return [images, *maps]
    return teacher.encode(torch.rand(count, 3, *size, generator=generator()), generator=generator())


# --- a teacher in parts, and in half precision --------------------------------------------------------------


@pytest.mark.parametrize("kind", [*TINY, "module"])
def test_parts_of_a_batch_and_kept_half_precision_give_the_same_maps(kind, tmp_path):
    """Of every family: two images at a time as all five; weights kept in bfloat16 as converted in every pass."""
    teacher = load_teacher(build(kind, tmp_path / "teacher"))
    mode = "encode" if "encode" in teacher.modes else "sample"
    whole = maps_of(teacher, mode, teacher.size, 5)
    drawn = generator()
    parts = maps_of(InParts(teacher, 2), mode, teacher.size, 5)
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()
    assert torch.equal(drawn.get_state(), generator().get_state())
    teacher.keep_only(mode)
    with torch.autocast("cpu", torch.bfloat16):
        before = maps_of(teacher, mode, teacher.size, 2)
        teacher.keep_in(torch.bfloat16)
        after = maps_of(teacher, mode, teacher.size, 2)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_rows_of_draws_are_rows_of_the_whole_draw_and_others_are_refused():
    whole, rest = generator(), generator()
    expected = torch.randint(3, 9, (6, 2), generator=whole), torch.rand(6, 4, generator=whole)
    pairs, each = generator(), generator()
    with RowsOfDraws(each, 2, 1, 3):
        assert torch.equal(torch.rand(4, generator=each), torch.rand(6, generator=pairs)[2:6])
    with RowsOfDraws(rest, 2, 3, 6):
        found = torch.randint(3, 9, (2, 2), generator=rest), torch.rand(2, 4, generator=rest)
        other = torch.rand(2, generator=generator())
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[3:5], b)
    assert torch.equal(other, torch.rand(2, generator=generator()))
    assert torch.equal(whole.get_state(), rest.get_state())
    for draw in (
        lambda: torch.randperm(2, generator=rest), lambda: torch.randn(3, 2, generator=rest),
        lambda: torch.empty(2).normal_(generator=rest),
    ):  # fmt: skip
        with pytest.raises(UserError, match="cannot be divided"), RowsOfDraws(rest, 2, 3, 6):
            draw()


class Hungry(Teacher):
    """Runs out of memory above `most` images; its maps are noise, so that equal draws can be seen."""

    name, family, licence, size, multiple = "hungry", "test", "-", (64, 64), 4
    modes = frozenset({"encode"})
    specs = (FeatureSpec("s4", 3, 4),)

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen = most, []

    def encode(self, images, *, generator):
        self.seen.append(len(images))
        noise = torch.randn(images.shape, generator=generator)
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return [nn.functional.avg_pool2d(images + noise, 4)]


def test_a_teacher_that_runs_out_of_memory_sees_half_as_many(capsys):
    images, hungry = torch.rand(7, 3, 64, 64), Hungry(3)
    parts = InParts(hungry)
    found = parts.encode(images, generator=generator())
    assert torch.equal(found[0], Hungry(7).encode(images, generator=generator())[0])
    assert hungry.seen == [7, 4, 2, 2, 2, 1]
    assert "(--teacher-batch 2)" in capsys.readouterr().out
    parts.encode(images, generator=generator())
    assert hungry.seen[6:] == [2, 2, 2, 1]
    with pytest.raises(UserError, match="one image"):
        InParts(Hungry(0)).encode(images, generator=generator())


# --- a step that runs out of memory ---------------------------------------------------------------------------


def hungry_student(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Students run out of memory in training above `most` images, deep inside: after BatchNorm has seen them."""
    failures: list[int] = []

    def make(*args, **kwargs):
        student = create_student(*args, **kwargs)

        def check(module, inputs):
            if module.training and len(inputs[0]) > most:
                failures.append(len(inputs[0]))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

        last = [m for m in student.model.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        last.register_forward_pre_hook(check)
        return student

    monkeypatch.setattr(loop, "create_student", make)
    return failures


def test_a_step_out_of_memory_is_repeated_in_smaller_parts_as_if_it_had_begun_so(config, monkeypatch, capsys):
    init = Training.__init__

    def begun_in_parts(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.split = 4

    with monkeypatch.context() as patch:
        patch.setattr(Training, "__init__", begun_in_parts)
        expected = everything(pretrain(dataclasses.replace(config, out=config.out.with_name("whole"))))
    failures = hungry_student(monkeypatch, 2)
    found = everything(pretrain(config))
    assert failures == [8, 4]
    assert_equal(expected, found)
    said = capsys.readouterr().out
    assert "Out of memory at step 1: repeated, and from now on, as --accumulate 4. BatchNorm sees" in said
    assert {row["accumulate"] for row in read_rows(config.out / "metrics.jsonl")} == {4}


def test_the_parts_in_use_are_restored_when_a_run_resumes(config, monkeypatch):
    failures = hungry_student(monkeypatch, 4)
    config = dataclasses.replace(config, batch_size=16, accumulate=2, epochs=4, ema=0.9)
    whole = everything(pretrain(dataclasses.replace(config, out=config.out.with_name("whole"))))
    assert failures == [8]
    save, stop = Training.save, RuntimeError("stop")

    def save_and_stop(self, step, folder):
        save(self, step, folder)
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", save_and_stop)
        with pytest.raises(RuntimeError, match="stop"):
            pretrain(config)
    assert failures == [8, 8]
    resumed = everything(pretrain(config))
    assert failures == [8, 8], "it tried the large parts again"
    assert_equal(whole, resumed)


def test_a_step_that_cannot_be_made_smaller_says_what_to_do(config, monkeypatch):
    hungry_student(monkeypatch, 1)
    with pytest.raises(UserError, match=r"Step 1 runs out of memory in parts of 2 images"):
        pretrain(config)


@pytest.mark.parametrize("split", [2, 3])
def test_gradients_of_parts_add_up_to_those_of_the_batch(split, tiny_teacher):
    """Without BatchNorm, which sees parts: also when the parts differ in size."""
    found = []
    for parts in (1, split):
        trained, stream = small_training(tiny_teacher)
        for module in [*trained.trained.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
        trained.split = parts
        trained.undo = training.Undo([trained.sums])
        trained._gradients(stream, Progress(1, 0, 8, "test"))
        found.append([p.grad for p in trained.trained.parameters() if p.grad is not None] + [trained.sums])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def small_training(
    teacher: Path | Teacher, precision: str = "float32"
) -> tuple[Training, feature_dataset.Stream]:
    """One of 8 random images of 64 px, and its stream."""
    config = PretrainConfig(
        out=Path("-"), student="test_resnet", width=8, batch_size=8, precision=precision, device="cpu"
    )
    loaded = load_teacher(str(teacher)) if isinstance(teacher, Path) else teacher
    student = create_student("test_resnet")
    regressor = FeatureRegressor(student.specs, loaded.specs, width=8)
    return Training(config, student, regressor, steps=100), small_stream(InParts(loaded), precision)


def small_stream(teacher: InParts, precision: str = "float32", device: torch.device = CPU):
    pixels = torch.randint(256, (16, 3, 64, 64), dtype=torch.uint8, generator=generator())
    images = data.ImageSet(
        folder=Path(), paths=[Path(str(i)) for i in range(16)], size=(64, 64), labels=None, classes=(),
        cache=pixels, bad=(),
    )  # fmt: skip
    batches = data.batches(images, batch_size=8, seed=0, first_step=0, last_step=9, flip=True, raw=True)
    return feature_dataset.encoded(teacher, batches, seed=0, device=device, precision=precision)


# --- compiling --------------------------------------------------------------------------------------------


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
    for function in (whitened_mse, compiled.compiled(whitened_mse, strict=True)):
        x = student.clone().requires_grad_()
        loss = function([x], [target])[0]
        loss.backward()
        found += [torch.stack([loss.detach(), x.grad.norm()]), x.grad]
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[3], found[1], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_compiled_runs_as_it_is_or_is_an_error(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    soft, strict = (compiled.compiled(lambda x: x + 1, strict=s) for s in (False, True))
    assert [soft(torch.ones(1)).item() for _ in range(2)] == [2.0, 2.0]
    assert capsys.readouterr().out.count("Not compiled") == 1
    with pytest.raises(UserError, match="no compiler found"):
        strict(torch.ones(1))


def test_auto_compiles_long_runs_on_a_gpu_with_triton_alone(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    assert compiled.wants_compile("auto", cuda, 1000)
    assert not compiled.wants_compile("auto", cuda, 999)
    assert not compiled.wants_compile("auto", CPU, 10**6)
    assert not compiled.wants_compile("auto", cuda, 1000, whole=False)
    assert compiled.wants_compile("on", CPU, 1)
    assert compiled.wants_compile("on", cuda, 1, whole=False)
    assert not compiled.wants_compile("off", cuda, 10**6)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert not compiled.wants_compile("auto", cuda, 10**6)


@compiles
@pytest.mark.slow
def test_compiled_pretraining_equals_the_plain_one_and_compiles_once(config, monkeypatch):
    """Teacher (in parts), student, regressor and losses, through all of the compiler but its kernels."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    config = dataclasses.replace(config, epochs=1)
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


# --- work that runs ahead -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threaded", [False, True])
def test_ahead_keeps_the_order_and_raises_in_turn(threaded):
    fetched = []

    def items():
        for i in range(4):
            fetched.append(i)
            yield i
        raise UserError("The disk is gone.", "Look for it.")

    stream = prefetch.ahead(items(), lambda i: i * i, threaded=threaded)
    assert next(stream)[0] == 0
    assert next(stream)[0] == 1
    assert [next(stream)[0], next(stream)[0]] == [4, 9]
    with pytest.raises(UserError, match="disk"):
        next(stream)
    unfinished = prefetch.ahead(iter(range(100)), lambda i: i, threaded=threaded)
    next(unfinished)
    unfinished.close()


def test_copies_are_pinned_beside_the_work_and_waited_for_by_the_device_alone(monkeypatch):
    """The calls in their order: what a GPU would do. Nothing makes the host wait."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device=None):
            self.name = "side"

        def record_event(self):
            calls.append(f"event on {self.name}")
            return "event"

        def wait_event(self, event):
            calls.append(f"{self.name} waits for {event}")

    @contextlib.contextmanager
    def within(stream):
        calls.append("begin side")
        yield
        calls.append("end side")

    class Watched(torch.Tensor):
        def pin_memory(self):
            calls.append("pin")
            return self

        def to(self, device, non_blocking=False):
            calls.append(f"copy {device.type} {non_blocking}")
            return self

        def record_stream(self, stream):
            calls.append(f"kept for {stream.name}")

    work = Stream()
    work.name = "work"
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    copies = prefetch.Copies(torch.device("cuda"))
    sent = copies.send([torch.ones(2).as_subclass(Watched)])
    assert calls == ["begin side", "pin", "copy cuda True", "event on side", "end side"]
    calls.clear()
    copies.receive(sent)
    assert calls == ["work waits for event", "kept for work"]


def test_raw_batches_made_floats_on_the_device_are_the_same_bits(image_folder):
    images = data.load_images(image_folder, (64, 64))
    asked = {"batch_size": 4, "seed": 1, "first_step": 0, "last_step": 3, "flip": True}
    for raw, plain in zip(
        data.batches(images, raw=True, **asked), data.batches(images, **asked), strict=True
    ):
        assert raw.images.dtype == torch.uint8
        made = data.to_float(raw.images)
        assert torch.equal(made, plain.images)
        assert made.is_contiguous(memory_format=torch.channels_last)


# --- a step on a GPU that is not there -------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU: reading a value, or copying from or to it other than beside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), f"{name} waits"
        if name in ("_to_copy", "copy_", "lift_fresh_copy") and isinstance(result, torch.Tensor):
            sources = tensors[-1:] if name == "copy_" else tensors[:1]
            for source in sources:
                devices = {source.device.type, result.device.type}
                assert len(devices) == 1 or kwargs.get("non_blocking"), f"{name} between {devices} waits"
        return result


@contextlib.contextmanager
def cuda_autocast(device, precision):
    """torch.autocast switches itself off where there is no GPU; its rules do not need one."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def on_fake_gpu(module: nn.Module) -> None:
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None:
                made = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="cuda")
                owner._parameters[name] = nn.Parameter(made, requires_grad=p.requires_grad)
        for name, b in owner._buffers.items():
            if b is not None:
                owner._buffers[name] = torch.empty_strided(b.shape, b.stride(), dtype=b.dtype, device="cuda")


@pytest.fixture
def nothing_is_kept() -> Iterator[None]:
    """What was made of tensors that are not there must not be met by other tests."""
    yield
    diffusion._fixed_noise.cache_clear()
    data._epoch_order.cache_clear()


@pytest.mark.usefixtures("nothing_is_kept")
@pytest.mark.parametrize("noise", ["stochastic", "fixed"])
def test_a_step_on_a_gpu_never_waits_and_normalises_in_float32(noise, tiny_spec, monkeypatch):
    """The whole step on tensors that say they are on a GPU: devices, precision and copies as they would be there."""
    cuda = torch.device("cuda")
    for module in (feature_dataset, training):
        monkeypatch.setattr(module, "autocast", cuda_autocast)
    monkeypatch.setattr(feature_dataset, "device_generator", lambda *_: torch.Generator().manual_seed(0))
    here = functools.partial(prefetch.ahead, threaded=False)  # what watches, watches one thread
    monkeypatch.setattr(feature_dataset, "ahead", lambda items, work, *, threaded: here(items, work))
    monkeypatch.setattr(prefetch.Copies, "__init__", lambda self, device: None)
    monkeypatch.setattr(
        prefetch.Copies, "send",
        lambda self, tensors: prefetch.Sent([t.to(cuda, non_blocking=True) for t in tensors], None),
    )  # fmt: skip
    teacher = DiffusionTeacher(
        build_unet(tiny_spec), tiny_spec, name="t", licence="-", timesteps=(50, 150), noise=noise
    )
    teacher.keep_in(torch.bfloat16)
    trained, _ = small_training(teacher)

    def backward(loss):  # autograd's engine asks the driver for its GPUs
        for p in trained.trained.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(
        nn.Module, "to", lambda self, *args, **kwargs: self
    )  # all is where and as it shall be
    seen: set[torch.dtype] = set()
    for module in teacher.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_fake_gpu(teacher)
        on_fake_gpu(trained.trained)
        config = dataclasses.replace(trained.config, ema=0.9, clip=1.0)
        there = Training(config, trained.student, trained.regressor, steps=100)
        monkeypatch.setattr(there.optimizer, "step", lambda: None)
        stream = small_stream(InParts(teacher), device=cuda)
        there.step(0, stream, Progress(9, 0, 8, "test"))  # fixed noise is made once, for all steps
        with NoWaiting():
            batch, maps = there.step(1, stream, Progress(9, 0, 8, "test"))
    assert {m.device.type for m in [batch.images, *maps, *batch.maps, there.sums]} == {"cuda"}
    assert {m.dtype for m in maps} == {torch.bfloat16}
    assert seen == {torch.float32}


def test_the_watcher_sees_what_waits():
    with FakeTensorMode(), NoWaiting():
        x = torch.ones(2, device="cuda")
        for wait in (
            lambda: x.cpu(), lambda: torch.ones(2).to("cuda"), lambda: x[x > 0], lambda: x.copy_(torch.ones(2)),
        ):  # fmt: skip
            with pytest.raises((AssertionError, RuntimeError)):
                wait()
        torch.ones(2).to("cuda", non_blocking=True)


def test_a_checkpoint_says_how_it_was_split(config, monkeypatch):
    hungry_student(monkeypatch, 4)
    pretrain(config)
    assert checkpoint.load(checkpoint.latest(config.out))[1]["split"] == 2
