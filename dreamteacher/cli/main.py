"""The command line: one verb, one config, one function. torch is imported only once the flags are understood."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """Where a verb's config class and its function live ("module:Name"), and what the help says of it.

    The config's module imports nothing slow; the function's is imported once the flags are understood.
    """

    config: str
    function: str
    what: str


VERBS = {
    "demo": Verb(
        "dreamteacher.cli.config:DemoConfig", "dreamteacher.cli.demo:demo",
        "the whole path on embedded chest X-rays, in minutes",
    ),
    "pretrain": Verb(
        "dreamteacher.distill.config:PretrainConfig", "dreamteacher.distill.pretrain:pretrain",
        "a folder of images and a teacher -> a backbone",
    ),
    "train-teacher": Verb(
        "dreamteacher.teachers.training.config:TrainTeacherConfig",
        "dreamteacher.teachers.training.train:train_teacher",
        "a diffusion model or a StyleGAN2 on your own images",
    ),
    "train-interpreter": Verb(
        "dreamteacher.distill.config:TrainInterpreterConfig",
        "dreamteacher.distill.train_interpreter:train_interpreter",
        "a few labelled images and a teacher -> labels for every image",
    ),
    "make-labels": Verb(
        "dreamteacher.distill.config:MakeLabelsConfig", "dreamteacher.distill.make_labels:make_labels",
        "images or a teacher's samples -> a labelled dataset on disk",
    ),
    "get-teacher": Verb(
        "dreamteacher.teachers.published.config:GetTeacherConfig",
        "dreamteacher.teachers.published.get:get_teacher",
        "a published generator (ADM, Stable Diffusion, StyleGAN2 ...) or a checkpoint of yours -> a teacher",
    ),
    "make-features": Verb(
        "dreamteacher.distill.config:MakeFeaturesConfig", "dreamteacher.distill.store.make:make_features",
        "a teacher's maps of a folder of images, kept on disk for many pretrainings",
    ),
    "evaluate": Verb(
        "dreamteacher.downstream.config:EvaluateConfig", "dreamteacher.downstream.evaluate:evaluate",
        "kNN, probes, fine-tuning, segmentation; for any backbone",
    ),
    "export": Verb(
        "dreamteacher.exports.config:ExportConfig", "dreamteacher.exports.write:export",
        "weights for timm and other libraries, and a model card",
    ),
    "report": Verb(
        "dreamteacher.reports.config:ReportConfig", "dreamteacher.reports.report:report",
        "one HTML page about a run",
    ),
    "inspect": Verb(
        "dreamteacher.reports.config:InspectConfig", "dreamteacher.reports.inspect:inspect_teacher",
        "which timestep and which level of a teacher: maps and a ranking",
    ),
    "list": Verb(
        "dreamteacher.cli.config:ListConfig", "dreamteacher.cli.lists:print_list",
        "teachers, students, presets, tasks",
    ),
    "doctor": Verb(
        "dreamteacher.cli.config:DoctorConfig", "dreamteacher.cli.lists:doctor",
        "versions, devices, what is missing",
    ),
}  # fmt: skip


def named(place: str) -> Any:
    """What a "module:Name" names; imports the module.

    Example:
        >>> named("dreamteacher.cli.config:DoctorConfig")()
        DoctorConfig()
    """
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


TOGETHER = ("pretrain", "train-teacher", "demo", "make-features")  # with torchrun
_DISK = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENXIO, errno.ENODEV)

HELP = """usage: dreamteacher VERB [--setting value ...]

Pretrain image backbones with generative models as teachers.

{verbs}

`dreamteacher VERB --help` lists a verb's settings. Start with: dreamteacher demo
Errors say what to do and exit with 2; DREAMTEACHER_TRACEBACK=1 shows where they arose.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a user's error, 128 + n after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if _processes() > 1:
        return _one_of_many(arguments)
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away (`| head`): that is no error
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at the last flush
        return 141


def _processes() -> int:
    """How many processes torchrun started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _one_of_many(arguments: list[str]) -> int:
    """`main` of one of several processes: the first one alone prints, and an error ends the process at once.

    Without the usual clearing away, for that would wait for what the others will not send any more.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    code = 1
    try:
        code = _main(arguments)
        return code
    except SystemExit as stop:  # a signal: all have saved and leave together
        code = 0
        raise stop
    except BaseException:
        import traceback

        traceback.print_exc()
        return code
    finally:
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:17} {verb.what}" for name, verb in VERBS.items())))
        return 0
    if arguments[0] in ("-V", "--version"):
        from dreamteacher import __version__

        print(f"dreamteacher {__version__}")
        return 0
    from dreamteacher.runtime.errors import UserError
    from dreamteacher.runtime.signals import signals_handled

    try:
        with signals_handled():
            run(arguments[0], arguments[1:])
        sys.stdout.flush()  # a full disk or a reader that went away shows here, not at the exit
    except UserError as error:
        return _report(str(error), error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"The disk is full: {error}.\nFree space, then run the same command: it resumes."
        elif error.errno in _DISK:
            text = f"A disk fails: {error}.\nMend it or use another, then run the same command: it resumes."
        else:
            raise
        return _report(text, error)
    except RuntimeError as error:
        from dreamteacher.data.batches import worker_died

        died = worker_died(error)
        if died is None:
            raise
        return _report(str(died), error)
    except KeyboardInterrupt:
        return 130
    return 0


def run(name: str, arguments: Sequence[str]) -> Any:
    """Runs the verb `name`.

    Raises:
        UserError: for an unknown verb or setting, or a value that does not fit.
    """
    from dreamteacher.runtime.errors import UserError, did_you_mean

    if name not in VERBS:
        raise UserError(
            f"There is no verb '{name}'.{did_you_mean(name, VERBS)}", f"Verbs: {', '.join(VERBS)}."
        )
    if _processes() > 1 and name not in TOGETHER:
        raise UserError(
            f"'{name}' runs in one process, and {_processes()} were started.",
            f"Start it without torchrun. What several can do together: {', '.join(TOGETHER)}.",
        )
    verb = VERBS[name]
    with _no_collections():
        config = parse(named(verb.config), name, arguments, default=_preset(name, arguments))
    result = named(verb.function)(config)
    if name in ("pretrain", "train-teacher") and result is not None:
        from dreamteacher.reports.report import report_after

        report_after(result)
    return result


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Without collections of garbage: imports and flags leave none, and looking for it takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _preset(verb: str, arguments: Sequence[str]) -> Any:
    """What `evaluate --preset NAME` begins with; None where no preset is named."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if verb != "evaluate" or "--preset" not in words[:-1]:
        return None
    from dreamteacher.downstream.presets import preset_config

    return preset_config(words[words.index("--preset") + 1])


def parse(config: type, verb: str, arguments: Sequence[str], *, default: Any = None) -> Any:
    """Flags -> a config dataclass, by tyro; its long error boxes become our three lines.

    Args:
        default: the config that the flags change; None: the class's own defaults.

    Raises:
        UserError: naming the flag; SystemExit(0) after --help.
    """
    from dreamteacher.runtime.errors import UserError, did_you_mean

    flags = ["--help", *_flags(config)]
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            raise UserError(
                f"'{verb}' has no setting {flag}.{did_you_mean(flag, flags)}",
                f"`dreamteacher {verb} --help` lists its settings.",
            )
    import tyro  # a mistyped flag does not wait for it

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, prog=f"dreamteacher {verb}", args=list(arguments), default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(
            *_plain(said.getvalue(), verb, f"`dreamteacher {verb} --help` lists its settings.")
        ) from None


def _flags(config: type, prefix: str = "--") -> list[str]:
    """Every flag of a config and of the configs in it (`--finetune.lr`)."""
    import dataclasses
    import typing

    hints = typing.get_type_hints(config, include_extras=True)
    flags = []
    for field in dataclasses.fields(config):
        if typing.get_origin(hints[field.name]) is typing.Annotated:
            continue  # given by its place, without a flag
        name = field.name.replace("_", "-")
        flags += [f"{prefix}{name}", f"{prefix}no-{name}"]
        if dataclasses.is_dataclass(hints[field.name]):
            flags += _flags(hints[field.name], f"{prefix}{name}.")
    return flags


# What tyro says of a value, and what we say: the flag, then what it takes, then what came.
_VALUES = {
    r"could not convert string to float: '(?P<value>.*)'": "a number",
    r"invalid literal for int\(\) with base 10: '(?P<value>.*)'": "a whole number",
    r"no type matching .*\{(?P<takes>[A-Z ]+)\}.* from \['(?P<value>[^]]*)'\]": "",
    r"Could not find valid parse for arguments: \['(?P<value>[^]]*)'\]": "values of another kind",
}


def _plain(box: str, verb: str, help_: str) -> tuple[str, str]:
    """tyro's error box as one line of at most 200 characters, and what to do about it."""
    from dreamteacher.runtime.errors import did_you_mean

    lines = ["".join(" " if c in "│╭╮╰╯─" else c for c in line).strip() for line in box.splitlines()]
    _title, *lines = [line for line in lines if line.strip("- ")] or [box]
    ends = [i for i, line in enumerate(lines) if line.startswith(("Argument helptext", "For full helptext"))]
    text = re.sub(r"\[/?bold\]", "", " ".join(lines[: ends[0]] if ends else lines))
    if text.startswith("Missing from "):
        return f"'{verb}' needs {', '.join(re.findall(r'--[a-z][a-z0-9.-]*', text))}.", help_
    choice = re.search(r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*?)\)", text)
    if choice:
        value, flag, names = choice[1], choice[2], re.findall(r"'(.*?)'", choice[3])
        problem = f"{flag} cannot be" if flag.startswith("--") else f"'{verb}' knows no"
        return f"{problem} '{value}'.{did_you_mean(value, names)}", f"Choose from: {', '.join(names)}."
    for pattern, kind in _VALUES.items():
        if found := re.search(r"Error parsing (?P<flag>--\S+): " + pattern, text):
            value = found["value"].replace("', '", " ")
            return f"{found['flag']} takes {kind or found['takes']}, not '{value}'.", help_
    return (text if len(text) <= 200 else text[:197] + "..."), help_


def _report(text: str, error: BaseException) -> int:
    if os.environ.get("DREAMTEACHER_TRACEBACK"):
        raise error
    if _processes() > 1:
        from dreamteacher.runtime.distributed.group import speaks

        if not speaks():
            return 2
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
