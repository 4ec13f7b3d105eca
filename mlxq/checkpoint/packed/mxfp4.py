"""gpt-oss's own checkpoints (`quant_method` mxfp4): experts in MXFP4, the rest in bfloat16.

    X_blocks   uint8 [experts, N, K / 32, 16]   codes, two a byte, the first in the low nibble
    X_scales   uint8 [experts, N, K / 32]       E8M0

which is MLX's mode mxfp4 with two axes for one. `gate_up_proj` holds the rows of gate and up in turns; mlx-lm's model
has them in two tensors (source: `transformers/integrations/mxfp4.py` convert_moe_packed_tensors,
`mlx_lm/models/gpt_oss.py` sanitize).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxq.checkpoint.packed.base import Packed, RawTensors, Scheme, Source, part
from mlxq.checkpoint.packed.floats import ModeMatrix, mode_spec
from mlxq.checkpoint.safetensors import Entry, quoted
from mlxq.errors import CheckpointError
from mlxq.types import FLOAT_BYTES, TensorInfo

_JOINED = "gate_up_proj"
#: Logical name of each half of a joined tensor -> its rows.
_HALVES = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}


class _Half(Packed):
    """Every second bias of `gate_up_proj_bias` `[experts, 2 N]`, or the biases of another stack under mlx-lm's name."""

    def __init__(self, name: str, stored: str, entry: Entry, every: slice):
        n = len(range(entry.shape[-1])[every])
        size = entry.nbytes * n // max(entry.shape[-1], 1)
        super().__init__(TensorInfo(name, (*entry.shape[:-1], n), entry.dtype, size), (stored,))
        self._every = every

    def values(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        return np.ascontiguousarray(raw.rows(self.parts[0], rows)[..., self._every])


def check(settings: dict[str, Any], where: str) -> None:
    """Nothing in the settings changes what the tensors mean."""


def collect(source: Source) -> dict[str, Packed]:
    """Every pair of `_blocks` and `_scales`, and the biases of the same layers."""
    found: list[Packed] = []
    for name in source.raw.entries:
        stem = name.removesuffix("_blocks")
        if stem != name:
            found += _matrices(source, stem)
            bias = f"{stem}_bias"
            if bias in source.raw.entries:
                entry = part(source, bias, tuple(FLOAT_BYTES))
                found += [_Half(f"{n}.bias", bias, entry, every) for n, every in _names(stem)]
    return {packed.info.name: packed for packed in found}


def _names(stem: str) -> list[tuple[str, slice]]:
    """Logical modules of a stored one, and which rows of it they are."""
    head, _, last = stem.rpartition(".")
    if last != _JOINED:
        return [(stem, slice(None))]
    return [(f"{head}.{name}", every) for name, every in _HALVES.items()]


def _matrices(source: Source, stem: str) -> list[Packed]:
    blocks = part(source, f"{stem}_blocks", ("U8",))
    if len(blocks.shape) != 4 or blocks.shape[-1] != 16 or 0 in blocks.shape:
        raise CheckpointError(
            f"{source.where}: {quoted(f'{stem}_blocks')} is {list(blocks.shape)}, but must be [experts, N, K / 32, 16]"
        )
    scales = part(source, f"{stem}_scales", ("U8", "F8_E8M0"), blocks.shape[:-1])
    experts, N, groups, _ = blocks.shape
    names = _names(stem)
    if len(names) > 1 and N % 2:
        raise CheckpointError(f"{source.where}: {quoted(f'{stem}_blocks')} joins gate and up, but has {N} rows")
    found: list[Packed] = []
    for name, every in names:
        shape = (experts, N // len(names), groups * 32)
        nbytes = (blocks.nbytes + scales.nbytes) // len(names)
        info = TensorInfo(f"{name}.weight", shape, "mxfp4", nbytes, spec=mode_spec("mxfp4"))
        found.append(ModeMatrix(info, "mxfp4", f"{stem}_blocks", f"{stem}_scales", every=every))
    return found


SCHEME = Scheme(check, collect)
