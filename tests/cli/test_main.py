"""The command line: fast help, complete help, short errors with a way out, nothing made on refusal."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

import dreamteacher
from dreamteacher.cli import main as cli
from dreamteacher.cli.main import VERBS, main
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.errors import UserError

BARE = {"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", ""), "OMP_NUM_THREADS": "1"}

BY_PLACE = {("list", "what"), ("get-teacher", "name")}  # settings without a flag


def config_of(verb: str) -> type:
    return cli.named(VERBS[verb].config)


def fields_of(config: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Every setting, nested ones dotted: its type and what the source says of it."""
    hints = typing.get_type_hints(config)
    told = documentation(config)
    found = {}
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found |= fields_of(hint, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = hint, told.get(field.name, "")
    return found


def documentation(config: type) -> dict[str, str]:
    """The string under each field, or its entry below "Args:" in the docstring of the class, bases too."""
    told: dict[str, str] = {}
    for base in reversed(config.__mro__):
        told |= own_documentation(base) if dataclasses.is_dataclass(base) else {}
    return told


def own_documentation(config: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    told = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            assert isinstance(field.target, ast.Name)
            told[field.target.id] = str(text.value.value)
    _, _, listed = (inspect.getdoc(config) or "").partition("Args:\n")
    return dict(re.findall(r"^    (\w+): (.+?)(?=^    \w+: |\n\n|\Z)", listed, re.M | re.S)) | told


def squeezed(text: str) -> str:
    """Letters and digits only: boxes and line breaks of the help play no part."""
    return re.sub(r"[\W_]", "", text)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """What a refusal says, after checking its form."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert 2 <= len(err.splitlines()) <= 3
    assert "Traceback" not in err
    assert out == ""
    assert os.listdir(folder) == []
    return err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DREAMTEACHER_TRACEBACK", raising=False)
    monkeypatch.setenv(
        "COLUMNS", "90"
    )  # one column: tyro sets groups of settings side by side when there is room
    return tmp_path


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    root = Path(dreamteacher.__file__).parent.parent
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120,
        env=BARE | {"PYTHONPATH": str(root)}, **options,
    )  # fmt: skip


# --- fast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "--version", "pretrian"])
def test_what_needs_no_verb_imports_neither_torch_nor_tyro(flag: str) -> None:
    code = (
        "import sys, resource; from dreamteacher.cli.main import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'tyro', 'timm', 'diffusers', 'PIL'} & set(sys.modules)),"
        "resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    done = python("-c", code, flag)
    assert done.returncode == 0, done.stderr
    code_text, modules, seconds = done.stdout.splitlines()[-1].split(" ")
    assert (code_text, modules) == ("2" if flag == "pretrian" else "0", "[]")
    assert float(seconds) < 0.5


def test_the_module_runs_as_the_command() -> None:
    done = python("-m", "dreamteacher", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"dreamteacher {dreamteacher.__version__}\n",
        "",
    )
    done = python("-m", "dreamteacher", "pretrian")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'pretrain'?" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_names_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.what)}$", out, re.M)


# --- verbs and their help -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_config_and_a_function_of_it(verb: str) -> None:
    config = config_of(verb)
    assert dataclasses.is_dataclass(config)
    function = cli.named(VERBS[verb].function)
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    assert len(required) == 1, f"{verb}: {function.__name__}{inspect.signature(function)}"
    assert typing.get_type_hints(function)[required[0].name] is config


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_lists_every_setting_with_its_text(
    verb: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name, (_, text) in fields_of(config_of(verb)).items():
        if (verb, name) not in BY_PLACE:  # given by its place
            assert f"--{name.replace('_', '-')}" in out, name
        assert len(text) > 8, f"{verb}: {name} is not documented"
        assert squeezed(text) in squeezed(out), name
    assert squeezed((inspect.getdoc(config_of(verb)) or "").splitlines()[0]) in squeezed(out)
    assert os.listdir(here) == []


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"), [("pretrian", "pretrain"), ("train_teacher", "train-teacher"), ("doktor", "doctor")]
)
def test_unknown_verbs(typed: str, meant: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    said = refused([typed, "--out", "x"], capsys, here)
    assert f"no verb '{typed}'. Did you mean '{meant}'?" in said
    assert ", ".join(VERBS) in said


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "doctor"])
def test_unknown_settings(verb: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    name = next(n for n in fields_of(config_of(verb)) if (verb, n) not in BY_PLACE).replace("_", "-")
    said = refused([verb, f"--{name}z", "1"], capsys, here)
    assert f"'{verb}' has no setting --{name}z. Did you mean '--{name}'?" in said
    assert f"dreamteacher {verb} --help" in said
    assert f"--{name}z" in refused([verb, f"--{name}z=1"], capsys, here)


def test_unknown_nested_settings(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    said = refused(["evaluate", "--finetune.stepz", "3"], capsys, here)
    assert "Did you mean '--finetune.steps'?" in said


def bad_values() -> list[tuple[str, str]]:
    """Every setting of every verb that is a number or one of several words."""
    found = []
    for verb in VERBS:
        for name, (hint, _) in fields_of(config_of(verb)).items():
            kinds = {hint, *typing.get_args(hint)}
            if (kinds & {int, float} or typing.get_origin(hint) is Literal) and (verb, name) not in BY_PLACE:
                found.append((verb, name))
    return found


def required_arguments(verb: str) -> list[str]:
    fields = dataclasses.fields(config_of(verb))
    missing = dataclasses.MISSING
    names = [f.name for f in fields if f.default is missing and f.default_factory is missing]
    return [word for name in names for word in (f"--{name.replace('_', '-')}", "somewhere")]


def test_bad_values(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    cases = bad_values()
    assert {"pretrain", "evaluate", "train-teacher", "report", "demo"} <= {verb for verb, _ in cases}
    for verb in VERBS:  # one number and one word of each are enough
        for name in [n for v, n in cases if v == verb][:2]:
            flag = f"--{name.replace('_', '-')}"
            said = refused([verb, *required_arguments(verb), flag, "qqq"], capsys, here)
            assert flag in said, said
            assert "qqq" in said, said
            refused([verb, *required_arguments(verb), flag], capsys, here)


def test_bad_words_come_with_the_choices(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    said = refused(["pretrain", "--out", "x", "--optimizer", "sgd"], capsys, here)
    assert "--optimizer cannot be 'sgd'" in said
    assert "adamw, lamb" in said
    said = refused(["list", "studnets"], capsys, here)
    assert "Did you mean 'students'?" in said


def test_numbers_out_of_range_are_refused_while_parsing(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert "steps is 0" in refused(["evaluate", "--finetune.steps", "0"], capsys, here)


@pytest.mark.parametrize("verb", [v for v in VERBS if required_arguments(v)])
def test_missing_settings_are_named(verb: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    said = refused([verb], capsys, here)
    assert f"'{verb}' needs {', '.join(required_arguments(verb)[::2])}." in said


def test_stray_words(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    for arguments in (
        ["doctor", "please"],
        ["list", "students", "please"],
        ["pretrain", "--out", "x", "please"],
    ):
        assert "please" in refused(arguments, capsys, here)


def test_underscores_and_equal_signs_are_understood() -> None:
    config = cli.parse(
        config_of("pretrain"), "pretrain", ["--out=x", "--batch_size", "4", "--lr=1e-3", "--no-flip"]
    )
    assert (config.out, config.batch_size, config.lr, config.flip) == (Path("x"), 4, 1e-3, False)
    config = cli.parse(
        config_of("pretrain"), "pretrain", ["--out", "x", "--t", "50", "100", "--size", "64", "96"]
    )
    assert (config.t, config.size) == ((50, 100), (64, 96))
    config = cli.parse(config_of("evaluate"), "evaluate", ["--finetune.steps", "7", "--segment.no-flip"])
    assert (config.finetune.steps, config.segment.flip) == (7, False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--out", "run", "--images", "absent"],
        ["pretrain", "--out", "run"],
        ["pretrain", "--out", "run", "--images", "absent", "--teacher", "chest-xray-46"],
        ["pretrain", "--out", "run", "--images", "absent", "--device", "cuda:99"],
        ["pretrain", "--out", "run", "--images", "absent", "--lr", "0"],
        ["train-teacher", "--out", "teacher", "--images", "absent"],
        ["train-teacher", "--out", "teacher", "--images", "absent", "--size", "65", "64"],
        ["evaluate", "--train", "absent", "--test", "absent", "--out", "results"],
        ["export", "--run", "absent", "--out", "export"],
        ["report", "--run", "absent"],
        ["demo", "--images", "absent", "--out", "demo"],
        ["list", "students", "--filter", "qqqqqqq"],
    ],
    ids=" ".join,
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    arguments: list[str], capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    refused(arguments, capsys, here)


def test_the_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMTEACHER_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(["pretrian"])


# --- what else can end a command ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a", "b"), 2, "error: a\nb\n"),
        (OSError(28, "No space left on device", "x.bin"), 2, "The disk is full"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (SystemExit(143), 143, ""),
        (RuntimeError("a fault of ours"), None, ""),
        (PermissionError(13, "Permission denied"), None, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(
    error: BaseException,
    code: int | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    if code is None or isinstance(error, SystemExit):
        with pytest.raises(type(error)) as stop:
            main(["doctor"])
        assert stop.value is error
    else:
        assert main(["doctor"]) == code
    err = capsys.readouterr().err
    assert said in err if said else err == ""


@pytest.mark.parametrize("flag", ["--help", "doctor"])
def test_a_reader_that_goes_away_is_no_error(flag: str) -> None:
    code = (
        "import sys; from dreamteacher.cli import main as cli; cli.run = lambda *_: print('x' * 100_000);"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    root = Path(dreamteacher.__file__).parent.parent
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, flag], stdout=write, stderr=subprocess.PIPE, text=True, check=False,
            timeout=120, env=BARE | {"PYTHONPATH": str(root)},
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# --- list and doctor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("teachers", ["FOLDER", "train-teacher", "diffusion"]),
        ("students", ["resnet18", "resnet50", "convnext_tiny"]),
        ("presets", ["cpu-64", "adm-256", "64 x 64", "patch 2"]),
        ("tasks", ["knn", "linear", "finetune", "segment-frozen", "segment-finetune"]),
    ],
)
def test_lists(what: str, expected: list[str], capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert main(["list", what]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in expected:
        assert words in out
    assert main(["list", what, "--filter", expected[0]]) == 0
    filtered = capsys.readouterr().out.splitlines()
    assert filtered == [line for line in out.splitlines() if expected[0] in line]
    assert os.listdir(here) == []


def test_list_shows_teachers_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    default = capsys.readouterr().out
    assert main(["list", "teachers"]) == 0
    assert capsys.readouterr().out == default


def test_doctor_tells_versions_devices_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for package in ("torch", "torchvision", "timm", "diffusers", "safetensors", "pillow", "tyro", "tqdm"):
        assert re.search(rf"^  {package} +{re.escape(importlib.metadata.version(package))}$", out, re.M)
    assert f"dreamteacher {dreamteacher.__version__}" in out
    assert re.search(r"^  device +(cpu|cuda)", out, re.M)
    assert "MISSING" not in out
    assert os.listdir(here) == []

    from dreamteacher.cli import lists

    monkeypatch.setattr(lists, "CORE", ("torch", "no-such-package"))
    assert main(["doctor"]) == 0
    assert "MISSING: pip install no-such-package" in capsys.readouterr().out


# --- after a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["pretrain", "train-teacher"])
def test_training_verbs_end_with_a_report(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    reports: list[Path] = []
    function = VERBS[verb].function.replace(":", ".")

    def write_report(run: Path, *, own_code: bool) -> Path:
        reports.append(run)
        return run / "report.html"

    monkeypatch.setattr("dreamteacher.reports.report.write_report", write_report)
    monkeypatch.setattr(function, lambda config: config.out)
    assert main([verb, "--images", "i", "--out", "run"]) == 0
    assert reports == [Path("run")]
    assert f"Report: {Path('run/report.html')}" in capsys.readouterr().out
    monkeypatch.setattr(function, lambda _config: None)  # a dry run
    assert main([verb, "--images", "i", "--out", "run"]) == 0
    assert reports == [Path("run")]


def test_a_foreign_out_folder_is_refused_and_left_alone(
    image_folder: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    arguments = [
        "pretrain", "--images", str(image_folder), "--teacher", str(tiny_teacher), "--student", "resnet18",
        "--batch-size", "4", "--out", str(out), "--device", "cpu",
    ]  # fmt: skip
    assert main(arguments) == 2
    assert "is not empty and is no run folder" in capsys.readouterr().err
    assert os.listdir(out) == ["thesis.txt"]
    checkpoint.write_text(out / "config.json", '{"verb": "train-teacher", "config": {}}')
    assert main(arguments) == 2
    assert "holds a run of 'train-teacher'" in capsys.readouterr().err
    assert sorted(os.listdir(out)) == ["config.json", "thesis.txt"]
