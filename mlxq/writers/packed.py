"""GPTQ's and AWQ's directories: `qweight`, `qzeros`, `scales` in safetensors, and the settings that name them.

Layouts: `mlxq.formats.gptq`, `mlxq.formats.awq` (GEMM). All floats are float16, in which loaders compute `(q - z) *
scales`. The settings are in `config.json` (`quantization_config`) and, for older readers, in a file of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.config import to_json
from mlxq.errors import FormatError
from mlxq.formats import awq, crossings, floats, gptq, zero_points
from mlxq.plan.packed_planner import GridFacts, PackedPlan
from mlxq.plan.roles import layer_index, module_path
from mlxq.types import FLOAT_BYTES, TensorInfo, TensorPlan
from mlxq.writers.measured import MeasuredErrors
from mlxq.writers.safetensors import Entry, SafetensorsWriter

#: Weights that are looked at together.
_CHUNK = 1 << 21
#: File with the settings beside config.json.
SETTINGS_FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
_NOT_OF_RESULT = ("quantization", "quantization_config", "compression_config")


def grid_facts(parameters: ParameterMap, info: TensorInfo) -> GridFacts:
    """What a plan has to know of a tensor's scales and biases.

    Raises:
        FormatError: its grid has no integer zero points; the message names the tensor.
    """
    exact, symmetric = True, True
    for rows in info.row_ranges(_CHUNK):
        grid = _grid(parameters, info, rows, 0)[0]
        exact &= grid.exact
        symmetric &= bool((grid.zero_points == 1 << (info.spec.bits - 1)).all())
    return GridFacts(exact, symmetric)


def _grid(parameters: ParameterMap, info: TensorInfo, rows: slice | None, least: int) -> tuple[Any, Any]:
    q = parameters.read_quantized(info.name, rows)
    try:
        return zero_points.integer_grid(q, least), q
    except FormatError as e:
        raise FormatError(f"{info.name}: {e}") from e


class PackedTarget:
    """The weights of such a directory; `errors` gathers what repacking and keeping changed."""

    def __init__(self, parameters: ParameterMap, plan: PackedPlan):
        self.parameters = parameters
        self.plan = plan
        self.errors = MeasuredErrors()
        self._least = 1 if plan.layout == "gptq" and plan.version == 1 else 0

    def open(self, directory: Path) -> SafetensorsWriter:
        # PyTorch's loaders refuse files of another metadata format.
        return SafetensorsWriter(directory, [entries(p, self.plan.layout) for p in self.plan.tensors], format="pt")

    @staticmethod
    def is_whole(plan: TensorPlan) -> bool:
        """Whether a tensor is written at once: rows of the weight are columns of the file."""
        return plan.spec is not None

    def parts(
        self, plan: TensorPlan, rows: slice | None, check: Callable[[], None]
    ) -> Iterator[tuple[str, int, memoryview]]:
        if plan.spec is None:
            data = self._cast(plan, self.parameters.read(plan.info.name, rows))
            row_bytes = FLOAT_BYTES[plan.dtype] * plan.info.size // (plan.info.shape or (1,))[0]
            yield plan.info.name, row_bytes * (rows.start if rows else 0), _bytes(data)
            return
        module, bits = module_path(plan.info.name), plan.spec.bits
        codes, scales, zeros = self._read(plan, check)
        yield f"{module}.scales", 0, _bytes(scales)
        if self.plan.layout == "gptq":
            yield f"{module}.qweight", 0, _bytes(gptq.pack_weight(codes, bits))
            yield f"{module}.qzeros", 0, _bytes(gptq.pack_zero_points(zeros, bits, self.plan.version))
            group_of = np.arange(codes.shape[1], dtype=np.int32) // np.int32(plan.spec.group_size)
            yield f"{module}.g_idx", 0, _bytes(group_of)
            return
        yield f"{module}.qzeros", 0, _bytes(awq.pack_gemm(zeros))
        N, K = codes.shape
        step = max(_CHUNK // N, 1)
        for start in range(0, K, step):
            check()
            yield f"{module}.qweight", start * N // 2, _bytes(awq.pack_gemm(codes[:, start : start + step].T))

    def _read(self, plan: TensorPlan, check: Callable[[], None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes `[N, K]`, scales and zero points `[n_groups, N]`."""
        N, K = plan.info.shape
        codes = np.empty((N, K), np.uint8)
        scales, zeros = (np.empty((K // plan.spec.group_size, N), t) for t in (np.float16, np.uint8))
        for rows in plan.info.row_ranges(_CHUNK):
            check()
            grid, q = _grid(self.parameters, plan.info, rows, self._least)
            if not grid.exact:
                self.errors.add(plan.info.name, crossings.dequantize(q), zero_points.decoded(grid))
            codes[rows], scales[:, rows], zeros[:, rows] = grid.codes, grid.scales.T, grid.zero_points.T
        return codes, scales, zeros

    def _cast(self, plan: TensorPlan, w: np.ndarray) -> np.ndarray:
        """A kept tensor in its stored type."""
        if not floats.all_finite(w):
            raise FormatError("a weight is NaN or infinite")
        dtype = floats.dtype_of(w)
        if dtype == plan.dtype:
            return w
        wide = floats.to_float32(w, dtype)
        cast = floats.from_float32(wide, plan.dtype)
        if not floats.all_finite(cast):
            raise FormatError(f"weights as large as {np.abs(wide).max():g} exceed float16, which the format has")
        stored = floats.to_float32(cast, plan.dtype)
        if not np.array_equal(stored, wide):
            if self.plan.exact:
                raise FormatError("--exact: rounding to float16, which the format has, changes its weights")
            self.errors.add(plan.info.name, wide, stored)
        return cast

    def notes(self) -> list[str]:
        """What was lost; to be read when all is written."""
        said = {"keep": "kept and rounded to float16", "repack": "repacked with zero points rounded to integers"}
        return self.errors.notes(self.plan.tensors, said)


def entries(plan: TensorPlan, layout: str) -> list[Entry]:
    """The stored tensors of a planned one."""
    if plan.spec is None:
        return [Entry(plan.info.name, plan.dtype, plan.info.shape)]
    module, (N, K), bits = module_path(plan.info.name), plan.info.shape, plan.spec.bits
    n_groups = K // plan.spec.group_size
    weight = (K * bits // 32, N) if layout == "gptq" else (K, N * bits // 32)
    stored = [
        Entry(f"{module}.qweight", "I32", weight),
        Entry(f"{module}.qzeros", "I32", (n_groups, N * bits // 32)),
        Entry(f"{module}.scales", "F16", (n_groups, N)),
    ]
    return [*stored, Entry(f"{module}.g_idx", "I32", (K,))] if layout == "gptq" else stored


def config_json(config: dict[str, Any], plan: PackedPlan) -> bytes:
    """The source's configuration with `quantization_config` and the stored dtype."""
    out = {k: v for k, v in config.items() if k not in _NOT_OF_RESULT}
    out["dtype"] = out["torch_dtype"] = "float16"
    out["quantization_config"] = _settings(plan)
    return to_json(out).encode()


def settings_json(plan: PackedPlan) -> bytes:
    """The settings as older readers look for them, in a file named by `SETTINGS_FILES`."""
    settings = _settings(plan)
    if plan.layout == "awq":
        older = {"group_size": "q_group_size", "bits": "w_bit"}
        settings = {older.get(k, k): v for k, v in settings.items()} | {"version": "GEMM"}
    return to_json(settings).encode()


def _settings(plan: PackedPlan) -> dict[str, Any]:
    common = {"bits": plan.base.bits, "group_size": plan.base.group_size, "quant_method": plan.layout}
    if plan.layout == "awq":
        return common | {"version": "gemm", "zero_point": True, "modules_to_not_convert": list(plan.float_modules)}
    from mlxq import __version__

    settings = common | {
        "checkpoint_format": "gptq" if plan.version == 1 else "gptq_v2",
        "desc_act": False,
        "lm_head": False,
        "meta": {"quantizer": [f"mlxq:{__version__}"]},
        "pack_dtype": "int32",
        "static_groups": False,
        "sym": plan.symmetric,
    }
    dynamic = _dynamic(plan)
    return settings | ({"dynamic": dynamic} if dynamic else {})


def _dynamic(plan: PackedPlan) -> dict[str, dict[str, Any]]:
    """Layers of blocks that are not as the settings say, by GPTQModel's patterns."""
    found: dict[str, dict[str, Any]] = {}
    for p in plan.tensors:
        name = f"^{re.escape(module_path(p.info.name))}$"
        if p.spec is not None and p.spec != plan.base:
            found[f"+:{name}"] = {"bits": p.spec.bits, "group_size": p.spec.group_size}
        elif p.spec is None and p.info.module == "linear" and layer_index(p.info.name) is not None:
            found[f"-:{name}"] = {}
    return found


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array)).cast("B")
