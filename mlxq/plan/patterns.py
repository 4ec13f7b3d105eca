"""What a person may write of tensors: patterns, `REGEX=BITS`, legal numbers. Pure."""

from __future__ import annotations

import re

from mlxq.errors import FormatError, PlanError
from mlxq.formats import geometry


def check_legal(bits: int, group_size: int, where: str) -> None:
    """Raise PlanError where MLX has no such grid; `where` begins the message."""
    try:
        geometry.validate_affine(bits, group_size)
    except FormatError as e:
        raise PlanError(f"{where}{e}") from e


def texts(name: str, values: object) -> tuple[str, ...]:
    """Patterns as a tuple; PlanError where they are none."""
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, str) for v in values):
        raise PlanError(f"{name} must be a tuple or list of patterns, got {values!r}")
    return tuple(values)


def pattern(text: str, option: str) -> re.Pattern[str]:
    """The pattern of an option; PlanError where it is empty or malformed."""
    if not text:
        raise PlanError(f"{option} {text!r}: the pattern is empty")
    try:
        return re.compile(text)
    except re.error as e:
        raise PlanError(f"{option} {text!r} is not a regular expression: {e}") from e


def tensor_type(text: str, default_group_size: int) -> tuple[re.Pattern[str], int, int | None, str]:
    """`REGEX=BITS` or `REGEX=BITS:GROUP`: pattern, bits, group or None, and the text; PlanError where malformed."""
    searched, separator, value = text.rpartition("=")
    match = re.fullmatch(r"(\d+)(?::(\d+))?", value)
    if not separator or not searched or match is None:
        raise PlanError(f"--tensor-type {text!r}: write REGEX=BITS or REGEX=BITS:GROUP, e.g. 'v_proj=6:64'")
    bits, group_size = int(match[1]), int(match[2]) if match[2] else None
    check_legal(bits, default_group_size if group_size is None else group_size, f"--tensor-type {text!r}: ")
    return pattern(searched, "--tensor-type"), bits, group_size, text
