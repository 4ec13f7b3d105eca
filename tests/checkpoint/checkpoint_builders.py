"""Small model directories for tests, written byte by byte so that they can also be wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

NUMPY_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint32": "U32", "int64": "I64", "uint8": "U8"}
NUMPY_NAMES |= {"int32": "I32", "int16": "I16", "int8": "I8"}
CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32}


def write_safetensors(path: Path, tensors: dict, dtypes: dict | None = None) -> Path:
    """Arrays to a file, in order; uint16 counts as BF16, and `dtypes` names others by tensor."""
    header, data = {}, b""
    for name, array in tensors.items():
        dtype = (dtypes or {}).get(name, NUMPY_NAMES[array.dtype.name])
        end = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def write_config(directory: Path, **changes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def write_index(directory: Path, weight_map: dict) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def floats(*shape: int, seed: int = 0, dtype: str = "F32") -> np.ndarray:
    """Seeded normal values; `BF16` as bits (upper halves of float32)."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if dtype == "BF16":
        return (w.view(np.uint32) >> 16).astype(np.uint16)
    return w.astype({"F32": np.float32, "F16": np.float16}[dtype])
