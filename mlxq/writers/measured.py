"""What writing a tensor changed: its relative error, gathered from chunks that several threads write."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from mlxq.types import Action, TensorPlan

#: Sums of this size may have lost a part to underflow: 2^23 squares below float32's normal numbers.
_LEAST = 1e-30


class MeasuredErrors:
    """Relative root mean square errors by tensor."""

    def __init__(self) -> None:
        #: Squares of errors and of weights, of each chunk: added up at the end, exactly, since threads know no order.
        self._sums: dict[str, tuple[list[float], list[float]]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, w: np.ndarray, w_hat: np.ndarray) -> None:
        """Count some rows of a tensor, as they were and as they are stored; float32, of one shape."""
        self.add_squares(name, _sum_of_squares(np.subtract(w_hat, w).ravel()), _sum_of_squares(w.ravel()))

    def add_squares(self, name: str, error: float, size: float) -> None:
        """Count some rows of a tensor by the sums of squares of what changed, and of the weights."""
        with self._lock:
            errors, sizes = self._sums.setdefault(name, ([], []))
            errors.append(error)
            sizes.append(size)

    @property
    def relative_rmse(self) -> dict[str, float]:
        """Relative RMSE of each tensor that was counted; 0 where nothing changed."""
        sums = {name: (math.fsum(errors), math.fsum(sizes)) for name, (errors, sizes) in self._sums.items()}
        return {
            name: math.sqrt(error / size) if size else (math.inf if error else 0.0)
            for name, (error, size) in sums.items()
        }

    def notes(self, plans: Iterable[TensorPlan], said: Mapping[Action, str]) -> list[str]:
        """One line for each action that changed something: how many tensors, what was done (`said`), the worst."""
        errors, changed = self.relative_rmse, dict[Action, list[str]]()
        for plan in plans:
            if errors.get(plan.info.name):
                changed.setdefault(plan.action, []).append(plan.info.name)
        lines = []
        for action, what in said.items():
            names = changed.get(action, [])
            if names:
                worst = max(names, key=lambda n: errors[n])
                lines.append(f"{counted(names)} {what}; relative error up to {errors[worst]:.2g}, in {worst}")
        return lines


def counted(names: Collection[str]) -> str:
    """Such as `1 tensor`."""
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def _sum_of_squares(a: np.ndarray) -> float:
    """Of a float32 vector; 0 only where all is 0, and never beyond what a float64 holds."""
    with np.errstate(over="ignore", under="ignore"):
        total = float(np.vdot(a, a))
    if _LEAST < total < math.inf or not a.any():
        return total
    wide = a[a != 0].astype(np.float64)
    return float(np.vdot(wide, wide))
