"""bitsandbytes checkpoints: four-bit matrices (NF4, FP4, double quantization) and llm.int8's.

    load_in_4bit   X.weight             packed codes `[bytes, 1]` (of any dtype that fills the bytes)
                   X.weight.absmax      float32, or uint8 with nested_absmax, nested_quant_map
                   X.weight.quant_map   float32 [16]
                   X.weight.quant_state.bitsandbytes__nf4 (or fp4)   JSON in uint8: shape, blocksize, dtype, nested_...
    load_in_8bit   X.weight             int8 [N, K]
                   X.SCB                float32 [N]: w_hat = (code * SCB) * fl(1 / 127)
                   X.weight_format      0: rows

Layout of four-bit weights: `mlxq.formats.nf4`. Source: `bitsandbytes/functional.py` QuantState, `_ops.py`
int8_vectorwise_dequant, `nn/modules.py`, version 0.50.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np

from mlxq.checkpoint.packed.base import Packed, RawTensors, Scheme, Source, part
from mlxq.checkpoint.packed.grid import Grid, StoredGrid, columns_in_groups
from mlxq.checkpoint.safetensors import Entry, quoted
from mlxq.errors import CheckpointError, FormatError
from mlxq.formats import nf4
from mlxq.formats.floats import all_finite
from mlxq.types import TensorInfo

_STATE = ".quant_state.bitsandbytes__"
#: Dtypes that packed bytes may be stored as.
_STORAGE = ("U8", "I8", "BF16", "F16", "F32")
#: The reciprocal of 127 that bitsandbytes multiplies by.
_PER_127 = np.float32(7.874015718698502e-3)
_MOST_STATE = 1 << 16


class _State(NamedTuple):
    """What the JSON of a four-bit matrix says."""

    quant_type: str
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int
    nested_offset: float


class FourBits(Packed):
    """A matrix of NF4 or FP4 codes."""

    def __init__(self, name: str, weight: Entry, parts: tuple[str, ...], nbytes: int, state: _State, nested: bool):
        super().__init__(TensorInfo(name, state.shape, state.quant_type.upper(), nbytes), parts)
        self._name, self._state, self._nested = name, state, nested
        self._itemsize = weight.nbytes // max(math.prod(weight.shape), 1)

    def values(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        N, *rest = self.info.shape
        first, last, _ = (rows or slice(None)).indices(N)
        row, size = math.prod(rest), self._state.blocksize
        start, stop = first * row, max(last, first) * row
        if start == stop:
            return np.empty((0, *rest), np.float32)
        items = slice(start // 2 // self._itemsize, -(-stop // (2 * self._itemsize)))
        packed = np.ascontiguousarray(raw.rows(self._name, items)).reshape(-1).view(np.uint8)
        at = start - items.start * self._itemsize * 2
        codes = nf4.unpack(packed)[at : at + stop - start]
        absmax = self._absmax(raw, slice(start // size, -(-stop // size)))
        w_hat = nf4.dequantize(codes, absmax, self._state.quant_type, size, start % size)
        return w_hat.reshape(last - first, *rest)

    def _absmax(self, raw: RawTensors, blocks: slice) -> np.ndarray:
        absmax = raw.rows(f"{self._name}.absmax", blocks)
        if self._nested:
            nested, table = (raw.rows(f"{self._name}.{n}") for n in ("nested_absmax", "nested_quant_map"))
            if not (all_finite(nested) and all_finite(table)):
                raise FormatError("a number of the double quantization (nested_...) is NaN or infinite")
            state = self._state
            absmax = nf4.magnitudes(absmax, table, nested, state.nested_offset, state.nested_blocksize, blocks.start)
        if not all_finite(absmax):
            raise FormatError("a magnitude (absmax) is NaN or infinite")
        return absmax


class EightBits(Grid):
    """llm.int8's matrix: signed codes and the largest magnitude of each row."""

    def __init__(self, name: str, weight: Entry, parts: tuple[str, ...], nbytes: int):
        columns = columns_in_groups(weight.shape[1], weight.shape[1])
        info = TensorInfo(name, weight.shape, "INT8", nbytes)
        super().__init__(info, parts, bits=8, columns=columns, scales_dtype="F32", exact_biases=True)
        self._scb = parts[1]

    def values(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        """As bitsandbytes computes them: the scale's two factors one after another."""
        w_hat = raw.rows(self.info.name, rows).astype(np.float32)
        w_hat *= self._largest(raw, rows)
        w_hat *= _PER_127
        return w_hat

    def stored(self, raw: RawTensors, rows: slice | None) -> StoredGrid:
        codes = raw.rows(self.info.name, rows).view(np.uint8) ^ np.uint8(0x80)
        # A row of zeros has no magnitude; any scale leaves its codes' meaning.
        largest = self._largest(raw, rows)
        scales = np.where(largest == 0, np.float32(1), largest) * _PER_127
        return StoredGrid(np.ascontiguousarray(codes).view("<u4"), scales, np.full(scales.shape, 128))

    def _largest(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        scb = raw.rows(self._scb, rows).reshape(-1, 1)
        if not all_finite(scb) or (scb < 0).any():
            raise FormatError("a magnitude (SCB) is negative, NaN or infinite")
        return scb


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse types of codes that are neither NF4 nor FP4."""
    kind = settings.get("bnb_4bit_quant_type")
    if settings.get("load_in_4bit") and kind is not None and kind not in tuple(nf4.TABLES):
        raise CheckpointError(f"{where}: bitsandbytes weights of type {quoted(kind)}; nf4 and fp4 can be read")


def collect(source: Source) -> dict[str, Packed]:
    """Every weight with a quant_state, and every int8 weight with its SCB."""
    found: dict[str, Packed] = {}
    for name, entry in source.raw.entries.items():
        stem, _, kind = name.partition(_STATE)
        if kind:
            found[stem] = _four_bits(source, stem, name, kind)
        elif name.endswith(".weight") and entry.dtype == "I8" and f"{name}.absmax" not in source.raw.entries:
            found[name] = _eight_bits(source, name, entry)
        elif name.endswith(".absmax") and not any(n.startswith(name[:-7] + _STATE) for n in source.raw.entries):
            raise CheckpointError(f"{source.where}: {quoted(name)} has no quant_state beside it")
    return found


def _eight_bits(source: Source, name: str, weight: Entry) -> EightBits:
    module = name.removesuffix(".weight")
    if len(weight.shape) != 2 or 0 in weight.shape or weight.shape[1] % 4:
        raise CheckpointError(
            f"{source.where}: {quoted(name)} is {list(weight.shape)}, but must be a matrix whose rows fill words"
        )
    scb = part(source, f"{module}.SCB", ("F32",))
    if math.prod(scb.shape) != weight.shape[0]:
        part(source, f"{module}.SCB", ("F32",), weight.shape[:1])
    parts = [name, f"{module}.SCB"]
    layout = f"{module}.weight_format"
    if layout in source.raw.entries:
        parts.append(layout)
        if source.raw.rows(layout).reshape(-1).tolist() != [0]:
            raise CheckpointError(f"{source.where}: {quoted(layout)} is not 0: only rows can be read, no GPU's tiles")
    return EightBits(name, weight, tuple(parts), weight.nbytes + scb.nbytes)


def _four_bits(source: Source, name: str, state_name: str, kind: str) -> FourBits:
    state = _state(source, state_name, kind)
    n = math.prod(state.shape)
    weight = part(source, name, _STORAGE)
    n_blocks = -(-n // state.blocksize)
    if weight.nbytes * 2 - n not in range(8):
        raise CheckpointError(
            f"{source.where}: {quoted(name)} has {weight.nbytes} bytes, but {list(state.shape)} weights of 4 bits take"
            f" {-(-n // 2)}"
        )
    nested = f"{name}.nested_absmax" in source.raw.entries
    parts = {f"{name}.absmax": (("U8",) if nested else ("F32",), (n_blocks,)), f"{name}.quant_map": (("F32",), (16,))}
    if nested:
        parts[f"{name}.nested_absmax"] = (("F32",), (-(-n_blocks // state.nested_blocksize),))
        parts[f"{name}.nested_quant_map"] = (("F32",), (256,))
    entries = [part(source, p, dtypes, shape) for p, (dtypes, shape) in parts.items()]
    if not np.allclose(source.raw.rows(f"{name}.quant_map"), nf4.TABLES[kind], rtol=0, atol=1e-6):
        raise CheckpointError(f"{source.where}: {quoted(f'{name}.quant_map')} is not the table of {kind}")
    nbytes = weight.nbytes + sum(e.nbytes for e in entries)
    return FourBits(name, weight, (name, *parts, state_name), nbytes, state, nested)


def _state(source: Source, name: str, kind: str) -> _State:
    """The JSON of a matrix, checked.

    Raises:
        CheckpointError: it is none, or says what no such matrix can be.
    """
    where = f"{source.where}: {quoted(name)}"
    entry = part(source, name, ("U8",))
    if entry.nbytes > _MOST_STATE:
        raise CheckpointError(f"{where} has {entry.nbytes} bytes, more than any quant_state")
    try:
        state = json.loads(source.raw.rows(name).tobytes().decode())
    except ValueError as e:
        raise CheckpointError(f"{where} is not JSON: {' '.join(str(e).split())[:100]}") from e
    if not isinstance(state, dict):
        raise CheckpointError(f"{where} must hold an object")
    if kind not in nf4.TABLES or state.get("quant_type", kind) != kind:
        found = state.get("quant_type", kind)
        raise CheckpointError(f"{where} says quant_type {quoted(found)}, its name {quoted(kind)}; nf4 and fp4 can be")
    shape, blocksize = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(n) is int and n > 0 for n in shape):
        raise CheckpointError(f"{where}: shape is {quoted(shape)}, but must be a matrix's")
    if blocksize not in nf4.BLOCK_SIZES:
        raise CheckpointError(f"{where}: blocksize is {quoted(blocksize)}, but must be one of {nf4.BLOCK_SIZES}")
    nested, offset = state.get("nested_blocksize", 1), state.get("nested_offset", 0.0)
    if type(nested) is not int or nested < 1 or not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise CheckpointError(f"{where}: nested_blocksize {quoted(nested)} with nested_offset {quoted(offset)}")
    return _State(kind, tuple(shape), blocksize, nested, float(offset))


SCHEME = Scheme(check, collect)
