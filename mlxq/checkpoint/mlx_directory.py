"""A directory whose weights MLX (or mlxq) has already quantized: affine codes, scales and biases in safetensors.

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
from mlxq.formats import affine
from mlxq.formats.floats import to_float32
from mlxq.formats.geometry import AFFINE_BITS, AFFINE_GROUP_SIZES, packed_words, validate_affine
from mlxq.types import FLOAT_BYTES, QuantizedTensor, QuantSpec, TensorInfo

#: Weights decoded at a time, so that a whole read needs little more than its result.
_CHUNK = 1 << 20


class MlxCheckpoint(SafetensorsDirectory):
    """A directory that MLX quantized. A weight, its scales and its biases are one tensor, named after the weight.

    Raises:
        CheckpointError: a mode other than affine, or parts whose shapes disagree with each other or the configuration.
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
        if mode != "affine":
            raise CheckpointError(f"{where} has mode {quoted(mode)}; only affine can be read yet")
        if type(bits) is not int or type(group_size) is not int:
            raise CheckpointError(
                f"{where} needs integers bits and group_size, got {quoted(bits)}, {quoted(group_size)}"
            )
        try:
            validate_affine(bits, group_size)
        except FormatError as e:
            raise CheckpointError(f"{where}: {e}") from e
        return QuantSpec(bits, group_size, mode)

    def _collect(self, stored: dict[str, Entry]) -> dict[str, TensorInfo]:
        tensors, parts = {}, set()
        for name in stored:
            module = name.removesuffix(".scales")
            if name != module and f"{module}.weight" in stored and stored[f"{module}.weight"].dtype == "U32":
                parts.update((name, f"{module}.biases"))
        for name, entry in stored.items():
            module = name.removesuffix(".weight")
            if name in parts:
                continue
            if f"{module}.scales" in parts:
                tensors[name] = self._affine_info(module, entry)
            else:
                tensors[name] = self._float_info(name, entry)
        return tensors

    def _affine_info(self, module: str, weight: Entry) -> TensorInfo:
        name = f"{module}.weight"
        where = f"{self.path}: {quoted(name)}"
        scales, biases = self._stored.tensors[f"{module}.scales"], self._stored.tensors.get(f"{module}.biases")
        if scales.dtype not in FLOAT_BYTES or biases is None:
            what = f"scales of dtype {scales.dtype}" if scales.dtype not in FLOAT_BYTES else "no biases"
            raise CheckpointError(f"{where} has {what}, so its mode is not affine; only affine can be read yet")
        if (biases.shape, biases.dtype) != (scales.shape, scales.dtype):
            raise CheckpointError(
                f"{where}: scales are {scales.dtype} {list(scales.shape)}, but"
                f" biases {biases.dtype} {list(biases.shape)}"
            )
        if len(weight.shape) < 2 or weight.shape[:-1] != scales.shape[:-1] or 0 in scales.shape:
            raise CheckpointError(
                f"{where} is {list(weight.shape)}, but its scales are {list(scales.shape)};"
                " all axes but the last must agree, and none be empty"
            )
        spec = self._spec_of(module, weight, scales)
        shape = (*scales.shape[:-1], scales.shape[-1] * spec.group_size)
        expected = packed_words(shape[-1], spec.bits)
        if weight.shape[-1] != expected:
            raise CheckpointError(
                f"{where}: rows of {scales.shape[-1]} groups with {spec} take {expected} words,"
                f" but the file has {weight.shape[-1]}; config.json and the weights disagree"
            )
        nbytes = weight.nbytes + scales.nbytes + biases.nbytes
        return TensorInfo(name, shape, "AFFINE", nbytes, spec=spec, scales_dtype=scales.dtype)

    def _spec_of(self, module: str, weight: Entry, scales: Entry) -> QuantSpec:
        override = self._settings.get(module)
        if isinstance(override, dict):
            return self._to_spec(override, f"quantization of {quoted(module)}")
        if override is False:
            raise CheckpointError(f"{self.path}: {quoted(module)} is quantized, but config.json says that it is not")
        # A group's codes take bits * group_size bits: the words and the number of groups give that product alone.
        words, n_groups = weight.shape[-1], scales.shape[-1]
        bits, rest = divmod(32 * words, n_groups)
        fits = [QuantSpec(b, g) for b in AFFINE_BITS for g in AFFINE_GROUP_SIZES if b * g == bits and not rest]
        if override is True or self._default in fits or not fits:
            return self._default
        same_group = [s for s in fits if s.group_size == self._default.group_size]
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
        w_q, scales, biases = (self._stored.read(f"{module}.{part}", rows) for part in ("weight", "scales", "biases"))
        dtype = self._stored.tensors[f"{module}.scales"].dtype
        return QuantizedTensor(w_q, scales, biases, info.spec, (*w_q.shape[:-1], info.shape[-1]), dtype)
