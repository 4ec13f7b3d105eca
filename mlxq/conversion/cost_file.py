"""Measured costs as a file, to choose bits by again: for other budgets, and for MLX's grids and ggml's types alike."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxq.calibration.sensitivity import Sensitivity
from mlxq.errors import PlanError
from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.plan.budget import Grid
from mlxq.types import QuantSpec
from mlxq.writers.files import writing

FORMAT = "mlxq costs 3"
#: The second had MLX's grids alone.
_READABLE = ("mlxq costs 2", FORMAT)


@dataclass(frozen=True)
class Costs:
    """What was measured of a model, to choose bits by and to weight tokens with.

    Attributes:
        by_tensor: parameter -> grid -> nats per token; a grid is MLX's, or the name of a ggml type.
        sensitivity: what they rest on.
        text: SHA-256 of the token sequences.
    """

    by_tensor: Mapping[str, Mapping[Grid, float]]
    sensitivity: Sensitivity
    text: str

    def of_kind(self, kind: type) -> dict[str, dict[Grid, float]]:
        """Those of MLX's grids (`QuantSpec`) or of ggml's types (`str`) alone; all tensors are there."""
        return {
            name: {grid: cost for grid, cost in costs.items() if isinstance(grid, kind)}
            for name, costs in self.by_tensor.items()
        }

    def write(self, path: Path) -> None:
        """As a NumPy archive, to be used again: costs as JSON, sensitivities as arrays (token weights in float16).

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {
            name: {grid_text(grid): cost for grid, cost in costs.items()} for name, costs in self.by_tensor.items()
        }
        s = self.sensitivity
        head = {"format": FORMAT, "text": self.text, "tokens": s.n_tokens, "tensors": tensors}
        arrays = {"embedding": s.embedding}
        arrays |= {f"squares/{name}": a for name, a in s.squares.items()}
        arrays |= {f"weights/{name}": np.minimum(a, 6e4).astype(np.float16) for name, a in s.token_weights.items()}
        partial = path.with_name(f".{path.name}.partial")
        with writing(path):
            with open(partial, "wb") as f:
                np.savez(f, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
            os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Costs:
        """Raises PlanError where the file is none of ours."""
        try:
            with np.load(path, allow_pickle=False) as found:
                head = json.loads(found["head"].tobytes())
                if head["format"] not in _READABLE:
                    raise ValueError(f"its format is {head['format']!r}, not {FORMAT!r}")
                tensors = {
                    name: {grid_of(key): float(cost) for key, cost in costs.items()}
                    for name, costs in head["tensors"].items()
                }
                squares, weights = (
                    {k.removeprefix(f"{kind}/"): found[k] for k in found.files if k.startswith(f"{kind}/")}
                    for kind in ("squares", "weights")
                )
                weights = {k: a.astype(np.float32) for k, a in weights.items()}
                sensitivity = Sensitivity(squares, weights, found["embedding"], int(head["tokens"]))
                return cls(tensors, sensitivity, str(head["text"]))
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
            raise PlanError(f"{path}: not a file of measured costs: {e}") from e


def grid_text(grid: Grid) -> str:
    """`4:64`, or the name of a ggml type."""
    return grid if isinstance(grid, str) else f"{grid.bits}:{grid.group_size}"


def grid_of(text: str) -> Grid:
    """The grid that such a text names.

    Raises:
        ValueError: none.
    """
    if text in BLOCK_FORMATS:
        return text
    bits, _, group_size = text.partition(":")
    try:
        return QuantSpec(int(bits), int(group_size))
    except ValueError:
        raise ValueError(f"{text!r} is no grid: BITS:GROUP or a ggml type") from None
