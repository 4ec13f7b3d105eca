"""The frozen dataclasses that stand between the stages, and the progress and cancellation types."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mlxq.errors import Cancelled

Action = Literal["quantize", "repack", "requantize", "keep"]
Method = Literal["rtn", "portable", "search", "gptq", "awq", "awq+gptq"]
ModuleKind = Literal["linear", "embedding", "switch", "other"]

#: Bytes of one element of each float dtype, by its safetensors name.
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
#: safetensors dtype name -> the name that configuration files and the `--dtype` option use.
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is encoded: `bits` per code, `group_size` weights sharing scale and bias, and the mode."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits}-bit group {self.group_size}" if self.mode == "affine" else self.mode


@dataclass(frozen=True)
class TensorInfo:
    """One logical tensor of a source, before anything of it is read.

    `shape` counts weights (not packed words), row-major, as in PyTorch: `[out_features, in_features]`.
    `dtype` is the storage format: `F32`, `F16`, `BF16`, a ggml type name such as `Q4_1`, `AFFINE`, a float mode of MLX
    such as `mxfp4`, or the name of another tool's format.
    `nbytes` counts everything stored for it, scales and biases included. `spec` is the affine grid that an
    already quantized source holds exactly, or None, and `scales_dtype` the float type of its scales and biases.
    `permuted_spec` is the grid that holds it once its columns are in another order (`Checkpoint.read_order`); `spec` is
    None then. `module` says which kind of layer owns the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    spec: QuantSpec | None = None
    scales_dtype: str | None = None
    module: ModuleKind = "other"
    permuted_spec: QuantSpec | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    def row_ranges(self, max_weights: int) -> Iterator[slice | None]:
        """Ranges of rows that cover the first axis, of at most `max_weights` (or one row) each; None for a scalar."""
        if not self.shape:
            yield None
            return
        n_rows = self.shape[0]
        step = max(max_weights // max(self.size // max(n_rows, 1), 1), 1)
        for start in range(0, n_rows, step):
            yield slice(start, min(start + step, n_rows))


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor, and why.

    `spec` is the grid it gets in an MLX directory, else None. `dtype` is what is stored: with a spec the float type of
    scales and biases (`U8` in a float mode); without, the float type of the tensor, or in a GGUF file its ggml type.
    `method` says how codes are chosen where they are not taken over: `rtn` rounds to nearest, `portable` searches those
    that ggml's blocks hold too, the others look at what a calibration text sends into the layer. `scaled` tensors are
    not the source's: their channels are scaled, together with those of others, such that the model is the same.
    `four_way` grids have integer zero points, and scales that no float16 product with them rounds.
    """

    info: TensorInfo
    action: Action
    spec: QuantSpec | None
    dtype: str
    reason: str
    method: Method = "rtn"
    scaled: bool = False
    four_way: bool = False


@dataclass(frozen=True)
class QuantizedTensor:
    """Packed codes and their grid: `w_hat = scales * q + biases`, or a float mode's (`formats.float_modes`).

    `w_q` uint32 `[..., N, K * bits // 32]`; `scales`, `biases` `[..., N, K // group_size]` in NumPy storage:
    float32, float16, or uint16 holding bfloat16 bits when `dtype` is `BF16`. `shape` is `[..., N, K]`. In a float mode
    `scales` are uint8, `biases` None and `dtype` the mode's name.
    """

    w_q: Any
    scales: Any
    biases: Any
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Progress:
    """One progress event: `done` of `total` `unit`s of `stage` are finished; `item` names the current one."""

    stage: Literal[
        "download",
        "calibrate",
        "quantize",
        "write",
        "verify",
        "compare",
        "load",
        "prompt",
        "generate",
        "measure",
        "tune",
    ]
    done: int
    total: int
    unit: Literal["bytes", "tensors", "blocks", "passes", "tokens", "matrices"]
    item: str = ""


ProgressCallback = Callable[[Progress], None]


class CancelToken:
    """Asks running work to stop, from any thread. The work raises `mlxq.errors.Cancelled`."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise `Cancelled` if `cancel` was called."""
        if self._event.is_set():
            raise Cancelled("cancelled")
