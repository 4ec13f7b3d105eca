"""Weights that are small floats under shared scales: E4M3 in rows, and the codes of MLX's float modes.

Layouts: `mlxq.formats.float8` and `mlxq.formats.float_modes`.
"""

from __future__ import annotations

import numpy as np

from mlxq.checkpoint.packed.base import Packed, RawTensors
from mlxq.checkpoint.safetensors import Entry
from mlxq.errors import FormatError
from mlxq.formats import float8, float_modes
from mlxq.formats.floats import bf16_bits_to_float32
from mlxq.formats.geometry import FLOAT_MODES
from mlxq.types import QuantizedTensor, QuantSpec, TensorInfo

#: Types that float scales are stored in.
SCALES = ("F32", "BF16", "F16")
#: Weights decoded at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 16
_MX_GROUP = 32


def mode_spec(mode: str) -> QuantSpec:
    """The spec of a float mode of MLX."""
    geometry = FLOAT_MODES[mode]
    return QuantSpec(geometry.bits, geometry.group_size, mode)


def float32_of(array: np.ndarray, dtype: str) -> np.ndarray:
    """A stored tensor of a float type (E8M0 and E4M3 included) as float32."""
    if dtype == "BF16":
        return bf16_bits_to_float32(array)
    tables = {"F8_E8M0": float8.E8M0, "F8_E4M3": float8.E4M3}
    return tables[dtype][array] if dtype in tables else array.astype(np.float32, copy=False)


class Fp8Matrix(Packed):
    """E4M3 codes `[..., N, K]` with a float scale for the tensor, each row, or each block of rows and columns.

    Args:
        name, weight: of the codes.
        scale_name, scale: of the scales; `block` rows and columns have one (of a row: 1 and K, of the tensor: N and K).
        others: further stored tensors that belong to it and say nothing of its weights (scales of activations).
        powers_of_two: whether the producer says that all scales are powers of two: then MLX's mxfp8 holds the weights.
    """

    def __init__(
        self,
        name: str,
        weight: Entry,
        scale_name: str,
        scale: Entry,
        block: tuple[int, int],
        others: tuple[str, ...] = (),
        powers_of_two: bool = False,
    ):
        self._weight, self._scale, self._dtype, self._block = name, scale_name, scale.dtype, block
        self._grid = float8.block_grid(weight.shape, block)
        fits = weight.shape[-1] % _MX_GROUP == 0 and (block[1] % _MX_GROUP == 0 or block[1] >= weight.shape[-1])
        spec = mode_spec("mxfp8") if powers_of_two and fits else None
        info = TensorInfo(name, weight.shape, "FP8", weight.nbytes + scale.nbytes, spec=spec)
        super().__init__(info, (name, scale_name, *others))

    def values(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        codes, first = self._codes(raw, rows)
        scales = self._scales(raw, rows)
        out = np.empty(codes.shape, np.float32)
        flat_codes, flat = codes.reshape(-1, *codes.shape[-2:]), out.reshape(-1, *codes.shape[-2:])
        step = max(_CHUNK // max(codes.shape[-1], 1), 1)
        for i in range(len(flat)):
            for start in range(0, codes.shape[-2], step):
                part = slice(start, start + step)
                flat[i, part] = float8.dequantize(flat_codes[i, part], scales[i], self._block, first + start)
        return out

    def codes(self, raw: RawTensors, rows: slice | None) -> QuantizedTensor:
        """The same codes in mode mxfp8, a scale's exponent once for each group.

        Raises:
            FormatError: a code is NaN, or a scale is no power of two that E8M0 holds.
        """
        codes, first = self._codes(raw, rows)
        fractions, exponents = np.frexp(self._scales(raw, rows))
        if (fractions != 0.5).any():
            raise FormatError("a scale is no power of two, though the configuration says so (scale_fmt ue8m0)")
        biased = exponents + 126
        if (biased < 0).any() or (biased >= float8.E8M0_NAN).any():
            raise FormatError("a scale is beyond the range of E8M0, 2^-127 to 2^127")
        per_group = (*codes.shape[:-1], codes.shape[-1] // _MX_GROUP)
        block = (self._block[0], -(-self._block[1] // _MX_GROUP))
        flat = [float8.spread(e, per_group[-2:], block, first) for e in biased.astype(np.uint8)]
        scales = np.ascontiguousarray(np.stack(flat)).reshape(per_group)
        w_q = np.ascontiguousarray(codes).view("<u4")
        float_modes.check(w_q, scales, "mxfp8")
        return QuantizedTensor(w_q, scales, None, self.info.spec, codes.shape, "mxfp8")

    def _codes(self, raw: RawTensors, rows: slice | None) -> tuple[np.ndarray, int]:
        """Codes of some rows, and which row of its matrix the first is."""
        first = rows.indices(self.info.shape[0])[0] if rows is not None and len(self.info.shape) == 2 else 0
        return raw.rows(self._weight, rows), first

    def _scales(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        """float32 `[matrices, R, C]`: all of a matrix, since blocks span rows; of a stack those of the rows."""
        scales = float32_of(raw.rows(self._scale), self._dtype).reshape(self._grid)
        float8.check_scales(scales, "the scales")
        chosen = scales[rows] if rows is not None and len(self._grid) > 2 else scales
        return chosen.reshape(-1, *self._grid[-2:])


class ModeMatrix(Packed):
    """Codes and scales of one of MLX's float modes, in the order that MLX has them too.

    Args:
        info: name, shape, dtype and bytes; `spec` where the mode holds the weights exactly.
        mode: `mxfp4`, `mxfp8` or `nvfp4`.
        weight, scale: stored tensors: bytes `[..., K * bits / 8]`, in any further axes, and `[..., K / group_size]`.
        factor: what all weights are multiplied by: the name and dtype of a stored scalar, and whether it divides.
        others: as in `Fp8Matrix`.
        every: rows of the second last axis that are this tensor's: all, or every second one from 0 or from 1.
    """

    def __init__(
        self,
        info: TensorInfo,
        mode: str,
        weight: str,
        scale: str,
        factor: tuple[str, str, bool] | None = None,
        others: tuple[str, ...] = (),
        every: slice = slice(None),
    ):
        self._mode, self._weight, self._scale, self._factor, self._every = mode, weight, scale, factor, every
        named = (factor[0],) if factor else ()
        super().__init__(info, (weight, scale, *named, *others))

    def values(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        w_q, scales = self._stored(raw, rows)
        if self._factor is None:
            return float_modes.dequantize(w_q, scales, self._mode)
        # As the producers do: the two scales first, then the code.
        name, dtype, divides = self._factor
        factor = float32_of(raw.rows(name), dtype).reshape(-1)
        float8.check_scales(factor, "the tensor's scale")
        steps = float_modes.scale_values(scales, self._mode)
        steps = steps / factor[0] if divides else steps * factor[0]
        ones = np.full_like(scales, _ONE[FLOAT_MODES[self._mode].scale])
        out = float_modes.dequantize(w_q, ones, self._mode)
        groups = out.reshape(*steps.shape, -1)
        groups *= steps[..., None]
        return out

    def codes(self, raw: RawTensors, rows: slice | None) -> QuantizedTensor:
        w_q, scales = self._stored(raw, rows)
        return QuantizedTensor(w_q, scales, None, self.info.spec, (*w_q.shape[:-1], self.info.shape[-1]), self._mode)

    def _stored(self, raw: RawTensors, rows: slice | None) -> tuple[np.ndarray, np.ndarray]:
        scales = np.asarray(raw.rows(self._scale, rows)).view(np.uint8)
        n_groups = self.info.shape[-1] // FLOAT_MODES[self._mode].group_size
        scales = scales.reshape(-1, *scales.shape[1 : len(self.info.shape) - 1], n_groups)
        codes = np.asarray(raw.rows(self._weight, rows)).view(np.uint8).reshape(*scales.shape[:-1], -1)
        if self._every != slice(None):
            codes, scales = codes[..., self._every, :], scales[..., self._every, :]
        w_q = np.ascontiguousarray(codes).view("<u4")
        scales = np.ascontiguousarray(scales)
        float_modes.check(w_q, scales, self._mode)
        return w_q, scales


#: The byte that stands for a scale of 1.
_ONE = {"E8M0": 127, "E4M3": 0x38}
