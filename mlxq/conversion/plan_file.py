"""The choice for each matrix as a file, to be made again: for another conversion, or with a few lines changed by hand.

    {"format": "mlxq plan 1", "kind": "mlx", "method": "gptq", "tensors": {"model.layers.0.mlp.up_proj.weight": "4:64"}}

Values are `BITS:GROUP` or `float` for an MLX directory, and for a GGUF file, with its names, ggml types. They are given
to the planner as `--tensor-type` and `--keep` are. What holds the source's own codes is left out: it stays what it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.conversion.cost_file import grid_of, grid_text
from mlxq.errors import PlanError
from mlxq.plan.gguf_file_types import FILE_TYPES
from mlxq.plan.gguf_mixes import stays_float
from mlxq.plan.planner import Plan
from mlxq.types import TensorPlan
from mlxq.writers.files import writing

FORMAT = "mlxq plan 1"
MLX, GGUF = "mlx", "gguf"
_FLOAT = "float"


@dataclass(frozen=True)
class PlanFile:
    """What is in a file of choices.

    Attributes:
        path: the file.
        kind: `mlx` or `gguf`.
        method: how codes are chosen, where nothing else is asked for; `type` is the same for `--type`.
        tensors: name -> choice.
    """

    path: Path
    kind: str
    method: str | None
    type: str | None
    tensors: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> PlanFile:
        """Raises PlanError where the file is none of ours."""
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']!r}, not {FORMAT!r}")
            tensors = {str(name): str(choice) for name, choice in head["tensors"].items()}
            for choice in tensors.values():
                if choice != _FLOAT:
                    grid_of(choice)
            return cls(path, str(head["kind"]), head.get("method"), head.get("type"), tensors)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise PlanError(f"{path}: not a plan: {e}") from e

    def check_kind(self, kind: str) -> None:
        """Raises PlanError where it is for another kind of output."""
        if self.kind != kind:
            what = {MLX: "an MLX directory", GGUF: "a GGUF file"}
            raise PlanError(f"{self.path}: a plan for {what.get(self.kind, repr(self.kind))}, not for {what[kind]}")

    @property
    def tensor_types(self) -> tuple[str, ...]:
        return tuple(f"^{re.escape(name)}$={choice}" for name, choice in self.tensors.items() if choice != _FLOAT)

    @property
    def keep(self) -> tuple[str, ...]:
        return tuple(f"^{re.escape(name)}$" for name, choice in self.tensors.items() if choice == _FLOAT)

    def checked(self, on_plan: Callable[[Plan], None] | None) -> Callable[[Plan], None]:
        """`on_plan`, after a look whether the file says something of all that is quantized."""

        def check(plan: Plan) -> None:
            for p in plan.tensors:
                if p.action in ("quantize", "requantize") and not p.reason.startswith("--tensor-type"):
                    raise PlanError(f"{self.path}: says nothing of {p.info.name}; it was made for another model")
            if on_plan:
                on_plan(dataclasses.replace(plan, notes=(*plan.notes, f"bits as {self.path} says")))

        return check


def write_plan(path: Path, plan: Plan, stored_names: Mapping[str, str]) -> None:
    """Write the choices of a plan; `stored_names` are those of a GGUF file, none for a directory.

    Raises:
        OutputError: the file cannot be written.
    """
    kind = GGUF if stored_names else MLX
    tensors = {}
    for p in plan.tensors:
        name = stored_names.get(p.info.name, p.info.name)
        if (choice := _choice(p, name, kind)) is not None:
            tensors[name] = choice
    method = next((p.method for p in plan.tensors if p.action in ("quantize", "requantize")), None)
    content: dict[str, Any] = {"format": FORMAT, "kind": kind, "method": method}
    if plan.dtype in FILE_TYPES and kind == GGUF:
        content["type"] = plan.dtype
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        partial.write_text(json.dumps(content | {"tensors": tensors}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def _choice(plan: TensorPlan, name: str, kind: str) -> str | None:
    """What is said of a tensor; None of one that is no matrix, or stays what it is."""
    if plan.action == "repack":
        return None
    if kind == GGUF:
        return None if stays_float(name, plan.info.shape) else plan.dtype
    if plan.spec is not None:
        return grid_text(plan.spec)
    return None if plan.info.module == "other" else _FLOAT
