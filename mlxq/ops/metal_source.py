"""Text and names of the Metal kernels: headers in `metal/` (in a wheel `mlxq/_metal`), joined for one kernel.

A header includes the headers it needs by `#include "name.h"`, so that an editor and a compiler understand each alone.
mlx compiles kernels from memory, where nothing can be included: `header` puts the texts one after another instead.
A kernel's source is one call of a function of its header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxq.errors import BackendError

_PACKAGE = Path(__file__).resolve().parent.parent
_OWN_INCLUDE = re.compile(r'^#include "(\w+)\.h"\n', re.MULTILINE)
_ONCE = "#pragma once\n"

#: Inputs below this many elements reach a kernel in the constant address space (mlx/fast: `metal_kernel`).
MIN_DEVICE_ELEMENTS = 8
_MAX_INT = (1 << 31) - 1


def metal_directory() -> Path:
    """Where the headers are: in an installed wheel, or in the checkout.

    Raises:
        BackendError: neither is there.
    """
    for directory in (_PACKAGE / "_metal", _PACKAGE.parent / "metal"):
        if (directory / "common.h").is_file():
            return directory
    raise BackendError(f"the Metal headers are missing: neither {_PACKAGE / '_metal'} nor a checkout's metal/ has them")


@cache
def header(*names: str) -> str:
    """The text of headers, each after the ones it includes, none twice."""
    texts: dict[str, str] = {}

    def add(name: str) -> None:
        if name in texts:
            return
        path = metal_directory() / f"{name}.h"
        try:
            text = path.read_text()
        except OSError as error:
            raise BackendError(f"the Metal header {path} cannot be read: {error}") from error
        for included in _OWN_INCLUDE.findall(text):
            add(included)
        texts[name] = _OWN_INCLUDE.sub("", text).replace(_ONCE, "")

    for name in names:
        add(name)
    return "\n".join(texts.values())


def type_name(dtype: mx.Dtype) -> str:
    """`float16` for `mx.float16`."""
    return str(dtype).removeprefix("mlx.core.")


def kernel_name(function: str, *dtypes: mx.Dtype, **template: int) -> str:
    """`affine_qmv_float16_gs_64_b_4` for `("affine_qmv", mx.float16, gs=64, b=4)`; equal dtypes are said once."""
    types = list(dict.fromkeys(type_name(dtype) for dtype in dtypes))
    values = [f"{key}_{int(value)}" for key, value in template.items()]
    return "_".join([function, *types, *values])


def kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, *headers: str
) -> Callable[..., list[mx.array]]:
    """The kernel object of `mx.fast.metal_kernel`, made once for each name and source.

    Args:
        name: from `kernel_name`; one name always has one source.
        source: the body, one call.
        headers: names of the headers that the body needs.
    """
    return _kernel(mx.fast.metal_kernel, name, tuple(inputs), tuple(outputs), source, headers)


@cache
def _kernel(make: Any, name: str, inputs: tuple, outputs: tuple, source: str, headers: tuple) -> Any:
    return make(name=name, input_names=list(inputs), output_names=list(outputs), source=source, header=header(*headers))


def check_sizes(op: str, rows_of_weights: int, **sizes: int) -> None:
    """Refuse what a launch cannot count.

    Args:
        rows_of_weights: outputs of a product; a grid has up to 16 threads for each.
        sizes: what else kernels and grids count by 31 bits.

    Raises:
        BackendError: too many of something.
    """
    for name, size, most in (
        ("rows of weights", rows_of_weights, _MAX_INT // 16),
        *((name, size, _MAX_INT) for name, size in sizes.items()),
    ):
        if size > most:
            raise BackendError(f"{op}: the metal back end counts {name} to {most}, got {size}; split the array")


def at_device(a: mx.array) -> mx.array:
    """The array, with rows of zeros after it (first axis) if mlx would pass it as a constant for its few elements."""
    if a.size >= MIN_DEVICE_ELEMENTS:
        return a
    rows = -(-MIN_DEVICE_ELEMENTS * a.shape[0] // a.size) - a.shape[0]
    return mx.concatenate([a, mx.zeros((rows, *a.shape[1:]), a.dtype)])
