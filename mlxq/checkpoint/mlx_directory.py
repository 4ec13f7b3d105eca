"""A directory whose weights MLX (or mlxq) has already quantized: codes and scales in safetensors, biases if affine.

`config.json` says how in `quantization`: default `group_size`, `bits` and `mode`, and by module path either other
values or false. A module that is not named may still differ from the default, as mlx-lm allows (`infer_quant_config` in
`mlx_lm/utils.py`); its shapes then tell bits times group size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.huggingface import SafetensorsDirectory
from mlxq.checkpoint.safetensors import Entry, quoted
from mlxq.errors import CheckpointError, FormatError
from mlxq.formats import affine, float_modes
from mlxq.formats.floats import to_float32
from mlxq.formats.geometry import (
    AFFINE_BITS,
    AFFINE_GROUP_SIZES,
    FLOAT_MODES,
    PACKED_CODES,
    packed_words,
    validate_spec,
)
from mlxq.types import FLOAT_BYTES, QuantizedTensor, QuantSpec, TensorInfo

#: Weights decoded at a time, so that a whole read needs little more than its result.
_CHUNK = 1 << 20


class MlxCheckpoint(SafetensorsDirectory):
    """A directory that MLX quantized. A weight, its scales and its biases are one tensor, named after the weight.

    Raises:
        CheckpointError: an unknown mode, or parts whose shapes disagree with each other or the configuration.
    """

    kind = "mlx"

    def __init__(self, path: str | Path):
        super().__init__(Path(path))
        self._settings: dict[str, Any] = self.config.get("quantization") or {}
        if not self._settings:
            raise CheckpointError(
                f"{self.path / 'config.json'}: has no quantization, so this is no quantized directory"
            )
        self._default = self._to_spec(self._settings, "quantization")
        self._open_weights()
        self.tensors = self._collect(self._stored.tensors)
        self._check_overrides()

    def _to_spec(self, settings: dict[str, Any], where: str) -> QuantSpec:
        where = f"{self.path / 'config.json'}: {where}"
        bits, group_size = settings.get("bits"), settings.get("group_size")
        mode = settings.get("mode") or "affine"
        if type(bits) is not int or type(group_size) is not int:
            raise CheckpointError(
                f"{where} needs integers bits and group_size, got {quoted(bits)}, {quoted(group_size)}"
            )
        spec = QuantSpec(bits, group_size, mode)
        try:
            validate_spec(spec)
        except FormatError as e:
            raise CheckpointError(f"{where}: {e}") from e
        return spec

    def _collect(self, stored: dict[str, Entry]) -> dict[str, TensorInfo]:
        tensors, parts = {}, set()
        for name in stored:
            module = name.removesuffix(".scales")
            if name != module and f"{module}.weight" in stored and stored[f"{module}.weight"].dtype == "U32":
                parts.add(name)
                if stored[name].dtype != "U8":
                    parts.add(f"{module}.biases")
        for name, entry in stored.items():
            module = name.removesuffix(".weight")
            if name in parts:
                continue
            if f"{module}.scales" in parts:
                scales = stored[f"{module}.scales"]
                read = self._float_mode_info if scales.dtype == "U8" else self._affine_info
                tensors[name] = read(module, entry, scales)
            else:
                tensors[name] = self._float_info(name, entry)
        return tensors

    def _affine_info(self, module: str, weight: Entry, scales: Entry) -> TensorInfo:
        name = f"{module}.weight"
        where = f"{self.path}: {quoted(name)}"
        biases = self._stored.tensors.get(f"{module}.biases")
        if scales.dtype not in FLOAT_BYTES or biases is None:
            what = f"scales of dtype {scales.dtype}" if scales.dtype not in FLOAT_BYTES else "no biases"
            modes = ", ".join(FLOAT_MODES)
            raise CheckpointError(f"{where} has {what}: affine weights have float scales and biases, {modes} U8 scales")
        if (biases.shape, biases.dtype) != (scales.shape, scales.dtype):
            raise CheckpointError(
                f"{where}: scales are {scales.dtype} {list(scales.shape)}, but"
                f" biases {biases.dtype} {list(biases.shape)}"
            )
        self._check_lead(name, weight, scales)
        spec = self._spec_of(module, weight, scales)
        shape = self._shape(name, weight, scales, spec)
        nbytes = weight.nbytes + scales.nbytes + biases.nbytes
        return TensorInfo(name, shape, "AFFINE", nbytes, spec=spec, scales_dtype=scales.dtype)

    def _float_mode_info(self, module: str, weight: Entry, scales: Entry) -> TensorInfo:
        name = f"{module}.weight"
        if f"{module}.global_scale" in self._stored.tensors:
            raise CheckpointError(
                f"{self.path}: {quoted(name)} has a global_scale (of nvfp4), which cannot be read yet"
            )
        if f"{module}.biases" in self._stored.tensors:
            raise CheckpointError(f"{self.path}: {quoted(name)} has scales of dtype U8 and biases: no mode has both")
        self._check_lead(name, weight, scales)
        override = self._settings.get(module)
        if override is False:
            raise CheckpointError(f"{self.path}: {quoted(module)} is quantized, but config.json says that it is not")
        # The words of a group tell the modes apart: 2, 4 and 8.
        words, rest = divmod(weight.shape[-1], scales.shape[-1])
        modes = {packed_words(m.group_size, m.bits): QuantSpec(m.bits, m.group_size, n) for n, m in FLOAT_MODES.items()}
        found = None if rest else modes.get(words)
        spec = self._to_spec(override, f"quantization of {quoted(module)}") if isinstance(override, dict) else found
        if found is None or spec != found or (weight.shape[-1] * 32 // found.bits) % PACKED_CODES:
            fits = found or f"none of {', '.join(FLOAT_MODES)}"
            raise CheckpointError(
                f"{self.path}: {quoted(name)} has {weight.shape[-1]} words and {scales.shape[-1]} U8 scales a row,"
                f" which fits {fits}" + (f", but config.json says {spec}" if found and spec != found else "")
            )
        shape = self._shape(name, weight, scales, spec)
        return TensorInfo(name, shape, spec.mode, weight.nbytes + scales.nbytes, spec=spec)

    def _check_lead(self, name: str, weight: Entry, scales: Entry) -> None:
        if len(weight.shape) < 2 or weight.shape[:-1] != scales.shape[:-1] or 0 in scales.shape:
            raise CheckpointError(
                f"{self.path}: {quoted(name)} is {list(weight.shape)}, but its scales are {list(scales.shape)};"
                " all axes but the last must agree, and none be empty"
            )

    def _shape(self, name: str, weight: Entry, scales: Entry, spec: QuantSpec) -> tuple[int, ...]:
        """The weights that the scales are for, which the words must hold."""
        shape = (*scales.shape[:-1], scales.shape[-1] * spec.group_size)
        expected = shape[-1] * spec.bits / 32
        if weight.shape[-1] != expected:
            raise CheckpointError(
                f"{self.path}: {quoted(name)}: rows of {scales.shape[-1]} groups with {spec} take {expected:g} words,"
                f" but the file has {weight.shape[-1]}; config.json and the weights disagree"
            )
        return shape

    def _spec_of(self, module: str, weight: Entry, scales: Entry) -> QuantSpec:
        override = self._settings.get(module)
        if isinstance(override, dict):
            spec = self._to_spec(override, f"quantization of {quoted(module)}")
            if spec.mode != "affine":
                raise CheckpointError(
                    f"{self.path}: config.json says that {quoted(module)} is {spec}, but its scales are {scales.dtype}"
                )
            return spec
        if override is False:
            raise CheckpointError(f"{self.path}: {quoted(module)} is quantized, but config.json says that it is not")
        # A group's codes take bits * group_size bits: the words and the number of groups give that product alone.
        words, n_groups = weight.shape[-1], scales.shape[-1]
        bits, rest = divmod(32 * words, n_groups)
        fits = [QuantSpec(b, g) for b in AFFINE_BITS for g in AFFINE_GROUP_SIZES if b * g == bits and not rest]
        default = self._default if self._default.mode == "affine" else None
        if default is not None and (override is True or default in fits or not fits):
            return default
        if not fits:
            raise CheckpointError(
                f"{self.path}: {quoted(module)} has {words} words and {n_groups} float scales a row: no affine weights"
            )
        same_group = [s for s in fits if default is not None and s.group_size == default.group_size]
        fits = same_group or fits
        if len(fits) > 1:
            raise CheckpointError(
                f"{self.path}: the shapes of {quoted(module)} fit {' and '.join(map(str, fits))};"
                " name it under quantization in config.json"
            )
        return fits[0]

    def _check_overrides(self) -> None:
        """A module that config.json calls quantized must be; one that the file lacks altogether is none of ours."""
        for module, override in self._settings.items():
            info = self.tensors.get(f"{module}.weight")
            if info is not None and info.spec is None and (override is True or isinstance(override, dict)):
                raise CheckpointError(
                    f"{self.path}: config.json says that {quoted(module)} is quantized, but it has no scales"
                )

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Values as `Checkpoint.read` gives them; quantized ones decoded as `mx.dequantize` does, then widened."""
        info = self.tensors.get(name)
        if info is None or info.spec is None:
            return super().read(name, rows)
        tensor = self.read_quantized(name, rows)
        if info.spec.mode != "affine":
            return float_modes.dequantize(tensor.w_q, tensor.scales, info.spec.mode)
        out = np.empty(tensor.shape, np.float32)
        K = tensor.shape[-1]
        flat = out.reshape(-1, K)
        w_q, scales, biases = (a.reshape(-1, a.shape[-1]) for a in (tensor.w_q, tensor.scales, tensor.biases))
        step = max(1, _CHUNK // K)
        for first in range(0, flat.shape[0], step):
            part = slice(first, first + step)
            codes = affine.unpack(w_q[part], info.spec.bits, K)
            w_hat = affine.dequantize(codes, scales[part], biases[part], info.spec.bits, info.spec.group_size)
            flat[part] = to_float32(w_hat, tensor.dtype)
        return out

    def read_quantized(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Codes and grid exactly as stored; `rows` cuts the first axis.

        Raises:
            CheckpointError: no such tensor, or it is not quantized.
        """
        info = self.tensors.get(name)
        if info is None or info.spec is None:
            what = "no tensor" if info is None else "no quantized tensor"
            raise CheckpointError(f"{self.path}: {what} {quoted(name)}")
        module = name.removesuffix(".weight")
        if info.spec.mode != "affine":
            w_q, scales = (self._stored.read(f"{module}.{part}", rows) for part in ("weight", "scales"))
            try:
                float_modes.check(w_q, scales, info.spec.mode)
            except FormatError as e:
                raise CheckpointError(f"{self.path}: {quoted(name)}: {e}") from e
            return QuantizedTensor(w_q, scales, None, info.spec, (*w_q.shape[:-1], info.shape[-1]), info.dtype)
        w_q, scales, biases = (self._stored.read(f"{module}.{part}", rows) for part in ("weight", "scales", "biases"))
        dtype = self._stored.tensors[f"{module}.scales"].dtype
        return QuantizedTensor(w_q, scales, biases, info.spec, (*w_q.shape[:-1], info.shape[-1]), dtype)
