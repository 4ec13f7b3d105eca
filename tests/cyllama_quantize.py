"""llama.cpp's own quantizer on a file, with or without an importance matrix (the package `cyllama`)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama, llama.cpp's quantizer, is not installed")

#: `llama_model_quantize_params` inside of the Python object: behind its head (16 bytes) and the vtable (8), four
#: 32-bit numbers (threads, file type, two types that default to "none"), flags, and the pointer at a multiple of 8.
_NUMBERS, _IMATRIX = 24, 48


class _Entry(ctypes.Structure):
    """`llama_model_imatrix_data`; the last of an array has no name."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


def quantize(src: Path, dst: Path, file_type: str, imatrix: dict[str, np.ndarray] | None = None) -> gguf.GGUFReader:
    """Quantize `src`; returns a reader of the result.

    `imatrix` maps GGUF names to float32 `[K]` or `[E, K]`. cyllama has no way to pass it, so the pointer is put into
    the struct of parameters.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    params = llama_cpp.LlamaModelQuantizeParams()
    none_type = params.output_tensor_type
    params.nthread = 1
    params.ftype = _file_type_id(file_type)
    kept = []
    if imatrix is not None:
        numbers = tuple((ctypes.c_int32 * 4).from_address(id(params) + _NUMBERS))
        if numbers != (1, params.ftype, none_type, none_type):
            pytest.skip("this cyllama lays its parameters out in another way: no importance matrix can be passed")
        kept = [np.ascontiguousarray(v, np.float32) for v in imatrix.values()]
        rows = [_Entry(n.encode(), v.ctypes.data, v.size) for n, v in zip(imatrix, kept, strict=True)]
        array = (_Entry * (len(rows) + 1))(*rows)
        ctypes.c_void_p.from_address(id(params) + _IMATRIX).value = ctypes.addressof(array)
    llama_cpp.model_quantize(str(src), str(dst), params)
    return gguf.GGUFReader(str(dst))


def _file_type_id(name: str) -> int:
    full = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
    return int(gguf.LlamaFileType[full])


def types(reader: gguf.GGUFReader) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in reader.tensors}
