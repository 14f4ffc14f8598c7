"""What is written down is run: the blocks of README and docs, their links, and the names in them.

Every ```bash and ```python block of a document runs, in order, in one folder of small images. Commands run
as they are written, but with the settings of `SMALL`, so that they take seconds. ```text blocks do not run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from dreamteacher.cli import demo
from dreamteacher.cli import main as cli
from dreamteacher.downstream.classification.config import FinetuneConfig
from dreamteacher.downstream.segmentation.config import SegmentConfig
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher
from dreamteacher.teachers.registry import EMBEDDED
from tests.places import ROOT

TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "dev" / "LOG.md"]
DOCUMENTS = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
# Replaces or adds settings, per verb. What is written is parsed as it is before that.
SMALL = {
    "pretrain": {
        "--epochs": "1", "--warmup-epochs": "0", "--batch-size": "8", "--width": "16", "--log-every": "1",
        "--label.epochs": "2", "--label.warmup-epochs": "0", "--label.width": "16",
    },
    "train-interpreter": {"--epochs": "2", "--warmup-epochs": "0", "--width": "16"},
    "train-teacher": {"--steps": "2", "--batch-size": "4"},
    "evaluate": {
        "--labels": "2", "--seeds": "0", "--mask-counts": "4", "--size": "64 64", "--finetune.steps": "2",
        "--segment.steps": "2",
    },
    "demo": {"--images": "xrays", "--epochs": "1", "--seeds": "0", "--labels": "2", "--mask-counts": "4"},
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block: where it begins, its language, its text."""

    place: str
    language: str
    text: str


class Broken(Exception):
    """Something that a document states and that is not so."""


def blocks(text: str, name: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(f"{name}:{text[: m.start()].count(chr(10)) + 1}", m[1], m[2]) for m in found]


# --- one block -------------------------------------------------------------------------------------------


def run_block(block: Block) -> None:
    """Runs a block in the current folder.

    Raises:
        Broken: naming the place.
    """
    if block.language == "python":
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        except Exception as error:
            raise Broken(f"{block.place}: {type(error).__name__}: {error}") from error
    elif block.language == "bash":
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                try:
                    run_line(words)
                except Broken as error:
                    raise Broken(f"{block.place}: '{line}': {error}") from error


def run_blocks(found: list[Block]) -> None:
    for block in found:
        run_block(block)


def run_line(words: list[str]) -> None:
    """Runs a command of ours; checks what a command of another program refers to."""
    match words:
        case ["dreamteacher", *arguments]:
            run_command(arguments)
        case ["make", target]:
            if not re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                raise Broken("no such target in the Makefile")
        case ["pip", "install", *wanted]:
            for requirement in wanted:
                if not requirement.startswith("-"):
                    check_requirement(requirement)
        case ["git", "clone", address] if address.startswith("https://"):
            pass
        case ["cd", folder] if (
            folder == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
        ):
            pass
        case ["torchrun", *rest] if "dreamteacher" in rest:
            asked = get_args_parser().parse_args(rest)  # what torchrun itself takes
            verb, *arguments = asked.training_script_args
            if not asked.module or verb not in cli.TOGETHER:
                raise Broken(f"'{verb}' runs in one process")
            run_command([verb, *arguments])
        case ["sbatch", file, *arguments]:
            if subprocess.run(["bash", "-n", str(ROOT / file)]).returncode:
                raise Broken("bash does not understand it")
            run_command(["pretrain", *arguments])
        case ["python", "-m", module, *_]:
            if importlib.util.find_spec(module) is None:
                raise Broken("no such module")
        case ["python", file, *_]:
            if not (ROOT / file).is_file():
                raise Broken("no such file")
            compile((ROOT / file).read_text(), file, "exec")
        case _:
            raise Broken("no command that this test knows; fence it as text")


def run_command(arguments: list[str]) -> None:
    """Parses a command of ours as it is written, then runs it with the settings of `SMALL`."""
    from dreamteacher.runtime.errors import UserError

    verb, *rest = arguments
    if verb in cli.VERBS and "--help" not in rest:
        config = cli.named(cli.VERBS[verb].config)
        try:
            cli.parse(config, verb, rest)
        except UserError as error:
            raise Broken(str(error)) from error
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([verb, *replaced(rest, SMALL.get(verb, {}))])
        except SystemExit as stop:  # --help
            code = stop.code
    if code:
        raise Broken(f"exit code {code}: {err.getvalue()}")


def replaced(arguments: list[str], settings: dict[str, str]) -> list[str]:
    """Arguments with these settings instead of their own.

    >>> replaced(["--a", "1", "2", "--b", "3"], {"--a": "5 6"})
    ['--b', '3', '--a', '5', '6']
    """
    kept, keep = [], True
    for word in arguments:
        if word.startswith("--"):
            keep = word.split("=")[0] not in settings
        if keep:
            kept.append(word)
    return kept + [word for name, value in settings.items() for word in (name, *value.split())]


def check_requirement(requirement: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = " ".join([*project["dependencies"], *(d for e in extras.values() for d in e)])
    found = re.fullmatch(r"([\w.-]+?)(?:\[([\w,-]+)\])?(?:==([\w.]+))?", requirement)
    if found is None:
        raise Broken(f"'{requirement}' is not understood")
    name, chosen, version = found.groups()
    if name in (".", project["name"]):
        unknown = [e for e in (chosen or "").split(",") if e and e not in extras]
        if unknown:
            raise Broken(f"pyproject.toml has no extra {unknown}")
    elif name == demo.PACKAGE:
        if version != demo.VERSION:
            raise Broken(f"the demo wants version {demo.VERSION}")
    elif not re.search(rf"(^| ){re.escape(name)}\b", needed):
        raise Broken(f"'{name}' is nowhere in pyproject.toml")


# --- the folder that blocks run in -----------------------------------------------------------------------


def classes(folder: Path, names: tuple[str, ...], count: int, first: int = 0) -> None:
    """Grey noise, darker in each class than in the one before."""
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            generator = torch.Generator().manual_seed(first + 1000 * c + i)
            pixels = torch.randint(128 * (1 - c), 256 - 128 * c, (64 * 64,), generator=generator)
            Image.frombytes("L", (64, 64), bytes(pixels.tolist())).save(folder / name / f"{i}.png")


def masked(images: Path, masks: Path, count: int) -> None:
    """Images with a bright square somewhere, and black and white masks of it."""
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True)
    for i in range(count):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (4 + i, 20, 36 + i, 52))
        mask.save(masks / f"{i}.png")
        mask.point(lambda v: 40 + v // 2).save(images / f"{i}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents name: photos, photos-test, masked, masks, unlabelled, and X-rays for the demo."""
    root = tmp_path_factory.mktemp("docs")
    classes(root / "photos", ("cat", "dog"), 8)
    classes(root / "photos-test", ("cat", "dog"), 8, first=100)
    classes(root / "unlabelled", (".",), 16, first=200)
    masked(root / "masked", root / "masks", 16)
    classes(root / "xrays" / "train", ("NORMAL", "PNEUMONIA"), 16)
    classes(root / "xrays" / "test", ("NORMAL", "PNEUMONIA"), 16, first=100)
    masked(root / "xrays" / "test" / "NORMAL", root / "xrays" / "masks" / "test" / "NORMAL", 16)
    return root


@pytest.fixture
def place(folders: Path, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders as current folder; sampling and fine-tuning in few steps."""
    shutil.copytree(folders, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(DiffusionTeacher.__init__.__kwdefaults__, "sampling_steps", 2)
    for config in (FinetuneConfig, SegmentConfig):  # of the demo, which has no setting for it
        monkeypatch.setitem(config.__init__.__kwdefaults__, "steps", 2)
    if "chest-xray-64" not in EMBEDDED:  # a checkout without the embedded weights
        monkeypatch.setitem(EMBEDDED, "chest-xray-64", tiny_teacher)
    return tmp_path / "here"


def runnable(path: Path) -> list[Block]:
    return [b for b in blocks(path.read_text(), path.name) if b.language in ("bash", "python")]


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in DOCUMENTS if runnable(p)], ids=lambda p: p.name)
def test_blocks_run(path: Path, place: Path) -> None:
    run_blocks(runnable(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_block_has_a_known_language(path: Path) -> None:
    assert {b.language for b in blocks(path.read_text(), path.name)} <= {"bash", "python", "text"}


# --- links and names -------------------------------------------------------------------------------------


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def dead_links(path: Path) -> list[str]:
    """Relative links and images whose file, or heading in it, does not exist."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            dead.append(target)
    return dead


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings, as GitHub names them."""
    heads = re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def wrong_names(text: str) -> list[str]:
    """Verbs, settings and files in `code` that do not exist."""
    code = re.findall(r"`([^`\n]+)`", prose(text))
    verbs = [m for c in code for m in re.findall(r"^dreamteacher ([a-z][\w-]*)", c)]
    verbs += re.findall(r"^\s*dreamteacher ([a-z][\w-]*)", text, flags=re.MULTILINE)
    wrong = [verb for verb in verbs if verb not in cli.VERBS]
    known = {"--help", "--version"}
    for verb in cli.VERBS.values():
        known |= set(cli._flags(cli.named(verb.config)))
    for c in code:
        if not re.match(r"(pip|python|git|pytest|torchrun|[A-Z_]+=)", c):
            wrong += [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", c) if flag not in known]
        if re.fullmatch(r"[\w/]+\.py", c):
            places = (ROOT, ROOT / "dreamteacher", ROOT / "tests")
            wrong += [] if any((place / c).is_file() for place in places) else [c]
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_names_exist(path: Path) -> None:
    assert wrong_names(path.read_text()) == []


# --- this harness ----------------------------------------------------------------------------------------

SAMPLE = """\
# Sample

A [link](#a-heading-of-2-parts), and `dreamteacher list`, `--images`, `distill/pretrain.py`.

## A heading, of 2 parts

```bash
make test
pip install --editable '.[dev]'
# a comment
dreamteacher list tasks   # another
HF_HUB_OFFLINE=1 dreamteacher pretrain --images photos --student test_resnet --out runs/a \\
    --batch-size 4000 --epochs 7 --dry-run
dreamteacher pretrain --help
```

```text
rm -rf everything
```

```python
from pathlib import Path

assert Path("photos/cat/0.png").exists() and not Path("runs").exists()
```
"""
WRONG = {
    "verb": ("list tasks", "lists tasks"),
    "flag": ("--epochs 7", "--epoch 7"),
    "value of a setting that is replaced": ("--epochs 7", "--epochs seven"),
    "folder": ("--images photos", "--images fotos"),
    "student": ("test_resnet", "test_resnot"),
    "make target": ("make test", "make tset"),
    "extra": ("[dev]", "[devel]"),
    "package": ("'.[dev]'", "numpi"),
    "program": ("make test", "rm -rf runs"),
    "file": ("make test", "python missing.py"),
    "module": ("make test", "python -m pytset"),
    "python": ("photos/cat/0.png", "photos/cat/99.png"),
}


def test_a_sample_runs(place: Path) -> None:
    found = blocks(SAMPLE, "sample")
    assert [b.language for b in found] == ["bash", "text", "python"]
    assert found[0].place == "sample:7"
    run_blocks(found)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_sample_fails(what: str, place: Path) -> None:
    right, wrong = WRONG[what]
    assert right in SAMPLE
    with pytest.raises(Broken, match="sample:"):
        run_blocks(blocks(SAMPLE.replace(right, wrong), "sample"))


def test_replaced_settings() -> None:
    assert replaced(["--a", "1", "2", "--b=3"], {"--a": "5 6"}) == ["--b=3", "--a", "5", "6"]
    assert replaced(["what", "--a=1", "--c"], {"--a": "2"}) == ["what", "--c", "--a", "2"]


def test_wrong_links_and_names_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(SAMPLE)
    assert dead_links(page) == []
    assert wrong_names(SAMPLE) == []
    page.write_text(SAMPLE + "[x](page.md#sample) ![y](no.png) [z](page.md#no) [w](https://example.org)\n")
    assert dead_links(page) == ["no.png", "page.md#no"]
    text = (
        "`dreamteacher lists` `--epoch 3` `pip --quiet` `missing.py`\n```bash\ndreamteacher trian --x\n```\n"
    )
    assert wrong_names(text) == ["lists", "trian", "--epoch", "missing.py"]
