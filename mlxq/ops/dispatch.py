"""Which back end computes an operation: one table, read from the top, the first row that fits decides.

The choice can be overridden for one call (`backend=`) or for the process (`MLXQ_BACKEND`, read at each call).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from mlxq.errors import BackendError
from mlxq.ops.arrays import Kind, import_mlx

Backend = Literal["numpy", "mlx"]

BACKENDS: tuple[Backend, ...] = ("numpy", "mlx")
ENVIRONMENT_VARIABLE = "MLXQ_BACKEND"

_HOST = ("host", "host, mlx loaded")
_PRODUCTS = ("quantized_matmul", "gather_quantized_matmul", "matmul", "gather_matmul")
_BLOCKS = ("block_dequantize", "block_matmul", "gather_block_matmul")


class Call(NamedTuple):
    """What a choice depends on.

    `device` is `host` for NumPy arrays (`host, mlx loaded` where mlx was imported already), else mlx's default
    device, `cpu` or `gpu`; `rows` is M, the rows of x.
    The dtype does not matter: both back ends compute half floats in float32 on the CPU.
    """

    op: str
    device: str
    rows: int = 0


@dataclass(frozen=True)
class _Row:
    """One row of the table; None, and empty, mean any."""

    backend: Backend
    reason: str
    ops: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    max_rows: int | None = None

    def fits(self, call: Call) -> bool:
        return (
            (not self.ops or call.op in self.ops)
            and (not self.devices or call.device in self.devices)
            and (self.max_rows is None or call.rows <= self.max_rows)
        )


# Measured with mlx 0.32.4 and NumPy 2.4 on two Xeon cores; times are for a matrix of 2048 x 768.
_TABLE: tuple[_Row, ...] = (
    _Row(
        "mlx",
        "mlx's CPU kernel gives NumPy's codes and leaves the interpreter to other threads: two threads quantize 530M "
        "weights/s, NumPy's 380M",
        ops=("quantize",),
        devices=("host, mlx loaded",),
    ),
    _Row("numpy", "NumPy arrays: no copy, and no mlx needed", devices=_HOST),
    _Row(
        "numpy",
        "mlx has no kernel for ggml blocks on any device, and would multiply decoded float weights",
        ops=_BLOCKS,
    ),
    _Row("mlx", "mlx has tuned Metal kernels for all of these", devices=("gpu",)),
    _Row("mlx", "same bits as NumPy on the CPU, and the graph stays lazy", ops=("quantize", "dequantize")),
    _Row(
        "mlx",
        "one row: lazy, in float32 over several streams, 0.5 ms; NumPy waits for x, then 0.6 ms (3, 5, 6 bits: 1.1)",
        ops=("quantized_matmul",),
        max_rows=1,
    ),
    _Row(
        "numpy",
        "decoding in cache and BLAS: 2 rows of 4 bits 0.7 ms to mlx 1.9, 512 rows 8 to 450; float weights: "
        "2 rows 0.4 ms to mlx 1.5, 64 rows 0.9 to 48",
        ops=_PRODUCTS,
    ),
)


def choose(call: Call, backend: str | None = None) -> Backend:
    """The back end for a call: `backend` if given, else `MLXQ_BACKEND` if set, else the table's.

    Raises:
        BackendError: an unknown back end was asked for.
    """
    asked = backend or os.environ.get(ENVIRONMENT_VARIABLE)
    if asked:
        return _known(asked, "backend" if backend else ENVIRONMENT_VARIABLE)
    return _row(call).backend


def reason(call: Call) -> str:
    """Why the table chooses as it does for a call."""
    return _row(call).reason


def device_of(kind: Kind) -> str:
    """The `Call.device` of arrays of a kind."""
    if kind == "numpy":
        return "host" if sys.modules.get("mlx.core") is None else "host, mlx loaded"
    mx = sys.modules.get("mlx.core") or import_mlx()
    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


@lru_cache(maxsize=1024)
def _row(call: Call) -> _Row:
    for row in _TABLE:
        if row.fits(call):
            return row
    raise BackendError(f"no back end computes {call.op!r}")


def _known(name: str, source: str) -> Backend:
    if name in BACKENDS:
        return name
    if name == "metal":
        raise BackendError(
            f"{source}: the Metal kernels ('metal') are not in this version; the back ends are {', '.join(BACKENDS)}"
        )
    raise BackendError(f"{source}: unknown back end {name!r}; the back ends are {', '.join(BACKENDS)}")
