"""The rules of the layout: imports point one way, the door is light, the public names are pinned."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hftcore

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kernels": "hftcore.kernels", "hftcore": "hftcore", "bindings": "hftcore.bindings", "bench": "hftcore.bench"}
FORBIDDEN = {
    "kernels": ["hftcore.bindings", "hftcore.bench", "transformers", "peft", "typer"],
    "hftcore": ["hftcore.bindings", "hftcore.bench", "transformers", "peft", "triton", "typer", "accelerate"],
    "bindings": ["hftcore.bench", "triton"],
    "bench": [],
}


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for name, line in imports(path):
            for banned in FORBIDDEN[folder]:
                assert not f"{name}.".startswith(f"{banned}."), f"{path}:{line} imports {name}"
            if folder == "kernels" and name.startswith("hftcore"):
                assert name.startswith("hftcore.kernels"), f"{path}:{line} imports {name}"


def test_the_folder_named_kernels_imports_nothing_by_itself():
    """transformers looks for a package called `kernels`; found from the repository root, ours must be harmless."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


def test_importing_hftcore_loads_neither_triton_nor_transformers(tmp_path):
    script = "import sys, hftcore; print([name for name in ('triton', 'transformers', 'peft', 'matplotlib') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_these():
    assert hftcore.__all__ == [
        "Edit",
        "Energy",
        "FingerprintError",
        "HftcoreError",
        "NonFiniteError",
        "Pattern",
        "antidote",
        "bindings",
        "calibrate",
        "capture_energy",
        "capture_grad_norms",
        "ops",
        "panacea_perturb",
        "prune",
        "use_backend",
    ]
    assert all(hasattr(hftcore, name) for name in hftcore.__all__)
