"""What makes one machine fast, checked without a GPU: parts, memory, compiling, copies, precision, no waiting."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set
from dreamteacher.distill import dataset
from dreamteacher.distill import plan as distill_plan
from dreamteacher.distill import step as distill_step
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.runtime import checkpoint, memory, prefetch
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.diffusion import teacher as diffusion
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher, build_unet
from dreamteacher.teachers.in_parts import InParts, RowsOfDraws
from dreamteacher.teachers.registry import load_teacher
from tests.builders.steps import Stepper
from tests.builders.teachers import TINY, build
from tests.runtime.distributed.worker import in_float64

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
        teacher.cast_weights(torch.bfloat16)
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


class OnGpu(torch.Generator):
    """A CPU's, which says that it is a GPU's."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("most", "count", "generator", "parts"),
    [
        (4, 9, torch.Generator(), [3, 3, 3]), (4, 6, torch.Generator(), [3, 3]), (4, 8, torch.Generator(), [4, 4]),
        (0, 40, torch.Generator(), [40]), (0, 40, OnGpu(), [20, 20]), (0, 32, OnGpu(), [32]), (64, 40, OnGpu(), [40]),
        (4, 7, torch.Generator(), [4, 3]),
    ],
)  # fmt: skip
def test_parts_are_equal_and_small_on_a_gpu(most, count, generator, parts):
    """One size compiles once."""
    images, teacher = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)), Hungry(99)
    found = InParts(teacher, most).encode(images, generator=generator.manual_seed(5))
    assert teacher.seen == parts
    assert torch.equal(found[0], Hungry(99).encode(images, generator=torch.Generator().manual_seed(5))[0])


@pytest.mark.parametrize(
    "message", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                "Triton Error [CUDA]: out of memory"],
)  # fmt: skip
def test_libraries_that_run_out_of_memory_in_their_own_words(message, monkeypatch, config):
    teacher, encode = Hungry(99), Hungry.encode

    def fail(self, images, *, generator):
        maps = encode(self, images, generator=generator)
        if len(images) > 2:
            raise RuntimeError(message)
        return maps

    monkeypatch.setattr(Hungry, "encode", fail)
    InParts(teacher).encode(torch.rand(4, 3, 64, 64), generator=generator())
    assert teacher.seen == [4, 2, 2]
    trained, stream = small_training(Hungry(99))
    forward = trained.distillation.forward

    def forward_fails(images, sizes):
        if len(images) > 4:
            raise RuntimeError(message)
        return forward(images, sizes)

    trained.distillation.forward = forward_fails
    with pytest.raises(UserError, match=r"Step 1: .*\nUse less"), memory.needed("Step 1", "Use less."):
        trained.step(0, stream)


def test_other_errors_of_torch_are_no_lack_of_memory(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(Hungry, "encode", fail)
    with pytest.raises(RuntimeError, match="must match"):
        InParts(Hungry(1)).encode(torch.rand(4, 3, 64, 64), generator=generator())
    trained, _ = small_training(Hungry(1))
    with pytest.raises(RuntimeError, match="must match"):
        trained.step(0, iter(fail, None))


# --- a step that runs out of memory ---------------------------------------------------------------------------


def hungry_student(monkeypatch: pytest.MonkeyPatch, most: int, passes: int = 0) -> list[int]:
    """Students run out of memory in training above `most` images, deep inside: after BatchNorm has seen them.

    The first `passes` are let through.
    """
    failures: list[int] = []
    seen: list[int] = []

    def make(*args, **kwargs):
        student = create_student(*args, **kwargs)

        def check(module, inputs):
            seen.extend([len(inputs[0])] if module.training else [])
            if module.training and len(inputs[0]) > most and len(seen) > passes:
                failures.append(len(inputs[0]))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

        last = [m for m in student.model.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        last.register_forward_pre_hook(check)
        return student

    monkeypatch.setattr(distill_plan, "create_student", make)
    return failures


def test_a_step_out_of_memory_says_which_accumulate_fits_and_a_run_resumes_with_it(config, monkeypatch):
    failures = hungry_student(monkeypatch, 4, passes=2)  # at the third step, behind a checkpoint
    with pytest.raises(
        UserError, match=r"Step 3 runs out of memory: CUDA.*\nUse --accumulate 2 \(.*--precision bfloat16"
    ) as caught:
        pretrain(config)
    assert len(str(caught.value).splitlines()) == 2
    assert failures == [8]
    before = read_rows(config.out / "metrics.jsonl")
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 2)
    pretrain(dataclasses.replace(config, accumulate=2, teacher_batch=4))
    assert failures == [8]
    rows = read_rows(config.out / "metrics.jsonl")
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows] == list(range(1, 7))


def test_a_step_that_cannot_be_made_smaller_says_what_to_do(config, monkeypatch):
    hungry_student(monkeypatch, 1)
    with pytest.raises(UserError, match=r"Step 1 runs out of memory: .*\nUse --precision bfloat16, or"):
        pretrain(dataclasses.replace(config, accumulate=4))


def test_an_optimizer_without_memory_is_an_error_of_three_lines(config, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(UserError, match="Step 1 runs out of memory: CUDA out of memory") as caught:
        pretrain(config)
    assert len(str(caught.value).splitlines()) <= 3


# --- what lives how long ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoded", "synthesized", "both"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_maps_are_gone_when_the_teacher_makes_the_next(kind, accumulate, config, monkeypatch):
    """Images too: nothing of a part is left, whether the step was logged or not."""
    alive: list[weakref.ref[torch.Tensor]] = []
    found: list[int] = []

    def watched(method):
        def act(self, *args, **kwargs):
            if not (kind == "both" and method is sample):  # the second half of a batch
                found.append(sum(ref() is not None for ref in alive))
                alive.clear()
            made = method(self, *args, **kwargs)
            alive.extend(weakref.ref(t) for t in ([made[0], *made[1]] if method is sample else made))
            return made

        return act

    encode, sample = DiffusionTeacher.encode, DiffusionTeacher.sample
    monkeypatch.setattr(DiffusionTeacher, "encode", watched(encode))
    monkeypatch.setattr(DiffusionTeacher, "sample", watched(sample))
    monkeypatch.setitem(DiffusionTeacher.__init__.__kwdefaults__, "sampling_steps", 2)
    made = dataset.FeatureBatch.__new__

    def batch(cls, *args, **kwargs):
        new = made(cls, *args, **kwargs)
        alive.extend(weakref.ref(t) for t in [new.images, *new.maps])
        return new

    monkeypatch.setattr(dataset.FeatureBatch, "__new__", batch)
    pretrain(dataclasses.replace(config, dataset=kind, samples=16, accumulate=accumulate, log_every=2))
    assert len(found) == 6 * accumulate
    assert set(found) == {0}


@in_float64()
def test_gradients_of_parts_add_up_to_those_of_the_batch(tiny_teacher):
    """Without BatchNorm, which sees parts. In float64, as sums cancel."""
    found = []
    for parts in (1, 4):
        trained, stream = small_training(tiny_teacher)
        whole = next(stream)
        rows = [slice(i, None, parts) for i in range(parts)]
        stream = iter(
            [dataset.FeatureBatch(whole.images[r], [m[r] for m in whole.maps], 0.0, 0) for r in rows]
        )
        for module in [*trained.network.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
        trained.config = dataclasses.replace(trained.config, accumulate=parts)
        trained.gradients(0, stream)
        sums = torch.stack(list(trained.meter.sums.values()))
        found.append([p.grad for p in trained.network.parameters() if p.grad is not None] + [sums])
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def small_training(teacher: Path | Teacher, precision: str = "float32") -> tuple[Stepper, dataset.Stream]:
    """One of 8 random images of 64 px, and its stream."""
    config = PretrainConfig(
        out=Path("-"), student="test_resnet", width=8, batch_size=8, precision=precision, device="cpu"
    )
    loaded = load_teacher(str(teacher)) if isinstance(teacher, Path) else teacher
    student = create_student("test_resnet")
    regressor = FeatureRegressor(student.specs, loaded.specs, width=8)
    return Stepper(config, student, regressor, steps=100), small_stream(InParts(loaded), precision)


def small_stream(
    teacher: InParts,
    precision: str = "float32",
    device: torch.device = CPU,
    size: tuple[int, int] = (64, 64),
) -> dataset.Stream:
    pixels = torch.randint(256, (16, 3, *size), dtype=torch.uint8, generator=generator())
    images = image_set.ImageSet(
        folder=Path(), paths=[Path(str(i)) for i in range(16)], size=size, labels=None, classes=(),
        cache=pixels, bad=(),
    )  # fmt: skip
    batches = data_batches.batches(
        images, batch_size=8, seed=0, first_step=0, last_step=9, flip=True, raw=True
    )
    return dataset.encoded(teacher, batches, seed=0, device=device, precision=precision)


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
    data_batches._epoch_order.cache_clear()


def step_on_fake_gpu(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Two whole steps on tensors that say they are on a GPU: devices, precision and copies as they would be there.

    Returns the dtypes that came out of the teacher's norms.
    """
    cuda = torch.device("cuda")
    for module in (dataset, distill_step):
        monkeypatch.setattr(module, "autocast", cuda_autocast)
    monkeypatch.setattr(dataset, "device_generator", lambda *_: torch.Generator().manual_seed(0))
    monkeypatch.setattr(data_batches, "flip_images", lambda images, _: images)  # on the host, before the copy
    here = functools.partial(prefetch.prefetch, threaded=False)  # what watches, watches one thread
    monkeypatch.setattr(dataset, "prefetch", lambda items, work, *, threaded: here(items, work))
    monkeypatch.setattr(prefetch.Copies, "__init__", lambda self, device: None)
    monkeypatch.setattr(
        prefetch.Copies, "send",
        lambda self, tensors: prefetch.Sent([t.to(cuda, non_blocking=True) for t in tensors], None),
    )  # fmt: skip
    teacher.cast_weights(torch.bfloat16)
    trained, _ = small_training(teacher)

    def backward(loss):  # autograd's engine asks the driver for its GPUs
        for p in trained.network.parameters():
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
        on_fake_gpu(trained.network)
        config = dataclasses.replace(trained.config, ema=0.9, clip=1.0)
        there = Stepper(config, trained.network.student, trained.network.regressor, steps=100)
        monkeypatch.setattr(there.optimizer, "step", lambda: None)
        if "encode" in teacher.modes:
            stream = small_stream(InParts(teacher), device=cuda, size=teacher.size)
        else:
            common = {"seed": 0, "device": cuda, "precision": "float32"}
            stream = dataset.synthesized(InParts(teacher), batch_size=8, first_step=0, last_step=9, **common)
        there.step(0, stream)  # fixed noise is made once, for all steps
        with NoWaiting():
            part = there.step(1, stream)
    assert {
        m.device.type for m in [part.batch.images, *part.maps, *part.batch.maps, *there.meter.sums.values()]
    } == {"cuda"}
    assert {m.dtype for m in part.maps} == {torch.bfloat16}
    return seen


@pytest.mark.usefixtures("nothing_is_kept")
@pytest.mark.parametrize("noise", ["stochastic", "fixed"])
def test_a_step_on_a_gpu_never_waits_and_normalises_in_float32(noise, tiny_spec, monkeypatch):
    teacher = DiffusionTeacher(
        build_unet(tiny_spec), tiny_spec, name="t", licence="-", timesteps=(50, 150), noise=noise
    )
    assert step_on_fake_gpu(teacher, monkeypatch) == {torch.float32}


@pytest.mark.usefixtures("nothing_is_kept")
@pytest.mark.parametrize("kind", TINY)
def test_a_step_with_any_family_on_a_gpu_never_waits(kind, tmp_path, monkeypatch):
    teacher = load_teacher(build(kind, tmp_path / "teacher"))
    assert step_on_fake_gpu(teacher, monkeypatch) <= {torch.float32}


def test_the_watcher_sees_what_waits():
    with FakeTensorMode(), NoWaiting():
        x = torch.ones(2, device="cuda")
        for wait in (
            lambda: x.cpu(), lambda: torch.ones(2).to("cuda"), lambda: x[x > 0], lambda: x.copy_(torch.ones(2)),
        ):  # fmt: skip
            with pytest.raises((AssertionError, RuntimeError)):
                wait()
        torch.ones(2).to("cuda", non_blocking=True)


# --- on a GPU ---------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
def test_a_run_on_a_gpu_resumes_up_to_rounding(config):
    """In the precision that the GPU has; torch's backward of pooling and resizing adds there in any order."""
    config = dataclasses.replace(config, device="cuda", precision="auto", epochs=2, ema=0.9)
    whole = pretrain(config)
    resumed = shutil.copytree(whole, config.out.with_name("resumed"))
    checkpoint.checkpoint_path(resumed, 4).unlink()
    (resumed / "backbone.safetensors").unlink()
    pretrain(dataclasses.replace(config, out=resumed))
    rows = [read_rows(run / "metrics.jsonl") for run in (whole, resumed)]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    for a, b in zip(*rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
    states = [checkpoint.load(checkpoint.checkpoint_path(run, 4))[0] for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for key, expected in states[0].items():
        if key.startswith(("network/", "ema/")):
            distance = float((states[1][key].double() - expected.double()).norm())
            assert distance <= 0.05 * max(1.0, float(expected.double().norm())), key


@needs_gpu
def test_a_gpu_that_runs_out_of_memory_says_what_fits(config):
    """A real lack of it: torch may take seven tenths of what the same run took before."""
    config = dataclasses.replace(
        config, device="cuda", student="resnet18", size=(256, 256), width=32, batch_size=16, epochs=2
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pretrain(dataclasses.replace(config, out=config.out.with_name("roomy")))
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / total)
    try:
        with pytest.raises(UserError, match=r"Step 1 runs out of memory: .*\nUse --accumulate 2 "):
            pretrain(config)
        pretrain(dataclasses.replace(config, accumulate=2))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
