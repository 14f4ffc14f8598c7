"""The one loop: progress, log, checkpoints by steps and minutes, the guard, interruptions, services, the meter."""

from __future__ import annotations

import _thread
import dataclasses
import importlib.util
import itertools
import json
import signal
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dreamteacher.distill import step as distill_step
from dreamteacher.distill.config import PretrainConfig, TrainInterpreterConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.distill.step import TERMS, Seen, Term
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.losses import feature_loss, total_loss
from dreamteacher.runtime import checkpoint, loggers, memory
from dreamteacher.runtime import loop as runtime_loop
from dreamteacher.runtime import meter as runtime_meter
from dreamteacher.runtime.distributed.world import World
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.loop import Loop
from dreamteacher.runtime.meter import Meter
from dreamteacher.runtime.progress import Progress
from dreamteacher.runtime.run_folder import RunDir, read_rows
from dreamteacher.teachers.training.config import TrainTeacherConfig
from tests.builders.runs import assert_equal
from tests.distill.test_pretrain import everything

SETTINGS = {"verb": "toy", "config": {"lr": 0.1}}


class Toy:
    """A line through points, with a BatchNorm whose moments every forward pass changes."""

    def __init__(self) -> None:
        self.network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        nn.init.constant_(self.network[1].weight, 0.5)
        nn.init.zeros_(self.network[1].bias)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return checkpoint.pack({"network": self.network}, self.optimizer, None)

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
        checkpoint.unpack({"network": self.network}, self.optimizer, None, tensors, meta, path)

    def loss(self, step: int) -> Tensor:
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
        return (self.network(x) - x.sum(1, keepdim=True)).square().mean()

    def train(
        self, folder: Path, *, steps: int = 6, happens: Any = lambda where, step: None, **options: Any
    ) -> None:
        """`happens` is called at places within each step, and may raise."""
        run = RunDir(folder)
        try:
            settings: dict[str, Any] = {
                "title": "toy", "steps": steps, "batch": 4, "state": self.state, "restore": self.restore,
                "resume": run.open(SETTINGS), "undo": memory.Undo(list(self.network.buffers())),
            }  # fmt: skip
            with Loop(run, **(settings | options)) as loop:
                for step in loop:
                    loss = self.loss(step)
                    happens("forward", step)
                    self.optimizer.zero_grad()
                    loss.backward()
                    loop.meter.watch(step, {"loss": loss})
                    loop.meter.add(step, {"loss": loss})
                    happens("backward", step)
                    with loop.update():
                        happens("update", step)
                        self.optimizer.step()
                    if loop.due(2):
                        loop.log(lambda means, step=step: (happens("log", step), dict(means))[1])
        finally:
            run.close()


def left(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    last = checkpoint.latest(folder)
    assert last is not None
    return checkpoint.load(last)[0], read_rows(folder / "metrics.jsonl")


def assert_same(a: Path, b: Path) -> None:
    (tensors, rows), (others, other_rows) = left(a), left(b)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in tensors.items())
    assert rows == other_rows


# --- progress, log, checkpoints -----------------------------------------------------------------------------


def test_progress_moves_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    update = Progress.update

    def watched(self: Progress, step: int, said: str = "") -> None:
        seen.append(step)
        update(self, step, said)

    monkeypatch.setattr(Progress, "update", watched)
    Toy().train(tmp_path / "run")
    assert sorted(set(seen)) == [1, 2, 3, 4, 5, 6]
    assert seen == sorted(seen)


def test_lines_are_means_and_have_rates(tmp_path: Path) -> None:
    Toy().train(tmp_path / "run", steps=5)
    single = Toy()
    losses = []
    for step in range(5):
        loss = single.loss(step)
        single.optimizer.zero_grad()
        loss.backward()
        single.optimizer.step()
        losses.append(loss.detach())
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["images_seen"] for row in rows] == [8, 16, 20]
    assert [row["loss"] for row in rows] == [
        float(losses[0] + losses[1]) / 2, float(losses[2] + losses[3]) / 2, float(losses[4]),
    ]  # fmt: skip
    assert [row["step"] for row in read_rows(tmp_path / "run" / "timing.jsonl")] == [2, 4, 5]


def saved_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    steps: list[int] = []
    save = checkpoint.save

    def watched(path: Path, tensors: Any, meta: Any) -> None:
        steps.append(meta["step"])
        save(path, tensors, meta)

    monkeypatch.setattr(checkpoint, "save", watched)
    return steps


@pytest.mark.parametrize(
    ("every", "minutes", "expected"),
    [(4, 0.0, [4, 7]), (0, 1.0, [2, 4, 6, 7]), (3, 1.0, [2, 3, 5, 6, 7]), (0, 0.0, [7]), (0, 100.0, [7])],
)
def test_it_saves_by_steps_and_by_minutes_and_always_at_the_end(
    every: int, minutes: float, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes 31 seconds; a checkpoint, whatever its reason, begins the minutes anew."""
    steps, clock = saved_at(monkeypatch), [0.0]

    def tick(where: str, step: int) -> None:
        clock[0] += 31.0 if where == "update" else 0.0

    monkeypatch.setattr(runtime_loop.time, "monotonic", lambda: clock[0])
    Toy().train(tmp_path / "run", steps=7, happens=tick, save_every=every, save_minutes=minutes)
    assert steps == expected
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_intervals_that_save_nothing_are_refused() -> None:
    runtime_loop.check_saving(0, 5.0)
    runtime_loop.check_saving(5, 0.0)
    for every, minutes in ((0, 0.0), (-1, 5.0), (5, -1.0)):
        with pytest.raises(UserError, match="--save-every"):
            runtime_loop.check_saving(every, minutes)


def test_checkpoints_of_another_version_or_verb_are_refused(tmp_path: Path) -> None:
    Toy().train(tmp_path / "run", steps=2)
    path = checkpoint.latest(tmp_path / "run")
    assert path is not None
    tensors, meta = checkpoint.load(path)
    assert "meter/loss" not in tensors  # nothing is left over after the last line
    checkpoint.save(path, tensors, {k: v for k, v in meta.items() if k != "format"})
    with pytest.raises(UserError, match="written by another version"):
        Toy().train(tmp_path / "run", steps=4)
    checkpoint.save(path, tensors, meta | {"kind": "pretrain"})
    with pytest.raises(UserError, match="is a checkpoint of 'pretrain'"):
        Toy().train(tmp_path / "run", steps=4)


def test_the_sums_between_two_lines_are_saved_by_name(tmp_path: Path) -> None:
    Toy().train(tmp_path / "run", steps=6, keep=9, save_every=3)
    tensors, meta = checkpoint.load(checkpoint.checkpoint_path(tmp_path / "run", 3))
    assert meta["meter"] == {"loss": 1}
    assert tensors["meter/loss"].ndim == 0
    for path in (tmp_path / "run").glob("checkpoint-00000006*"):
        path.unlink()
    Toy().train(tmp_path / "run", steps=6, keep=9, save_every=3)
    Toy().train(tmp_path / "whole", steps=6)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_nothing_is_saved_past_what_is_not_finite(tmp_path: Path) -> None:
    toy = Toy()

    def spoil(where: str, step: int) -> None:
        if (where, step) == ("backward", 4):
            toy.network[1].bias.data.fill_(float("nan"))  # seen in the loss of the next step

    with pytest.raises(
        UserError, match=r"The loss is not finite at step 6\.\nLower.*last checkpoint is from before"
    ):
        toy.train(tmp_path / "run", steps=9, happens=spoil, save_every=2)
    assert checkpoint.latest(tmp_path / "run") == checkpoint.checkpoint_path(tmp_path / "run", 4)


# --- interruptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "saved"), [("forward", 3), ("backward", 3), ("update", 4), ("log", 4)])
def test_ctrl_c_from_python_saves_whole_steps_and_resumes_bitwise(
    where: str, saved: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real interrupt, in the step behind three: before its update it is undone, after it the step is ended."""
    asked = itertools.count()

    def interrupt(place: str, step: int) -> None:
        if (place, step) == (where, 3) and next(asked) == 0:
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        Toy().train(tmp_path / "run", happens=interrupt)
    last = checkpoint.latest(tmp_path / "run")
    said = capsys.readouterr().out
    assert last == checkpoint.checkpoint_path(tmp_path / "run", saved)
    assert f"Stopped at step {saved} of 6" in said
    assert "The same command resumes." in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    Toy().train(tmp_path / "run")
    Toy().train(tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_ctrl_c_in_a_pretraining_from_python(
    image_folder: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig(
        images=image_folder, out=tmp_path / "run", teacher=str(tiny_teacher), student="test_resnet", width=8,
        batch_size=8, epochs=3, warmup_epochs=0, device="cpu", precision="float32", log_every=2, probe_every=0,
    )  # fmt: skip
    whole = pretrain(dataclasses.replace(config, out=tmp_path / "whole"))
    losses, calls = distill_step.Distillation.losses, itertools.count()

    def interrupted(self: distill_step.Distillation, part: Any) -> dict[str, Tensor]:
        found = losses(self, part)
        if next(calls) == 2:
            _thread.interrupt_main()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(distill_step.Distillation, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 2)
    assert pretrain(config) == config.out
    assert whole is not None
    assert_equal(everything(whole), everything(config.out))


# --- a loss term --------------------------------------------------------------------------------------------


def smallness(maps: Any) -> Tensor:
    """What would be one more function in losses.py."""
    return torch.stack([m.abs().mean() for m in maps])


def test_a_loss_term_is_one_function_and_one_line(
    image_folder: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(seen: Seen) -> Tensor | None:
        return smallness(seen.maps) if seen.maps else None

    config = PretrainConfig(
        images=image_folder, out=tmp_path / "run", teacher=str(tiny_teacher), student="test_resnet", width=8,
        batch_size=8, epochs=1, warmup_epochs=0, device="cpu", precision="float32", log_every=1, probe_every=0,
    )  # fmt: skip
    pretrain(dataclasses.replace(config, out=tmp_path / "before"))
    monkeypatch.setitem(TERMS, "small", Term(lambda config: 0.5, value))
    pretrain(config)
    before = read_rows(tmp_path / "before" / "metrics.jsonl")
    rows = read_rows(config.out / "metrics.jsonl")
    levels = ("s4", "s8", "s16", "s32")
    mean = sum(rows[0][f"small/{level}"] for level in levels) / 4
    assert mean > 0
    assert rows[0]["loss"] == pytest.approx(before[0]["loss"] + 0.5 * mean, rel=1e-5)
    assert rows[0]["loss/s8"] == pytest.approx(before[0]["loss/s8"] + 0.5 * rows[0]["small/s8"], rel=1e-6)
    assert rows[1]["mse/s4"] != before[1]["mse/s4"]  # it was learned from


def test_the_total_of_named_losses_is_eq_3_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3, 4, 5):
        maps = [[torch.randn(2, 3, 8 >> i, 8 >> i, generator=generator) for i in range(min(count, 3))] * 2][
            0
        ][:count]
        theirs = [torch.randn(m.shape, generator=generator) for m in maps]
        gradients = []
        for named in (False, True):
            mine = [m.clone().requires_grad_() for m in maps]
            found = feature_loss(mine, theirs)
            losses = {f"mse/{i}": v for i, v in enumerate(found.mse)} | {
                f"at/{i}": v for i, v in enumerate(found.at)
            }
            total = total_loss(losses, {"mse": 1.0, "at": 10.0}) if named else found.total
            assert torch.equal(total, found.total)
            total.backward()
            gradients.append([m.grad for m in mine])
        for a, b in zip(*gradients, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


# --- the meter ----------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2), min_size=1, max_size=6))
def test_means_over_two_processes_are_those_of_one_that_sees_both(values: list[list[float]]) -> None:
    """Each of two meters has its process's values; their exchange is the mean of what both say."""
    meters, alone = [Meter(world=World(i, 2)) for i in range(2)], Meter(torch.float64)
    for step, pair in enumerate(values):
        for meter, value in zip(meters, pair, strict=True):
            meter.add(step, {"loss": torch.tensor(value)})
        alone.add(step, {"loss": (torch.tensor(pair[0]).double() + pair[1]) / 2})
    both = torch.stack([torch.stack(list(meter.sums.values())) for meter in meters]).mean(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_meter, "all_reduce_mean", lambda x: x.copy_(both))
        found = [meter.means() for meter in meters]
        packed = [meter.pack() for meter in meters]
    assert found[0] == found[1]
    assert found[0]["loss"] == pytest.approx(alone.means()["loss"], rel=1e-5, abs=1e-3)
    assert packed[0][0]["meter/loss"] == packed[1][0]["meter/loss"] == both[0]
    again = Meter()
    again.unpack(*packed[0])
    assert again.means() == found[0]  # each goes on from the mean of both


def test_what_is_bad_is_the_first_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(world=World(0, 2))
    monkeypatch.setattr(runtime_meter, "earliest", lambda first: first)
    for step in range(4):
        meter.watch(
            step, {"map": torch.tensor(float("nan") if step == 3 else 1.0), "loss": torch.tensor(1.0)}
        )
    assert meter.bad() == ("map", 4)
    monkeypatch.setattr(runtime_meter, "earliest", lambda first: first.copy_(torch.tensor([9, 2])))
    assert meter.bad() == ("loss", 2)


def test_parts_count_once_and_rare_names_by_themselves() -> None:
    meter = Meter()
    for step in range(4):
        for _ in range(2):
            meter.add(step, {"loss": torch.tensor(3.0)}, divisor=2.0)
        if step % 2:
            meter.add(step, {"r1": torch.tensor(float(step))})
    assert meter.means() == {"loss": 3.0, "r1": 2.0}
    assert meter.means().difference("loss", "loss") == 0.0


# --- services -----------------------------------------------------------------------------------------------


class Service:
    """A service of our own, that remembers."""

    made: list[Service] = []  # noqa: RUF012

    def __init__(self, folder: Path, settings: Mapping[str, Any], known_as: str) -> None:
        self.folder, self.settings, self.known_as = folder, settings, known_as
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        Service.made.append(self)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self.rows.append((step, dict(row)))

    def close(self) -> None:
        self.closed = True


def test_services_get_the_lines_and_go_on_when_a_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Service.made.clear()
    monkeypatch.setitem(loggers.LOGGERS, "wandb", (Service, "json"))
    Toy().train(tmp_path / "run", steps=4, log_to=("wandb",))
    Toy().train(tmp_path / "run", steps=6, log_to=("wandb",))
    first, second = Service.made
    assert first.settings == {"lr": 0.1}
    assert [step for step, _ in first.rows + second.rows] == [2, 4, 6]
    assert first.rows[0][1].keys() == {"images_seen", "loss"}
    assert first.known_as == second.known_as
    assert first.closed
    assert second.closed


def test_a_missing_package_is_said_before_a_run_begins(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    config = PretrainConfig(images=image_folder, out=tmp_path / "run", log_to=("wandb",), device="cpu")
    with pytest.raises(UserError, match=r"--log-to wandb needs.*\npip install 'dreamteacher\[wandb\]'"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def test_every_verb_that_trains_has_the_setting() -> None:
    for config in (PretrainConfig, TrainInterpreterConfig, TrainTeacherConfig, EvaluateConfig):
        fields = {field.name: field.default for field in dataclasses.fields(config)}
        assert fields["log_to"] == ()
        assert fields["save_minutes"] == 10.0


def test_tensorboard_has_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Toy().train(tmp_path / "run", steps=4, log_to=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [e.step for e in events.Scalars("loss")] == [2, 4]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])


def test_weights_and_biases_by_a_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda row, step: said.append((step, row)), finish=lambda: said.append("finished")
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: said.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    Toy().train(tmp_path / "run", steps=2, log_to=("wandb",))
    options, (step, row), end = said
    assert (options["project"], options["name"], options["resume"]) == ("dreamteacher", "run", "allow")
    assert options["id"] == json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    assert (step, row["loss"], end) == (
        2,
        read_rows(tmp_path / "run" / "metrics.jsonl")[0]["loss"],
        "finished",
    )


def test_mlflow_by_a_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str) -> str:
            return name

        def search_runs(self, places: list[str], text: str) -> list[Any]:
            return []

        def create_run(self, place: str, run_name: str) -> Any:
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"{place}/{run_name}"))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
            said.append((run_id, list(metrics), list(params)))

        def set_terminated(self, run_id: str) -> None:
            said.append(run_id)

    entities, tracking = types.ModuleType("mlflow.entities"), types.ModuleType("mlflow.tracking")
    for name in ("Metric", "Param", "RunTag"):
        setattr(entities, name, lambda *values: values)
    tracking.MlflowClient = Client  # type: ignore[attr-defined]
    for module in (types.ModuleType("mlflow"), entities, tracking):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    Toy().train(tmp_path / "run", steps=2, log_to=("mlflow",))
    begun, (run_id, metrics, _), ended = said
    assert begun[2] == [("lr", "0.1")]
    assert run_id == ended == "dreamteacher/run"
    assert {(m[0], m[3]) for m in metrics} == {("images_seen", 2), ("loss", 2)}


def test_one_of_several_processes_that_trains_alone_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first one does, for an interpreter or an evaluation: there is no group to exchange anything in."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    Toy().train(tmp_path / "run", save_every=2)
    assert checkpoint.latest(tmp_path / "run") == checkpoint.checkpoint_path(tmp_path / "run", 6)
