"""Model classes of `mlx_lm.models`, imported without the side effects of importing `mlx_lm`.

`import mlx_lm` lowers the process's limit of open files, sets environment variables and loads transformers.
The model files need none of that, so they are imported under a private package name whose search path is
mlx-lm's own directory. The private copy is ours alone: the runtime can give it CPU attention without touching
what other users of mlx-lm in the same process see.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import re
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxq.errors import CheckpointError

_PRIVATE = "mlxq._mlx_lm"
_preparing = threading.Lock()
#: Functions that the runtime may give a version of its own.
_OVERRIDABLE = (("models.base", "scaled_dot_product_attention"), ("models.activations", "swiglu"))

#: A file name of mlx-lm without its ending: hyphens occur (`nemotron-nas`), dots and slashes never.
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def _package_dir() -> Path:
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError("the package mlx-lm is not installed: pip install mlx-lm")
    return Path(next(iter(spec.submodule_search_locations)))


def import_private(module: str) -> types.ModuleType:
    """Import `mlx_lm.<module>` as a private copy, e.g. `import_private("models.cache")`."""
    with _preparing:
        _prepare()
    return importlib.import_module(f"{_PRIVATE}.{module}")


@functools.cache
def _prepare() -> None:
    """Make the package, before any model file can take a function by name that is to be overridable."""
    package = types.ModuleType(_PRIVATE)
    package.__path__ = [str(_package_dir())]
    sys.modules[_PRIVATE] = package
    for name, attribute in _OVERRIDABLE:
        owner = importlib.import_module(f"{_PRIVATE}.{name}")
        setattr(owner, attribute, _Overridable(getattr(owner, attribute)))


class _Overridable:
    """A function of mlx-lm that can be replaced even after model files have imported it by name."""

    def __init__(self, original: Callable[..., Any]):
        self.original = self.current = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)


def override(module: str, attribute: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of the private copy by `make(original)`, for every model, imported already or not."""
    if (module, attribute) not in _OVERRIDABLE:
        raise KeyError(f"{module}.{attribute} cannot be overridden: {_OVERRIDABLE}")
    function = getattr(import_private(module), attribute)
    function.current = make(function.original)


@functools.cache
def _tables() -> dict[str, dict[Any, str]]:
    """The remapping tables of `mlx_lm/utils.py`, read as data so that the file is not executed."""
    wanted = {"MODEL_REMAPPING": {}, "MODEL_ARCHITECTURE_REMAPPING": {}}
    tree = ast.parse((_package_dir() / "utils.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in wanted:
                wanted[name] = ast.literal_eval(node.value)
    return wanted


def supported() -> list[str]:
    """Names of the model files that mlx-lm ships, and their aliases."""
    files = (p.stem for p in (_package_dir() / "models").glob("*.py"))
    return sorted({n for n in files if not n.startswith("__")} | set(_tables()["MODEL_REMAPPING"]))


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """`(Model, ModelArgs)` for a `config.json`.

    Raises:
        CheckpointError: mlx-lm has no such architecture; the message names it and near matches.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _MODEL_TYPE.fullmatch(model_type):
        raise CheckpointError(f"config.json: model_type is {model_type!r}, which names no architecture")
    tables = _tables()
    for architecture in _architectures(config):
        remapped = tables["MODEL_ARCHITECTURE_REMAPPING"].get((model_type, architecture))
        if remapped:
            name = remapped
            break
    else:
        name = tables["MODEL_REMAPPING"].get(model_type, model_type)
    if not (_package_dir() / "models" / f"{name}.py").is_file():
        near = difflib.get_close_matches(model_type, supported(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise CheckpointError(f"unknown architecture {model_type!r}: the installed mlx-lm has no model for it{hint}")
    try:
        module = import_private(f"models.{name}")
        return module.Model, module.ModelArgs
    except (ImportError, AttributeError) as e:
        raise CheckpointError(f"architecture {model_type!r} cannot be used here: {e}") from e


def _architectures(config: dict[str, Any]) -> list[str]:
    """The class names of Hugging Face that config.json lists."""
    value = config.get("architectures") or []
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(a, str) for a in listed):
        raise CheckpointError(f"config.json: architectures is {value!r}, but must be a list of class names")
    return listed


def build_model(config: dict[str, Any]) -> Any:
    """A model with lazily initialized parameters: shapes are known, nothing is allocated.

    Raises:
        CheckpointError: the architecture is unknown, or config.json lacks a value or has a wrong one.
    """
    model_class, args_class = model_classes(config)
    try:
        return model_class(args_class.from_dict(config))
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError) as e:
        what = re.split(r"\n| The following", str(e))[0].replace("__init__() ", "") or type(e).__name__
        raise CheckpointError(f"config.json does not describe a {config.get('model_type')} model: {what}") from e
