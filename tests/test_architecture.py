"""The house rules, read from the source: who may import whom, and that the packages are ours."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from launch.packages import PACKAGES, ROOT

# launch -> train -> eval -> {model, data} -> conf; every package may import itself.
MAY_IMPORT = {
    "conf": set(),
    "data": {"conf"},
    "model": {"conf"},
    "eval": {"conf", "data", "model"},
    "train": {"conf", "data", "model", "eval"},
    "launch": {"conf", "data", "model", "eval", "train"},
}
HEAVY = {"deepspeed", "transformers", "datasets", "wandb", "matplotlib"}
FORBIDDEN_CALLS = {"eval", "exec"}
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def _imports(tree: ast.AST) -> list[tuple[str, int]]:
    """(top-level package, line) of every import in a tree, function bodies included."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found.append(((node.module or "").split(".")[0], node.lineno))
    return found


def _at_import_time(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without `if TYPE_CHECKING` and `if __name__` blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            text = ast.unparse(node.test)
            return None if "TYPE_CHECKING" in text or "__name__" in text else self.generic_visit(node)

    return Strip().visit(tree)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_sources_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert set(MAY_IMPORT) == set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[package] | {package}
    for imported, line in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        if imported in PACKAGES or imported == "tests":
            assert imported in allowed, f"{_name(path)}:{line} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_heavy_imports_wait_for_their_function(path: Path) -> None:
    for imported, line in _imports(_at_import_time(ast.parse(path.read_text(encoding="utf-8")))):
        assert imported not in HEAVY, f"{_name(path)}:{line} imports {imported} at import time"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_pickle_no_shell_no_eval(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        where = f"{_name(path)}:{node.lineno} calls {name}"
        assert name not in FORBIDDEN_CALLS, where
        assert not name.startswith(("pickle.", "os.system", "torch.load", "torch.save")), where
        assert not any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords), where


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_ours(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / name / "__init__.py"


def test_packaging_lists_every_package() -> None:
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = ast.literal_eval(text.split("\npackages = ", 1)[1].split("]", 1)[0] + "]")
    assert set(listed) == folders


def test_help_loads_no_torch() -> None:
    """`moba --help` answers at once: neither torch nor anything heavy is imported for it."""
    code = "import sys; from launch.cli import main; main(['--help']); print(*sorted(sys.modules), sep=',')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split(","))
    assert not loaded & {"torch", "numpy", *HEAVY}


def test_rules_catch_a_breach() -> None:
    """The readers above see what they should: a bad file would fail."""
    tree = ast.parse("import train\nfrom eval.run import run\ndef f():\n    import deepspeed\n")
    assert _imports(tree) == [("train", 1), ("eval", 2), ("deepspeed", 4)]
    assert ("deepspeed", 4) not in _imports(_at_import_time(tree))
