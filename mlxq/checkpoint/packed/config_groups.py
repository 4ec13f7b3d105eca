"""The `config_groups` of compressed-tensors: how the weight of each module is stored.

Source: `compressed_tensors/quantization/quant_args.py` (strategies) and `utils/match.py` match_targets (which target
of several decides), version 0.20.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mlxq.checkpoint.packed.fp8 import valid_block
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

#: Format -> types of codes that it stores, and the bits they may have.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "pack-quantized": (("int",), (2, 3, 4, 5, 6, 8)),
    "int-quantized": (("int",), (8,)),
    "float-quantized": (("float",), (8,)),
    "naive-quantized": (("int", "float"), (8,)),
    "mxfp8-quantized": (("float",), (8,)),
    "mxfp4-pack-quantized": (("float",), (4,)),
    "nvfp4-pack-quantized": (("float",), (4,)),
}
_MIXED = "mixed-precision"
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
#: The classes that quantized modules here are of (one of them is what linear layers of vLLM are), and embeddings'.
_CLASSES = ("Linear", "LinearBase")
_EMBEDDING = "Embedding"


@dataclass(frozen=True)
class Weights:
    """How the weights of one group are stored; `block` is the rows and columns of strategy `block`."""

    format: str
    num_bits: int
    type: str
    strategy: str
    symmetric: bool
    group_size: int
    block: tuple[int, int] | None

    @property
    def is_packed(self) -> bool:
        return "pack" in self.format


class Groups:
    """The groups of a configuration.

    Raises:
        CheckpointError: a group that cannot be read, named with what is wrong.
    """

    def __init__(self, settings: dict[str, Any], where: str):
        self._where = where
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{where}: compressed-tensors settings without config_groups")
        self._groups: list[tuple[str, list[str], Weights | None]] = []
        for name, group in groups.items():
            at = f"{where}: config_groups {quoted(name)}"
            if not isinstance(group, dict):
                raise CheckpointError(f"{at} is {quoted(group)}, but must be an object; presets cannot be read")
            targets = _texts(group.get("targets"), f"{at}: targets")
            args = group.get("weights")
            weights = None if args is None else _weights(args, group.get("format") or settings.get("format"), at)
            self._groups.append((name, targets, weights))
        self._ignored = _texts(settings.get("ignore") or [], f"{where}: ignore")

    def of(self, module: str) -> Weights:
        """How a module's weight, which is quantized by its tensors, is stored.

        Raises:
            CheckpointError: no group claims it, or more than one does with equal right, or it is to be ignored.
        """
        where = f"{self._where}: {quoted(module)} is quantized"
        ignored = next((t for t in self._ignored if _rank(t, module) is not None), None)
        if ignored is not None:
            raise CheckpointError(f"{where}, but `ignore` ({quoted(ignored)}) says that it is not")
        claims = []
        for name, targets, weights in self._groups:
            ranks = [r for r in (_rank(t, module) for t in targets) if r is not None]
            if ranks:
                claims.append((min(ranks), name, weights))
        if not claims:
            raise CheckpointError(f"{where}, but no config group claims it")
        best = min(rank for rank, _, _ in claims)
        named = [(name, weights) for rank, name, weights in claims if rank == best]
        if len({weights for _, weights in named}) > 1:
            names = " and ".join(quoted(name) for name, _ in named)
            raise CheckpointError(f"{where}, and the config groups {names} both claim it in different ways")
        if named[0][1] is None:
            raise CheckpointError(f"{where}, but its config group {quoted(named[0][0])} has no weights")
        return named[0][1]


def _rank(target: str, module: str) -> int | None:
    """How well a target names a module: 0 by name, 1 by a pattern, 2 by class; None if it does not."""
    if target.startswith("re:"):
        return 1 if re.match(target[3:], module) else None
    if target == module:
        return 0
    is_embedding = "embed" in module.rpartition(".")[2]
    return 2 if (target == _EMBEDDING and is_embedding) or (target in _CLASSES and not is_embedding) else None


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"{where} is {quoted(value)}, but must be a list of modules")
    for text in value:
        if text.startswith("re:"):
            try:
                re.compile(text[3:])
            except re.error as e:
                raise CheckpointError(f"{where}: {quoted(text)} is no regular expression: {e}") from e
    return value


def _block(value: Any, where: str) -> tuple[int, int]:
    """Rows and columns of a block, which older versions write as `128x128`."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(n) for n in value.split("x")]
    return valid_block(value, where)


def _weights(args: Any, format_: Any, where: str) -> Weights:
    if not isinstance(args, dict):
        raise CheckpointError(f"{where}: weights is {quoted(args)}, but must be an object")
    if not isinstance(format_, str) or format_ not in FORMATS:
        hint = ", which each group must settle" if format_ == _MIXED else ""
        raise CheckpointError(
            f"{where}: compressed-tensors weights in the format {quoted(format_)}{hint}, which cannot be read; the"
            f" formats that can are {', '.join(FORMATS)}"
        )
    types, widths = FORMATS[format_]
    kind, bits = args.get("type", "int"), args.get("num_bits", 8)
    if kind not in types or bits not in widths or type(bits) is not int:
        raise CheckpointError(
            f"{where}: {format_} holds {' or '.join(types)} codes of {', '.join(map(str, widths))} bits, but weights"
            f" say {quoted(kind)} of {quoted(bits)}"
        )
    group_size = args.get("group_size")
    implied = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    strategy = args.get("strategy") or implied
    if strategy not in _STRATEGIES:
        raise CheckpointError(f"{where}: strategy {quoted(strategy)} is none of weights: {', '.join(_STRATEGIES)}")
    if strategy in ("group", "tensor_group") and (type(group_size) is not int or group_size < 1):
        raise CheckpointError(f"{where}: strategy {strategy} needs a positive group_size, got {quoted(group_size)}")
    mode_group = {"mxfp8-quantized": 32, "mxfp4-pack-quantized": 32, "nvfp4-pack-quantized": 16}.get(format_)
    if mode_group is not None and group_size != mode_group:
        raise CheckpointError(f"{where}: {format_} has groups of {mode_group}, but group_size is {quoted(group_size)}")
    if kind == "int" and strategy == "block":
        raise CheckpointError(f"{where}: integers in blocks of rows and columns cannot be read")
    symmetric = args.get("symmetric", True)
    if kind == "float" and not symmetric:
        raise CheckpointError(f"{where}: floats with zero points cannot be read")
    if args.get("dynamic") is True:
        raise CheckpointError(f"{where}: weights are `dynamic`, so that no scales are stored for them")
    block = _block(args.get("block_structure"), f"{where}: block_structure") if strategy == "block" else None
    size = group_size if strategy in ("group", "tensor_group") else -1
    return Weights(format_, bits, kind, strategy, bool(symmetric), size, block)
