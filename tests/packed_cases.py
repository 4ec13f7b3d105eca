"""Layers of other tools' producers (`goldens/packed_floats.npz`) as safetensors directories."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_FILE = Path(__file__).parent / "goldens/packed_floats.npz"


class Case(NamedTuple):
    """What a producer stored (`tensors`: name -> dtype and array), its settings, and the digest and dtype of what it
    decodes to."""

    settings: dict[str, Any]
    tensors: dict[str, tuple[str, np.ndarray]]
    digest: str
    dtype: str


@cache
def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    with np.load(_FILE) as file:
        names = sorted({key.split("/")[0] for key in file.files})
        for name in names:
            tensors, decoded = {}, ("", "")
            for key in file.files:
                case, _, rest = key.partition("/")
                what, _, dtype = rest.partition("|")
                if case != name or what == "settings":
                    continue
                if what == "decoded":
                    decoded = str(file[key]), dtype
                else:
                    tensors[what] = (dtype, file[key])
            found[name] = Case(json.loads(str(file[f"{name}/settings"])), tensors, *decoded)
    return found


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file of arrays with the dtype names that they are to have."""
    header, blobs, offset = {}, [], 0
    for name, (dtype, array) in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_layer(directory: Path, case: Case, module: str = "model.layers.0.mlp.up_proj") -> Path:
    """A directory that holds one packed layer and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "model.safetensors", {f"{module}.{k}": v for k, v in case.tensors.items()})
    config = {"model_type": "llama"}
    if "quantization" in case.settings:
        (directory / "hf_quant_config.json").write_text(json.dumps(case.settings))
    else:
        config["quantization_config"] = case.settings
    (directory / "config.json").write_text(json.dumps(config))
    return directory
