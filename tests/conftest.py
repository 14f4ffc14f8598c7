"""What several test files share: no network, one thread, a tiny image folder, a tiny diffusion teacher.

`pytest --core-only` is for an environment without extras: what fails for the lack of one is skipped. Elsewhere nothing is.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import tomllib

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes; workers and started processes inherit it

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from PIL import Image

from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, build_unet
from dreamteacher.teachers.registry import save_teacher

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("suite", deadline=None, derandomize=True, database=None, phases=PHASES)
settings.load_profile("suite")

ROOT = Path(__file__).parent.parent
IMPORTED_AS = {"scikit-learn": "sklearn", "mlflow-skinny": "mlflow"}


def _missing_extras() -> dict[str, set[str]]:
    """The extras of which something is not installed, each with those libraries as they are imported."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    missing = {}
    for extra, requirements in extras.items():
        names = [re.split(r"[<>=~!\[; ]", r)[0] for r in requirements]
        imported = [IMPORTED_AS.get(name, name.replace("-", "_")) for name in names]
        missing[extra] = {name for name in imported if importlib.util.find_spec(name) is None}
    return {extra: names for extra, names in missing.items() if names}


MISSING_EXTRAS = _missing_extras()


def _skipped_for(error: BaseException | None, printed: str = "") -> str | None:
    """Why a test that failed so is skipped: it imports, or was asked to install, an extra that is not here."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        name = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
        if any(name in names for names in MISSING_EXTRAS.values()):
            return f"needs {name}"
        error = error.__cause__ or error.__context__
    asked = re.findall(r"dreamteacher\[(\w+)\]", printed)
    return next((f"needs the extra '{extra}'" for extra in asked if extra in MISSING_EXTRAS), None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--core-only", action="store_true", help="skip what needs an extra that is not installed"
    )


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """With --core-only: skips a file of tests that imports an extra which is not installed."""
    report = yield
    call = getattr(report, "call", None)
    if collector.config.option.core_only and report.failed and call is not None and call.excinfo is not None:
        reason = _skipped_for(call.excinfo.value)
        if reason:
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """With --core-only: skips a test that fails because an extra is not installed."""
    report = yield
    if item.config.option.core_only and report.failed and call.excinfo is not None:
        reason = _skipped_for(call.excinfo.value, report.longreprtext + report.capstdout + report.capstderr)
        if reason:
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {reason}")
    return report


CLASSES = ("bright", "dark")
PER_CLASS = 8


@pytest.fixture(scope="session", autouse=True)
def compiled_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch.compile takes machine code from its cache that another ATEN_CPU_CAPABILITY has made, and is then wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB of its own, which really gets full: needs the right to mount one."""
    place = tmp_path / "small-disk"
    place.mkdir()
    try:
        told = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no program 'mount'")
    if told.returncode:
        pytest.skip(f"no disk can be mounted: {told.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 grey PNG files of 64 x 64 in bright/ and dark/: noise around 3/4 and 1/4. Do not write into it."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name, low in zip(CLASSES, (128, 0), strict=True):
        (folder / name).mkdir()
        for i in range(PER_CLASS):
            pixels = torch.randint(low, low + 128, (64 * 64,), generator=generator, dtype=torch.uint8)
            Image.frombytes("L", (64, 64), bytes(pixels.tolist())).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_spec() -> DiffusionSpec:
    """A grey U-Net on 64 x 64 pixels: patches of 2, levels at strides 2, 4, 8, 16 and 32, 8 channels each."""
    levels = 5
    return DiffusionSpec(
        unet={
            "sample_size": [32, 32],
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [8] * levels,
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "attn_norm_num_groups": 4,
        },
        patch=2,
        image_channels=1,
        size=(64, 64),
        timestep=100,
    )


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_spec: DiffusionSpec) -> Path:
    """A teacher's folder with seeded random weights. Do not write into it."""
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(tiny_spec)
    save_teacher(folder, unet.state_dict(), tiny_spec, {"name": "tiny", "licence": "CC0-1.0"})
    return folder
