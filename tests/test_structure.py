"""The shape of the package: imports point down, few dependencies, no foreign code runs, all is documented."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import dreamteacher
from dreamteacher.cli import main as cli
from tests.places import ROOT, TESTS

PACKAGE = Path(dreamteacher.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# Five floors, the lowest first: the packages (and modules) at the top of this package. One may import from its own
# floor and from lower ones, as long as no circle arises between them.
FLOORS = [
    {"runtime", "losses", "metrics", "spec"},
    {"data", "models"},
    {"teachers", "downstream", "exports"},
    {"distill", "reports", "testing"},
    {"cli", "face", "__main__"},
]
# Of those that could by their floor, these never do, not even by way of others.
STRANGERS = [
    ("teachers", "models"),
    ("models", "teachers"),
    ("downstream", "teachers"),
    ("downstream", "distill"),
    ("distill", "downstream"),
    ("data", "models"),
    ("models", "data"),
    ("exports", "data"),
    ("exports", "teachers"),
]


def room(module: str) -> str:
    """The package at the top, or the module there, that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
    found = [i for i, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert len(found) == 1, f"{module} is on no floor: say in {Path(__file__).name} where it belongs"
    return found[0]


def imports_of(tree: ast.AST, module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that a tree imports, wherever in it: absolute names, submodules resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in FILES else node.module), node


def own_imports(module: str, tree: ast.AST | None = None) -> set[str]:
    """The modules of this package that a module (or a part of it) imports."""
    found = {name for name, _ in imports_of(tree or TREES[module], module)}
    return {name for name in found if name.split(".")[0] == "dreamteacher"} - {module}


OWN = {module: own_imports(module) for module in FILES}


def at_top(module: str) -> ast.Module:
    """What runs when the module is imported: no bodies of functions."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else node

    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    return Cut().visit(tree)


# --- imports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    for name in OWN[module]:
        assert name in FILES, f"{module} imports {name}, which does not exist"
        if module != "dreamteacher" and room(name):  # the face, in __init__, is above all; its import is lazy
            assert floor(name) <= floor(module), f"{module} imports {name}, which lies above it"


@pytest.mark.parametrize(("who", "whom"), STRANGERS, ids=[f"{who}-{whom}" for who, whom in STRANGERS])
def test_some_never_know_of_each_other(who: str, whom: str) -> None:
    modules = [m for m in FILES if room(m) == who]
    assert modules
    assert any(room(m) == whom for m in FILES)
    for module in modules:
        reached = reachable(module) - {"dreamteacher"}
        assert whom not in {room(m) for m in reached}, f"{module} reaches {sorted(reached)}"


def test_there_is_no_circle_between_packages() -> None:
    above = {
        r: {room(n) for m in FILES if room(m) == r for n in OWN[m]} - {r, ""} for r in map(room, FILES) if r
    }
    order: list[str] = []
    while len(order) < len(above):
        free = sorted(r for r in above if r not in order and above[r] <= set(order))
        assert free, f"a circle among {sorted(set(above) - set(order))}"
        order += free


def reachable(module: str) -> set[str]:
    seen: set[str] = set()
    todo = [module]
    while todo:
        for name in OWN.get(todo.pop(), ()):
            if name not in seen and name != "dreamteacher":
                seen.add(name)
                todo.append(name)
    return seen


def test_there_is_no_import_cycle() -> None:
    for module in FILES:
        assert module not in reachable(module), f"{module} comes back to itself through its imports"


def reached_at_top(module: str) -> set[str]:
    """Modules of ours that run when one is imported, the packages that hold them among them."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [*own_imports(name, at_top(name)), *([name.rpartition(".")[0]] if "." in name else [])]
    return seen


SLOW = {"torch", "torchvision", "timm", "diffusers", "numpy", "PIL", "safetensors", "tqdm"}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_settings_are_known_before_slow_libraries_are_imported(verb: str) -> None:
    """`dreamteacher VERB --help` and a mistyped flag wait for nothing but what reads the flags."""
    for start in ("dreamteacher.cli.main", cli.VERBS[verb].config.partition(":")[0]):
        for module in reached_at_top(start):
            slow = {name.split(".")[0] for name, _ in imports_of(at_top(module), module)} & SLOW
            assert not slow, f"{verb}: {module} imports {slow}"


def test_importing_the_package_imports_no_torch() -> None:
    code = "import dreamteacher, sys; print(dreamteacher.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [dreamteacher.__version__, "False"]


# --- dependencies -------------------------------------------------------------------------------------------

IMPORT_NAMES = {
    "pillow": "PIL",
    "huggingface-hub": "huggingface_hub",
    "mlflow-skinny": "mlflow",
    "faster-coco-eval": "faster_coco_eval",
}


def declared(requirements: list[str]) -> set[str]:
    names = [re.split(r"[<>=!~\[ ;]", r)[0] for r in requirements]
    return {IMPORT_NAMES.get(name, name) for name in names}


def required_by(package: str) -> set[str]:
    """What an installed package needs in any case."""
    name = re.split(r"[<>=]", package)[0]
    return declared([r for r in importlib.metadata.requires(name) or [] if "extra ==" not in r])


def test_core_imports_only_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = declared(project["dependencies"])
    brought = {name for package in project["dependencies"] for name in required_by(package)}
    assert len(core - brought) <= 8
    extras = project["optional-dependencies"]
    optional = {name for extra in extras.values() if extra is not extras["dev"] for name in declared(extra)}
    used = set()
    for module, tree in TREES.items():
        for name, node in imports_of(tree, module):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "dreamteacher":
                continue
            used.add(top)
            assert top in core | optional, f"{module}:{node.lineno} imports {name}, which is not declared"
            assert top in core or node not in at_top(module).body, (
                f"{module}:{node.lineno}: {name} is optional"
            )
    assert used >= core, f"declared and never imported: {sorted(core - used)}"


def test_every_dependency_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        assert re.fullmatch(r"[a-z-]+>=[\d.]+", requirement), requirement


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_files_stay_readable(module: str) -> None:
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= 700, f"{module} has {lines} lines"


@pytest.mark.parametrize(
    "folder", sorted({p.parent for p in [*FILES.values(), *TESTS.rglob("*.py")]}), ids=str
)
def test_no_folder_hides_in_prefixes(folder: Path) -> None:
    """Three files coco_*.py are a folder coco."""
    prefixes = Counter(
        p.stem.split("_")[0] for p in folder.glob("[!_]*_*.py") if not p.stem.startswith("test_")
    )
    prefixes += Counter(p.stem.removeprefix("test_").split("_")[0] for p in folder.glob("test_*_*.py"))
    crowded = {prefix: n for prefix, n in prefixes.items() if n >= 3}
    assert not crowded, f"{folder}: {crowded}"


def test_distill_pretrain_reads_in_one_look() -> None:
    assert len(FILES["dreamteacher.distill.pretrain"].read_text(encoding="utf-8").splitlines()) <= 150


def test_no_file_is_a_drawer_for_everything() -> None:
    names = {word for module in FILES for word in re.split(r"[._]", module)}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("module", FILES)
def test_nothing_read_from_a_file_can_run_code(module: str) -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    for name, node in calls(TREES[module]):
        place = f"{module}:{node.lineno}"
        assert name not in forbidden, f"{place} calls {name}"
        assert name.split(".")[-1] not in {"extractall", "unpack_archive"}, f"{place} calls {name}"
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert keywords.get("allow_pickle") in (None, "False"), place
        assert keywords.get("shell") in (None, "False"), place
        assert keywords.get("weights_only") in (None, "True"), place
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{place} loads without weights_only=True"
    for name, node in imports_of(TREES[module], module):
        unsafe = {"dill", "joblib", "cloudpickle", "shelve", "marshal"}
        assert name.split(".")[0] not in unsafe, f"{module}:{node.lineno}"
        assert name != "pickle" or isinstance(node, ast.Import), f"{module}:{node.lineno}"
    for node in ast.walk(TREES[module]):  # only its error is of use: what torch raises for a foreign file
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            mine = ["_Unpickler"] if module.endswith("stylegan2.inert_pickle") else []
            assert node.attr in ["UnpicklingError", *mine], f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", FILES)
def test_nothing_draws_from_the_global_generator_of_python(module: str) -> None:
    assert "random" not in {name for name, _ in imports_of(TREES[module], module)}


# --- documentation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_everything_public_has_a_docstring(module: str) -> None:
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    bare = [
        f"{node.name} (line {node.lineno})"
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, f"{module}: without a docstring: {', '.join(bare)}"


@pytest.mark.parametrize("module", FILES)
def test_everything_public_is_typed(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{module}:{node.lineno} {node.name}: without a type: {bare}"
            assert node.returns is not None, f"{module}:{node.lineno} {node.name} has no return type"


@pytest.mark.parametrize("module", [m for m in FILES if not m.endswith("__main__")])
def test_examples_in_docstrings_are_true(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(m) for m in FILES if not m.endswith("__main__")]
    count = sum(len(test.examples) for m in modules for test in finder.find(m))
    assert count > 10
