"""What `import mlxq` may and may not do, and which way imports may point."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlxq

PACKAGE = Path(mlxq.__file__).parent

#: Later layers may import earlier ones, never the reverse.
LAYERS = [
    "errors",
    "types",
    "api",
    "formats",
    "ops",
    "checkpoint",
    "architectures",
    "runtime",
    "plan",
    "calibration",
    "quantizers",
    "writers",
    "evaluate",
    "conversion",
    "cli",
]
#: `runtime` and `evaluate` stand beside the stages that make a result: they never see them, nor these `runtime`.
#: Calibration runs the model.
FORBIDDEN = {(s, "runtime") for s in ("plan", "quantizers", "writers")} | {("evaluate", "quantizers")}
#: Stages that need NumPy alone when they are imported.
LIGHT = ("formats", "checkpoint", "plan", "writers", "quantizers")
HEAVY = {"mlx", "mlx_lm", "transformers", "huggingface_hub", "gguf", "rich", "tokenizers", "typer"}


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def layer(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path):
    """Modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "mlxq":
                yield from ((f"mlxq.{alias.name}", node) for alias in node.names)
            else:
                yield node.module, node


def test_imports_point_downstream_only():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        here = layer(path)
        for name, _ in imports(path):
            parts = name.split(".")
            if parts[0] != "mlxq" or len(parts) < 2 or parts[1] not in LAYERS or parts[1] == here:
                continue
            if LAYERS.index(parts[1]) > LAYERS.index(here) or (here, parts[1]) in FORBIDDEN:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_every_module_belongs_to_a_layer():
    assert {layer(p) for p in PACKAGE.rglob("*.py")} - set(LAYERS) == {"__init__"}


@pytest.mark.parametrize("stage", LIGHT)
def test_light_stages_import_numpy_alone(stage):
    modules = [f"mlxq.{stage}.{p.stem}" for p in (PACKAGE / stage).glob("*.py") if p.stem != "__init__"]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\nprint(*sys.modules)"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert {m.split(".")[0] for m in done.stdout.split()} & HEAVY == set()


def test_import_changes_nothing_and_loads_nothing_heavy():
    code = (
        "import os, resource, signal, sys, threading, warnings, locale\n"
        "def state():\n"
        "    return (dict(os.environ), [resource.getrlimit(getattr(resource, n)) for n in dir(resource)"
        " if n.startswith('RLIMIT_')], [signal.getsignal(s) for s in signal.valid_signals()],"
        " threading.active_count(), list(warnings.filters), os.getcwd(), sys.excepthook, locale.setlocale(0))\n"
        "before = state()\nimport mlxq\nassert state() == before\n"
        f"print({{m.split('.')[0] for m in sys.modules}} & {HEAVY | {'numpy'}})"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")


def test_import_is_fast():
    """The bar is 0.3 s; the least of three runs, since other processes only ever add."""

    def seconds(code):
        began = time.perf_counter()
        python(code)
        return time.perf_counter() - began

    assert min(seconds("import mlxq") for _ in range(3)) < 0.3


def test_public_names_resolve_and_are_listed():
    assert set(mlxq.__all__) == {"__version__", *mlxq._EXPORTS}
    for name in mlxq.__all__:
        assert getattr(mlxq, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = mlxq.nothing_like_it
    assert callable(mlxq.convert)


def test_public_functions_have_docstrings():
    for name in mlxq.__all__:
        if name != "__version__":
            assert getattr(mlxq, name).__doc__, name


def test_version_agrees_with_the_metadata():
    from importlib.metadata import version

    assert version("mlxq") == mlxq.__version__
