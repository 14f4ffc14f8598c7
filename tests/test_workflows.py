"""What the hosting service reads: workflow files, issue forms and hooks fit their schemas, and say what we do."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONFIG = ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"
FORMS = sorted(set(CONFIG.parent.glob("*.yml")) - {CONFIG})
SCHEMAS = {"github-workflows": WORKFLOWS, "github-issue-forms": FORMS, "github-issue-config": [CONFIG]}


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Validates files by a schema that comes with check-jsonschema, without network."""
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_fit_their_schemas(schema: str) -> None:
    assert SCHEMAS[schema]
    done = check(f"vendor.{schema}", *SCHEMAS[schema])
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_job_ends_in_time() -> None:
    done = check("custom.github-workflows-require-timeout", *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_workflow_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "ci.yml"
    wrong.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:", 1))
    assert check("vendor.github-workflows", wrong).returncode == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_may_read_and_nothing_else(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^ *permissions:(?:\n +.*)+", text, flags=re.MULTILINE) == [
        "permissions:\n  contents: read"
    ]
    assert "pull_request_target" not in text
    assert "secrets." not in text
    assert "\nconcurrency:\n" in text
    uses = re.findall(r"uses: (\S+)", text)
    assert uses
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in uses)
    assert text.count("persist-credentials: false") == sum("checkout" in action for action in uses)


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.name)
def test_make_targets_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    called = re.findall(r"\bmake ([\w./-]+)$", path.read_text(), flags=re.MULTILINE)
    assert called
    for target in called:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target


def test_the_oldest_torch_and_python_are_those_of_the_package() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = {name: version for name, _, version in (d.partition(">=") for d in project["dependencies"])}
    assert f"torch=={oldest['torch']}.0 torchvision=={oldest['torchvision']}.0" in text
    assert f'python: "{project["requires-python"].removeprefix(">=")}"' in text


def test_the_suite_runs_on_lesser_processors_too() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for settings in ("ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2", "OMP_NUM_THREADS=1"):
        assert f"settings: {settings}\n" in text
