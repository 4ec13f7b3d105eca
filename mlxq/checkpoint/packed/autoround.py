"""Checkpoints of AutoRound's own `quant_method`: GPTQ's or AWQ's tensors, which of them `packing_format` says.

`auto_round:auto_gptq` stores zero points as GPTQ's version 1 does, `auto_round` and `auto_round:gptqmodel` as version
2; `auto_round:auto_awq` is AWQ's GEMM. `extra_config` overrides bits, group size and symmetry by module: a key is a
module's name, else a regular expression found anywhere in one. Modules of 16 bits are not packed.

Sources: `inference/backend.py`, `inference/convert_model.py` and `inference/utils.py` of auto-round.
"""

from __future__ import annotations

import re
from typing import Any

from mlxq.checkpoint.packed import awq, gptq
from mlxq.checkpoint.packed.base import Packed, Scheme, Source
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

_AWQ = "awq"
#: `packing_format` -> GPTQ's format, or AWQ.
_FORMATS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": _AWQ,
    "auto_round:awq": _AWQ,
}
#: Settings of a module, and no others, that `extra_config` may override.
_KEYS = ("bits", "group_size", "sym", "data_type", "act_bits")
#: Settings that change what the tensors mean, and that nothing here follows.
_FOREIGN = ("rotation_config", "spinquant_config")
#: From here on a module is not packed.
_FLOAT_BITS = 16


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse packings, types and widths that are not GPTQ's or AWQ's, of the whole model or of some modules."""
    name = settings.get("packing_format")
    if not isinstance(name, str) or name not in _FORMATS:
        older = f" (of the back end {quoted(settings['backend'])})" if name is None and "backend" in settings else ""
        raise CheckpointError(
            f"{where}: AutoRound weights in the packing_format {quoted(name)}{older}, which cannot be read; those that"
            f" can are {', '.join(_FORMATS)}"
        )
    for key in _FOREIGN:
        if settings.get(key):
            raise CheckpointError(f"{where}: AutoRound weights with {key}, which cannot be followed")
    _check_module(settings, {}, where)
    for key, overrides in _extra(settings, where).items():
        if not _is_float(overrides):
            _check_module(settings, overrides, f"{where}: extra_config {quoted(key)}")


def _check_module(settings: dict[str, Any], overrides: dict[str, Any], where: str) -> None:
    merged = _merged(settings, overrides)
    if merged.get("data_type", "int") != "int":
        raise CheckpointError(f"{where}: AutoRound weights of type {quoted(merged['data_type'])}; only int can be read")
    activations = merged.get("act_bits")
    if activations is not None and not (type(activations) is int and activations >= _FLOAT_BITS):
        raise CheckpointError(f"{where}: AutoRound weights for activations of {quoted(activations)} bits, not floats")
    _part(settings).check(merged, where)


def _extra(settings: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    extra = settings.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise CheckpointError(f"{where}: extra_config is {quoted(extra)}, but must map modules to settings")
    for key, overrides in extra.items():
        if not isinstance(overrides, dict):
            raise CheckpointError(f"{where}: extra_config {quoted(key)} is {quoted(overrides)}, but must be an object")
        try:
            re.compile(key)
        except re.error as e:
            raise CheckpointError(f"{where}: extra_config {quoted(key)} is no regular expression: {e}") from e
    return extra


def _is_float(overrides: dict[str, Any]) -> bool:
    bits = overrides.get("bits")
    return type(bits) is int and bits >= _FLOAT_BITS


def _part(settings: dict[str, Any]) -> Scheme:
    return awq.SCHEME if _FORMATS[settings["packing_format"]] == _AWQ else gptq.SCHEME


def _merged(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The settings of a module, as GPTQ's or AWQ's own checkpoints spell them."""
    own = {key: (settings | overrides)[key] for key in _KEYS if key in settings or key in overrides}
    name = _FORMATS[settings["packing_format"]]
    return own | ({"version": "gemm"} if name == _AWQ else {"checkpoint_format": name})


def collect(source: Source) -> dict[str, Packed]:
    """Every module that has a `qweight`."""
    extra = _extra(source.settings, source.where)
    modules = {name.rpartition(".")[0] for name in source.raw.entries}
    patterns = [(re.compile(key), overrides) for key, overrides in extra.items() if key not in modules]
    make = awq.packed_module if _part(source.settings) is awq.SCHEME else gptq.packed_module
    found: dict[str, Packed] = {}
    for name in source.raw.entries:
        module = name.removesuffix(".qweight")
        if module == name:
            continue
        overrides = extra.get(module)
        if overrides is None:
            overrides = next((o for pattern, o in patterns if o and pattern.search(module)), {})
        if _is_float(overrides):
            raise CheckpointError(
                f"{source.where}: {quoted(name)} is packed, but extra_config says that this module is not"
            )
        found[f"{module}.weight"] = make(source._replace(settings=_merged(source.settings, overrides)), module)
    return found


SCHEME = Scheme(check, collect)
