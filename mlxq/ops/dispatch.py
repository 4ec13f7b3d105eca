"""Which back end computes an operation: one table, read from the top, the first row that fits decides.

The choice can be overridden for one call (`backend=`) or for the process (`MLXQ_BACKEND`, read at each call). What is
asked for is done, or refused: only kernels that the table chose are checked first (`ops.kernel_check`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from mlxq.errors import BackendError
from mlxq.ops import choices
from mlxq.ops.arrays import Kind, import_mlx

Backend = Literal["numpy", "mlx", "metal"]

BACKENDS: tuple[Backend, ...] = ("numpy", "mlx", "metal")
ENVIRONMENT_VARIABLE = "MLXQ_BACKEND"
#: ggml types that the Metal kernels (`ops.metal_blocks`) know; said here, where mlx is not imported.
METAL_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
#: Those of them that have Metal encoders (`ops.metal_block_quantize`).
METAL_ENCODERS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

_HOST = ("host", "host, mlx loaded")
_AFFINE = ("quantize", "dequantize", "quantized_matmul", "gather_quantized_matmul")
_PRODUCTS = ("quantized_matmul", "gather_quantized_matmul", "matmul", "gather_matmul")
_BLOCKS = ("block_dequantize", "block_matmul", "gather_block_matmul")
#: No Metal kernel of ours computes these: whoever asks for `metal` gets mlx.
_LEFT_TO_MLX = ("matmul", "gather_matmul")


class Call(NamedTuple):
    """What a choice depends on.

    `device` is `host` for NumPy arrays (`host, mlx loaded` where mlx was imported already), else mlx's default
    device, `cpu` or `gpu`; `rows` is M, the rows of x; `format` is the ggml type of blocks, else `affine`, with its
    `group_size`; `metal` says whether a GPU takes our Metal kernels (`metal_available`), `faster` whether a measurement
    of just this product on this machine says that ours is faster than mlx's (`ops.choices`).
    Beyond that the dtype does not matter: on the CPU both back ends compute half floats in float32.
    """

    op: str
    device: str
    rows: int = 0
    format: str = "affine"
    metal: bool = False
    group_size: int = 0
    faster: bool = False


@dataclass(frozen=True)
class _Row:
    """One row of the table; None, and empty, mean any."""

    backend: Backend
    reason: str
    ops: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    group_sizes: tuple[int, ...] = ()
    max_rows: int | None = None
    faster: bool = False

    def fits(self, call: Call) -> bool:
        return (
            (not self.ops or call.op in self.ops)
            and (not self.devices or call.device in self.devices)
            and (not self.formats or call.format in self.formats)
            and (not self.group_sizes or call.group_size in self.group_sizes)
            and (call.metal or self.backend != "metal")
            and (call.faster or not self.faster)
            and (self.max_rows is None or call.rows <= self.max_rows)
        )


# Measured with mlx 0.32.4 and NumPy 2.4 on two Xeon cores; times are for a matrix of 2048 x 768.
_TABLE: tuple[_Row, ...] = (
    _Row("metal", "mlx has no groups of 16: ours", ops=_AFFINE, devices=("gpu",), group_sizes=(16,)),
    _Row("numpy", "mlx has no groups of 16 on any device", ops=_AFFINE, group_sizes=(16,)),
    _Row(
        "mlx",
        "mlx's CPU kernel gives NumPy's codes and leaves the interpreter to other threads: two threads quantize 530M "
        "weights/s, NumPy's 380M",
        ops=("quantize",),
        devices=("host, mlx loaded",),
    ),
    _Row("numpy", "NumPy arrays: no copy, and no mlx needed", devices=_HOST),
    _Row(
        "metal",
        "mlx has no kernel for ggml blocks: ours compute with a GGUF file's own bytes",
        ops=_BLOCKS,
        devices=("gpu",),
        formats=METAL_TYPES,
    ),
    _Row(
        "metal",
        "the search for a block's scales in one kernel, which reads each weight once; mlx's arrays pass through memory "
        "at each step",
        ops=("encode",),
        devices=("gpu",),
        formats=METAL_ENCODERS,
    ),
    _Row(
        "numpy",
        "mlx has no kernel for ggml blocks on any device, and would multiply decoded float weights",
        ops=_BLOCKS,
    ),
    _Row(
        "metal",
        "measured on this machine (`mlxq bench --kernels`): our kernel is faster than mlx's for this product",
        ops=("quantized_matmul", "gather_quantized_matmul"),
        devices=("gpu",),
        faster=True,
    ),
    _Row(
        "mlx",
        "mlx has tuned kernels for all of these, and no measurement on this machine says that ours are faster",
        devices=("gpu",),
    ),
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


def choose(call: Call, backend: str | None = None, *, without_metal: bool = False) -> Backend:
    """The back end for a call: `backend` if given, else `MLXQ_BACKEND` if set, else the table's.

    Args:
        without_metal: skip the table's rows for Metal, whose kernel turned out to be wrong.

    Raises:
        BackendError: an unknown back end was asked for, or `metal` where it is not available.
    """
    name = asked(backend)
    if name == "metal" and (call.op in _LEFT_TO_MLX or (call.op == "encode" and call.format not in METAL_ENCODERS)):
        return "mlx"
    return name or _row(call._replace(metal=False) if without_metal else call).backend


def asked(backend: str | None = None) -> Backend | None:
    """The back end that `backend`, or else `MLXQ_BACKEND`, asks for; None if neither does. Raises as `choose`."""
    name = backend or os.environ.get(ENVIRONMENT_VARIABLE)
    return _known(name, "backend" if backend else ENVIRONMENT_VARIABLE) if name else None


def reason(call: Call) -> str:
    """Why the table chooses as it does for a call."""
    return _row(call).reason


def call_on(
    kind: Kind,
    op: str,
    rows: int = 0,
    format: str = "affine",
    group_size: int = 0,
    product: choices.Product | None = None,
) -> Call:
    """The `Call` of an operation on arrays of a kind, here and now; `product` is what may have been measured."""
    device = device_of(kind)
    metal = device == "gpu" and metal_available()
    faster = metal and product is not None and choices.is_faster(product, rows)
    return Call(op, device, rows, format, metal, group_size, faster)


def metal_available() -> bool:
    """Whether our Metal kernels can be launched: mlx has Metal, and computes on its GPU by default.

    A function in the place of `mx.fast.metal_kernel` launches wherever it likes.

    Raises:
        BackendError: mlx is not installed.
    """
    mx = sys.modules.get("mlx.core") or import_mlx()
    return mx.metal.is_available() and (mx.default_device().type == mx.DeviceType.gpu or not launches_on_gpu())


def launches_on_gpu() -> bool:
    """Whether `mx.fast.metal_kernel` is mlx's own, not one that tests put in its place."""
    mx = sys.modules.get("mlx.core") or import_mlx()
    return getattr(mx.fast.metal_kernel, "__module__", None) == "mlx.core.fast"


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
    if name not in BACKENDS:
        raise BackendError(f"{source}: unknown back end {name!r}; the back ends are {', '.join(BACKENDS)}")
    if name == "metal" and not metal_available():
        raise BackendError(
            f"{source}: the back end 'metal' needs an Apple GPU as mlx's default device, and there is none; "
            "the other back ends are numpy and mlx"
        )
    return name
