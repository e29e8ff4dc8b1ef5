"""Imports between packages point one way: from later rooms of the house to earlier ones, also inside functions."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# A package may import those before it, and itself.
ORDER = (
    *(
        "models",
        "core",
        "runtime",
        "checkpoint",
        "data",
        "objectives",
        "optim",
        "recipes",
        "engine",
        "planning",
        "inference",
        "runs",
    ),
    *("training", "testing", "commands"),
)


def package_of(module: str) -> str | None:
    """The room of a module; None for what stands above all rooms: trainer itself, its version, its command line."""
    top, *rest = module.split(".")
    if top == "models":
        return "models"
    return rest[0] if rest and not rest[0].startswith("__") else None


def imports_of(text: str) -> set[str]:
    """Modules of ours that a file names, at its top or within functions: `from a import b` names a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("trainer.relative")
    return {name for name in found if name.split(".")[0] in ("models", "trainer")}


def wrong_imports(module: str, text: str) -> list[str]:
    last = ORDER.index(package_of(module) or ORDER[-1])
    allowed = {None, *ORDER[: last + 1]}
    return [f"{module} imports {name}" for name in sorted(imports_of(text)) if package_of(name) not in allowed]


def sources():
    for folder in ("trainer", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def test_packages_import_earlier_ones_alone():
    wrong = [line for module, path in sources() for line in wrong_imports(module, path.read_text(encoding="utf-8"))]
    assert wrong == []


def test_every_package_has_its_place():
    assert {package_of(module) for module, _ in sources()} - {None} == set(ORDER)


@pytest.mark.parametrize(
    "module, text",
    [
        ("trainer.core.files", "def f():\n    from trainer.data import stream\n"),
        ("trainer.engine.base", "import trainer.planning.memory"),
        ("models.hlb", "from trainer.core.errors import UserError"),
        ("trainer.runs.folder", "from trainer import commands"),
        ("trainer.data.index", "from . import mds"),
        ("trainer.optim", "from trainer.nowhere import x"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_seen(module, text):
    assert len(wrong_imports(module, text)) == 1


def test_core_imports_no_torch():
    modules = [module for module, _ in sources() if package_of(module) == "core"]
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def after_main(*words: str, code: str) -> None:
    """Run `code` in a process of its own after the command line `words`."""
    begin = f"import gc, sys; from trainer.__main__ import main; sys.argv[1:] = {list(words)}; main(); "
    subprocess.run([sys.executable, "-c", begin + code], check=True, cwd=ROOT)


def test_the_folder_of_a_run_is_told_without_torch():
    """launch/multinode.sh asks for it before every try, also on a login node."""
    after_main("train", "configs/hlb.yaml", "--print_run_dir", code="assert 'torch' not in sys.modules")


def test_imports_are_not_interrupted_by_garbage_collections():
    code = (
        "count = lambda: sum(generation['collections'] for generation in gc.get_stats()); "
        "before = count(); objects = [[] for _ in range(50_000)]; assert count() == before"
    )
    after_main("--help", code=code)
