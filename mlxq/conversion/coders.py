"""What calibration makes of a matrix: MLX's affine codes, or ggml's blocks. One signature for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import crossings, floats, ggml
from mlxq.formats.geometry import AFFINE_GROUP_SIZES
from mlxq.plan.planner import Plan
from mlxq.quantizers import calibrated
from mlxq.quantizers import ggml as encoders
from mlxq.quantizers.curvature import Curvature
from mlxq.quantizers.ggml import block_types, feedback
from mlxq.types import QuantizedTensor, TensorPlan


class Coder(Protocol):
    """`sizes`: groups of columns that a curvature's order has to keep together."""

    sizes: Sequence[int]

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


class AffineCoder:
    """`QuantizedTensor`s by `TensorPlan.spec`."""

    sizes = AFFINE_GROUP_SIZES

    def quantize(
        self,
        w: np.ndarray,
        plan: TensorPlan,
        *,
        curvature: Curvature | None = None,
        importance: np.ndarray | None = None,
        sweeps: int = 1,
    ) -> tuple[QuantizedTensor, np.ndarray]:
        how = {"curvature": curvature, "importance": importance, "sweeps": sweeps}
        return calibrated.quantize(w, plan.spec, plan.dtype, **how)

    def rounded(self, w: np.ndarray, plan: TensorPlan) -> tuple[QuantizedTensor, np.ndarray]:
        return calibrated.rounded(w, plan.spec, plan.dtype)

    def decoded(self, codes: QuantizedTensor, plan: TensorPlan) -> np.ndarray:
        return crossings.dequantize(codes)

    def stacked(self, parts: Sequence[QuantizedTensor], shape: tuple[int, ...]) -> QuantizedTensor:
        first = parts[0]
        if len(shape) == 2:
            return first
        arrays = [np.stack([getattr(p, a) for p in parts]) for a in ("w_q", "scales", "biases")]
        arrays = [a.reshape(*shape[:-1], a.shape[-1]) for a in arrays]
        return QuantizedTensor(*arrays, first.spec, shape, first.dtype)


class BlockCoder:
    """Blocks of a ggml type, uint8 `[..., row_bytes]`, by `TensorPlan.dtype`."""

    sizes = block_types.SIZES

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


def coder_of(plan: Plan) -> Coder:
    """The coder of a plan: block types have no `spec`, and a plan is of one kind."""
    affine = any(p.spec is not None and p.action != "keep" for p in plan.tensors)
    return AffineCoder() if affine else BlockCoder()
