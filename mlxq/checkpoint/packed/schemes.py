"""Which scheme reads which `quant_method`: data; what is in no table is refused by name before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mlxq.checkpoint.config import read_json
from mlxq.checkpoint.packed import autoround, awq, bitsandbytes, compressed_tensors, fp8, gptq, modelopt, mxfp4
from mlxq.checkpoint.packed.base import Scheme
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

#: `quant_method` in lower case -> how it is read.
SCHEMES: dict[str, Scheme] = {
    "gptq": gptq.SCHEME,
    "awq": awq.SCHEME,
    "auto-round": autoround.SCHEME,
    "intel/auto-round": autoround.SCHEME,
    "fp8": fp8.SCHEME,
    "fbgemm_fp8": fp8.SCHEME,
    "mxfp4": mxfp4.SCHEME,
    "compressed-tensors": compressed_tensors.SCHEME,
    "modelopt": modelopt.SCHEME,
    "bitsandbytes": bitsandbytes.SCHEME,
}
#: Keys of config.json (or its text_config) that hold the settings of a quantization.
SETTINGS_KEYS = ("quantization_config", "compression_config")
#: Files of older producers that hold the settings where config.json does not, and the method they stand for.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


class Found(NamedTuple):
    """Settings of a quantization, with `quant_method` in lower case, and the file that holds them."""

    settings: dict[str, Any]
    file: str


def find_settings(directory: Path, config: dict[str, Any]) -> Found | None:
    """The settings of a quantization by another tool than MLX; None without any.

    Raises:
        CheckpointError: they are no object, or name no method.
    """
    for part in (config, config.get("text_config") or {}):
        for key in SETTINGS_KEYS:
            if part.get(key):
                return Found(_named(part[key], f"{directory}: config.json: {key}"), "config.json")
    for name, method in SETTINGS_FILES.items():
        if (directory / name).is_file():
            settings = read_json(directory / name)
            return Found(_named({"quant_method": method} | settings, f"{directory}: {name}"), name)
    return None


def _named(settings: Any, where: str) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where} is {quoted(settings)}, but must be an object")
    method = settings.get("quant_method") or settings.get("method")
    if method is None and isinstance(settings.get("quantization"), dict):
        method = "modelopt"
    if not isinstance(method, str) or not method:
        raise CheckpointError(f"{where} has no quant_method; the known ones are {', '.join(SCHEMES)}")
    return settings | {"quant_method": method.lower()}


def find_scheme(found: Found, where: str) -> Scheme:
    """The scheme of these settings, checked; `where` names the model in messages.

    Raises:
        CheckpointError: nothing reads this method, or not with these settings.
    """
    where, method = f"{where}: {found.file}", found.settings["quant_method"]
    scheme = SCHEMES.get(method)
    if scheme is None:
        raise CheckpointError(
            f"{where} says that the weights are already quantized with {method}, which cannot be read; the methods that"
            f" can are {', '.join(SCHEMES)}. Start from the model's unquantized weights"
        )
    scheme.check(found.settings, where)
    return scheme


def check_directory(directory: Path, config: dict[str, Any], where: str) -> None:
    """Refuse, by name, a directory whose quantization cannot be read; its weights need not be there yet.

    Raises:
        CheckpointError: see `find_settings` and `find_scheme`.
    """
    found = find_settings(directory, config)
    if found is not None:
        find_scheme(found, where)
