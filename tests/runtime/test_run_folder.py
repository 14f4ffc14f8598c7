"""Run folders: every refusal comes before anything is made; one writer; logs survive a kill; signals."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamteacher.distill.config import PretrainConfig
from dreamteacher.runtime import checkpoint, run_folder
from dreamteacher.runtime.config import to_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.progress import Progress
from dreamteacher.runtime.run_folder import FREE_TO_CHANGE, RunDir, read_rows
from dreamteacher.runtime.signals import Signals, signals_handled


def resolved(verb: str = "pretrain", **config: Any) -> dict[str, Any]:
    return {"verb": verb, "version": "0", "config": {"lr": 0.1, "size": (64, 64), "workers": 2} | config}


def started(path: Path, steps: tuple[int, ...] = (10,)) -> Path:
    """A folder as a run leaves it that was stopped after these checkpoints."""
    run = RunDir(path)
    run.open(resolved())
    for step in steps:
        checkpoint.save(checkpoint.checkpoint_path(path, step), {"x": torch.zeros(2)}, {"step": step})
    run.close()
    return path


def refusal(path: Path, facts: dict[str, Any] | None = None, needed_bytes: int = 0) -> str:
    with pytest.raises(UserError) as error:
        RunDir.check(path, facts or resolved(), needed_bytes)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def listing(folder: Path) -> dict[str, float]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_check_creates_nothing(tmp_path: Path) -> None:
    RunDir.check(tmp_path / "a" / "b" / "c", resolved(), needed_bytes=1)
    assert listing(tmp_path) == {}
    (tmp_path / "empty").mkdir()
    RunDir.check(tmp_path / "empty", resolved())
    assert list(listing(tmp_path)) == ["empty"]
    started(tmp_path / "run")
    before = listing(tmp_path)
    RunDir.check(tmp_path / "run", resolved())
    refusal(tmp_path / "run", resolved(lr=0.5))
    assert listing(tmp_path) == before


def test_relative_paths_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDir.check(Path("runs/x"), resolved())
    RunDir.check(Path("."), resolved())


def test_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("x")
    for path in (file, file / "run", file / "a" / "b"):
        text = refusal(path)
        assert f"'{file}' is a file" in text
        assert "--out" in text
    assert "cannot be used" in refusal(tmp_path / ("x" * 300))


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder that really cannot be written, by root neither."""
    place = tmp_path / "locked"
    place.mkdir()
    if os.geteuid() != 0:
        place.chmod(0o555)
        yield place
        place.chmod(0o755)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(place)]
    if shutil.which("mount") is None:
        pytest.skip("root can write everywhere, and there is no mount command")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"root can write everywhere, and nothing can be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_unwritable_places_are_refused(unwritable: Path) -> None:
    for path in (unwritable, unwritable / "a" / "b"):
        assert f"'{unwritable}' cannot be written" in refusal(path)


def test_places_that_may_not_be_looked_at_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    assert "cannot be used: Permission denied" in refusal(tmp_path / "x")


def test_too_little_space_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "run", needed_bytes=2**62)
    assert f"needs {2**62 / 1e6:.0f} MB" in text
    assert "MB free" in text
    RunDir.check(tmp_path / "run", resolved(), needed_bytes=shutil.disk_usage(tmp_path).free // 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("photo.jpg", "x"),
        ("config.json", "{"),
        ("config.json", "[1, 2]"),
        ("config.json", '{"architecture": "resnet18"}'),
        ("folder", None),
    ],
)
def test_foreign_folders_are_refused(tmp_path: Path, name: str, content: str | None) -> None:
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_text(content)
    assert "is not empty and is no run folder" in refusal(tmp_path)


def test_a_run_of_another_verb_is_refused(tmp_path: Path) -> None:
    started(tmp_path / "a")
    assert "holds a run of 'pretrain', not of 'train-teacher'" in refusal(
        tmp_path / "a", resolved("train-teacher")
    )
    started(tmp_path / "b", steps=())  # no checkpoint, but perhaps results
    assert "holds a run of 'pretrain'" in refusal(tmp_path / "b", resolved("demo"))


def test_changed_settings_are_refused_and_listed(tmp_path: Path) -> None:
    started(tmp_path)
    RunDir.check(tmp_path, resolved())
    text = refusal(tmp_path, resolved(lr=0.2, size=(64, 128), flip=True, workers=5))
    for words in ("flip: None -> True", "lr: 0.1 -> 0.2", "size: [64, 64] -> [64, 128]"):
        assert words in text
    assert "workers" not in text
    many = refusal(tmp_path, resolved(lr=0.2, size=(1, 1), a=1, b=2))
    assert "(+1 more)" in many


def test_settings_that_change_no_number_may_change(tmp_path: Path) -> None:
    started(tmp_path)
    RunDir.check(tmp_path, resolved(**dict.fromkeys(FREE_TO_CHANGE, "other")))


def test_a_finished_run_without_checkpoints_is_kept(tmp_path: Path) -> None:
    started(tmp_path, steps=())
    (tmp_path / "backbone.safetensors").touch()
    assert "lr: 0.1 -> 0.2" in refusal(tmp_path, resolved(lr=0.2))


def test_a_start_that_failed_does_not_poison_the_folder(tmp_path: Path) -> None:
    started(tmp_path / "a", steps=())
    RunDir.check(tmp_path / "a", resolved(lr=0.2))  # no checkpoint was reached
    (tmp_path / "b").mkdir()  # killed, or out of space, before config.json was written
    (tmp_path / "b" / ".lock").touch()
    (tmp_path / "b" / ".config.json.123.tmp").write_text("{")
    RunDir.check(tmp_path / "b", resolved())
    assert RunDir(tmp_path / "b").open(resolved()) is None


def test_damaged_checkpoints_only_are_reported(tmp_path: Path) -> None:
    started(tmp_path)
    checkpoint.checkpoint_path(tmp_path, 10).write_bytes(b"half")
    assert "None of the checkpoints" in refusal(tmp_path)


def test_open_writes_the_config_and_finds_the_checkpoint(tmp_path: Path) -> None:
    config = PretrainConfig(out=tmp_path / "run", size=(64, 96))
    facts = {"verb": "pretrain", "config": to_json(config)}
    run = RunDir(tmp_path / "run")
    assert run.config() is None
    assert run.open(facts) is None
    assert run.config() == facts == json.loads((tmp_path / "run" / "config.json").read_text())
    run.close()

    started(tmp_path / "run", steps=(5, 20))
    run = RunDir(tmp_path / "run")
    run.append("metrics.jsonl", {"step": 1})
    assert run.open(facts) == checkpoint.checkpoint_path(tmp_path / "run", 20)
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == [{"step": 1}]
    run.close()


def test_a_new_start_forgets_the_logs_of_one_that_reached_no_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open(resolved())
    run.append("metrics.jsonl", {"step": 1})
    run.append("timing.jsonl", {"step": 1})
    run.close()
    assert RunDir(tmp_path).open(resolved()) is None
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "timing.jsonl").exists()


def test_one_writer_in_one_process(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    first.open(resolved())
    config = (tmp_path / "config.json").read_bytes()
    for _ in range(2):  # a refused one, even when closed, does not take the lock from its holder
        with pytest.raises(UserError, match="Another process is writing"):
            second.open(resolved(lr=9))
        second.close()
    assert (tmp_path / "config.json").read_bytes() == config
    first.close()
    second.open(resolved())
    with pytest.raises(UserError, match="Another process"):
        first.open(resolved())
    second.close()


def test_a_run_that_ended_in_an_error_frees_its_folder(tmp_path: Path) -> None:
    def fail() -> None:
        RunDir(tmp_path).open(resolved())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    run = RunDir(tmp_path)
    run.open(resolved())
    run.close()


HOLD = (
    "import fcntl,sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
)


def test_one_writer_among_processes_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="Another process is writing"):
            RunDir(tmp_path).open(resolved())
        other.kill()
        other.wait()
    run = RunDir(tmp_path)
    run.open(resolved())
    run.close()


def test_a_disk_that_cannot_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = errno.ENOLCK

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="cannot lock files"):
        RunDir(tmp_path).open(resolved())
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        RunDir(tmp_path).open(resolved())


def inherited(run: RunDir) -> subprocess.Popen[bytes]:
    """Another process that has the lock's open file, as a worker that was forked has."""
    assert run._lock is not None
    file = run._lock._context.lock_file_fd
    assert file is not None
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[file])


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(
    tmp_path: Path,
) -> None:
    run, next_ = RunDir(tmp_path), RunDir(tmp_path)
    run.open(resolved())
    with inherited(run) as worker:
        run.close()
        next_.open(resolved())
        worker.kill()
    next_.close()


def test_a_restart_waits_for_what_the_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    first.open(resolved())
    with pytest.raises(UserError, match="Another process"):
        second.open(resolved())
    monkeypatch.setattr(run_folder, "PATIENCE_S", 30.0)
    later = threading.Timer(0.3, first.close)
    later.start()
    second.open(resolved())
    later.join()
    second.close()


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    run, path = RunDir(tmp_path), tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    rows = [{"step": s, "loss": 1 / s, "rank": float("inf")} for s in range(1, 6)]
    for row in rows:
        run.append("metrics.jsonl", row)
    assert read_rows(path) == rows
    whole = path.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for end in range(last, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert read_rows(path) == rows[:4]
    path.write_bytes(whole[:last] + b"\x00\xff\xfe\n")
    assert read_rows(path) == rows[:4]


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run, path = RunDir(tmp_path), tmp_path / "metrics.jsonl"
    for step in range(10, 60, 10):
        run.append("metrics.jsonl", {"step": step, "loss": 0.1 + 0.2})
    with open(path, "a") as file:
        file.write('{"step": 60, "lo')
    run.rewind("metrics.jsonl", 30)
    run.append("metrics.jsonl", {"step": 40, "loss": 1.5})
    expected = [{"step": s, "loss": 0.1 + 0.2} for s in (10, 20, 30)] + [{"step": 40, "loss": 1.5}]
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in expected)
    run.rewind("absent.jsonl", 3)
    assert read_rows(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number: signal.Signals) -> None:
    class Acted(Exception):
        pass

    def act(_number: int, _frame: object) -> None:
        raise Acted

    before = signal.signal(number, act)
    try:
        with signals_handled(), Signals() as signals:
            assert signals.number == 0
            os.kill(os.getpid(), number)
            assert signals.number == number
            with pytest.raises(Acted):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is act
    finally:
        signal.signal(number, before)


def test_handlers_are_restored_after_an_error() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def fail() -> None:
        with signals_handled(), Signals():
            assert signal.getsignal(signal.SIGINT) != before[0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_progress_rates_and_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("dreamteacher.runtime.progress.time.perf_counter", lambda: clock[0])
    progress = Progress(total=40, first=20, batch=8, title="pretrain", every=30.0)
    clock[0] += 10
    progress.wait(2.5)
    progress.update(30, "loss 1")
    assert capsys.readouterr().out == ""  # not a terminal: one line about every 30 seconds
    assert progress.rates() == {"images_per_s": 8.0, "data_wait": 0.25, "seconds": 10.0}
    clock[0] += 30
    progress.update(35, "loss 2")
    assert capsys.readouterr().out.startswith(
        "pretrain: step 35/40, 3 images/s, data wait 6%, loss 2, 13 s left"
    )
    clock[0] += 1
    progress.update(40, "loss 3")
    assert "step 40/40" in capsys.readouterr().out
    progress.close()


WITHOUT_FCNTL = """
import sys, warnings
from pathlib import Path
sys.modules["fcntl"] = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # filelock says that its locks are files then
    import dreamteacher
    from dreamteacher.runtime.lock import take_lock
images, teacher, out = sys.argv[1:]
dreamteacher.pretrain(
    images=images, out=out, teacher=teacher, student="test_resnet", width=8, batch_size=8, epochs=1, warmup_epochs=0,
    device="cpu", probe_every=0, workers=0,
)
lock = take_lock(Path(out) / ".lock")
assert lock is not None
assert take_lock(Path(out) / ".lock") is None
lock.release()
"""


@pytest.mark.slow
def test_a_system_without_fcntl_trains(image_folder: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        WITHOUT_FCNTL,
        str(image_folder),
        str(tiny_teacher),
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "backbone.safetensors").is_file()
