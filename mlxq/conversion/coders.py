"""What calibration makes of a matrix: MLX's affine codes, or ggml's blocks. One signature for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import crossings, floats, ggml
from mlxq.formats.geometry import AFFINE_GROUP_SIZES
from mlxq.formats.superblocks import SUPER_BLOCK
from mlxq.plan.budget import Grid
from mlxq.plan.planner import Plan
from mlxq.quantizers import calibrated
from mlxq.quantizers import ggml as encoders
from mlxq.quantizers.curvature import Curvature
from mlxq.quantizers.ggml import block_types, feedback
from mlxq.types import QuantizedTensor, QuantSpec, TensorPlan

#: Bits and group size that are measured; other groups follow.
_BITS = (2, 3, 4, 5, 6, 8)
_BASE_GROUP = 64
#: Types that tensors get by budget: where rows are whole super-blocks, and where they are not.
_TYPES_OF_256 = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_TYPES_OF_32 = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


class Coder(Protocol):
    """`sizes`: groups of columns that a curvature's order has to keep together; `kind`: the type of its grids."""

    sizes: Sequence[int]
    kind: type

    def grids(self, K: int) -> list[Grid]:
        """Grids of rows of `K` weights whose costs are measured."""

    def completed(self, costs: Mapping[Grid, float], K: int) -> dict[Grid, float]:
        """Costs of all grids that rows of `K` weights may get, from the measured ones."""

    def with_grid(self, plan: TensorPlan, grid: Grid) -> TensorPlan:
        """The plan of a tensor with another grid."""

    def quantize(
        self,
        w: np.ndarray,
        plan: TensorPlan,
        *,
        curvature: Curvature | None = None,
        importance: np.ndarray | None = None,
        sweeps: int = 1,
    ) -> tuple[Any, np.ndarray]:
        """Codes of float32 `w` `[N, K]`, and the decoded weights: with `curvature` by error feedback, else by a search
        that weights columns by `importance` `[K]`.

        Raises:
            FormatError: a weight is not finite, or beyond the range of the planned type.
        """

    def rounded(self, w: np.ndarray, plan: TensorPlan) -> tuple[Any, np.ndarray]:
        """The same without a look at the inputs, which every method has to beat."""

    def decoded(self, codes: Any, plan: TensorPlan) -> np.ndarray:
        """The weights that codes of any number of axes stand for, float32."""

    def stacked(self, parts: Sequence[Any], shape: tuple[int, ...]) -> Any:
        """Codes of a stack of matrices from those of each; `shape` is that of the weights."""

    def joined(self, parts: Sequence[Any]) -> Any:
        """Codes of a matrix from those of its rows."""


class AffineCoder:
    """`QuantizedTensor`s by `TensorPlan.spec`."""

    sizes = AFFINE_GROUP_SIZES
    kind = QuantSpec

    def grids(self, K: int) -> list[Grid]:
        groups, base = _groups(K)
        return [QuantSpec(b, base) for b in _BITS] + [QuantSpec(4, g) for g in groups if g != base]

    def completed(self, costs: Mapping[Grid, float], K: int) -> dict[Grid, float]:
        """Those that were not measured lose what their group size loses at 4 bits."""
        groups, base = _groups(K)
        four = costs[QuantSpec(4, base)]
        ratios = {g: costs[QuantSpec(4, g)] / four if four else 1.0 for g in groups}
        return {QuantSpec(b, g): costs[QuantSpec(b, base)] * ratio for b in _BITS for g, ratio in ratios.items()}

    def with_grid(self, plan: TensorPlan, grid: Grid) -> TensorPlan:
        return replace(plan, spec=grid)

    def quantize(
        self,
        w: np.ndarray,
        plan: TensorPlan,
        *,
        curvature: Curvature | None = None,
        importance: np.ndarray | None = None,
        sweeps: int = 1,
    ) -> tuple[QuantizedTensor, np.ndarray]:
        how = {"curvature": curvature, "importance": importance, "sweeps": sweeps, "four_way": plan.four_way}
        return calibrated.quantize(w, plan.spec, plan.dtype, **how)

    def rounded(self, w: np.ndarray, plan: TensorPlan) -> tuple[QuantizedTensor, np.ndarray]:
        return calibrated.rounded(w, plan.spec, plan.dtype, four_way=plan.four_way)

    def decoded(self, codes: QuantizedTensor, plan: TensorPlan) -> np.ndarray:
        return crossings.dequantize(codes)

    def stacked(self, parts: Sequence[QuantizedTensor], shape: tuple[int, ...]) -> QuantizedTensor:
        first = parts[0]
        if len(shape) == 2:
            return first
        arrays = [np.stack([getattr(p, a) for p in parts]) for a in ("w_q", "scales", "biases")]
        arrays = [a.reshape(*shape[:-1], a.shape[-1]) for a in arrays]
        return QuantizedTensor(*arrays, first.spec, shape, first.dtype)

    def joined(self, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        first = parts[0]
        if len(parts) == 1:
            return first
        arrays = [np.concatenate([getattr(p, a) for p in parts]) for a in ("w_q", "scales", "biases")]
        return QuantizedTensor(*arrays, first.spec, (len(arrays[0]), first.shape[1]), first.dtype)


class BlockCoder:
    """Blocks of a ggml type, uint8 `[..., row_bytes]`, by `TensorPlan.dtype`."""

    sizes = block_types.SIZES
    kind = str

    def grids(self, K: int) -> list[Grid]:
        return list(_TYPES_OF_256 if K % SUPER_BLOCK == 0 else _TYPES_OF_32)

    def completed(self, costs: Mapping[Grid, float], K: int) -> dict[Grid, float]:
        return dict(costs)

    def with_grid(self, plan: TensorPlan, grid: Grid) -> TensorPlan:
        return replace(plan, dtype=grid)

    def quantize(
        self,
        w: np.ndarray,
        plan: TensorPlan,
        *,
        curvature: Curvature | None = None,
        importance: np.ndarray | None = None,
        sweeps: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        if curvature is None:
            blocks = encoders.quantize(w, plan.dtype, importance)
            return blocks, ggml.dequantize(blocks, plan.dtype)
        if not floats.all_finite(w):
            raise FormatError("a weight is NaN or infinite")
        return feedback.quantize(w, curvature, plan.dtype, sweeps=sweeps)

    def rounded(self, w: np.ndarray, plan: TensorPlan) -> tuple[np.ndarray, np.ndarray]:
        return self.quantize(w, plan)

    def decoded(self, codes: np.ndarray, plan: TensorPlan) -> np.ndarray:
        return ggml.dequantize(codes, plan.dtype)

    def stacked(self, parts: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        return np.stack(parts).reshape(*shape[:-1], -1)

    def joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)


def _groups(K: int) -> tuple[list[int], int]:
    """Legal group sizes of rows of `K` weights, and the one that all bits are measured with."""
    groups = [g for g in AFFINE_GROUP_SIZES if K % g == 0]
    return groups, _BASE_GROUP if _BASE_GROUP in groups else groups[-1]


def coder_of(plan: Plan) -> Coder:
    """The coder of a plan: block types have no `spec`, and a plan is of one kind."""
    affine = any(p.spec is not None and p.action != "keep" for p in plan.tensors)
    return AffineCoder() if affine else BlockCoder()
