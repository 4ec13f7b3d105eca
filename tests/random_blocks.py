"""Random ggml blocks of any type that stand for weights of a chosen size."""

from __future__ import annotations

import numpy as np

from mlxq.formats import ggml
from mlxq.formats.geometry import BLOCK_FORMATS, block_format
from mlxq.formats.kquants import LAYOUTS

#: Every type but the floats.
BLOCK_TYPES = [f.name for f in BLOCK_FORMATS.values() if f.block_size > 1]


def random_blocks(name: str, shape: tuple[int, ...], seed: int = 0, size: float | None = None) -> np.ndarray:
    """Blocks uint8 `[..., N, row_bytes]` of weights `[..., N, K]`, random bits under random scales of either sign.

    The root mean square of the weights is about `size`, by default K**-0.5: products with x then are about as large as
    x. Types whose scales are no float16 have theirs within a factor of four of one size, whatever was asked for.
    """
    geometry = block_format(name)
    *lead, K = shape
    rng = np.random.default_rng(seed)
    n = int(np.prod(lead)) * K // geometry.block_size
    blocks = rng.integers(0, 256, (n, geometry.type_size), dtype=np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(120, 123, n)
    elif name == "NVFP4":
        blocks[:, :4] = rng.integers(0x08, 0x18, (n, 4))
    else:
        _set_scales(blocks, name, np.ones(n))
        unit = np.sqrt(np.mean(ggml.dequantize(blocks, name).astype(np.float64) ** 2))
        target = (K**-0.5 if size is None else size) / unit
        _set_scales(blocks, name, rng.uniform(0.5, 1.4, n) * rng.choice([-1, 1], n) * target)
    return blocks.reshape(*lead, K // geometry.block_size * geometry.type_size)


def _set_scales(blocks: np.ndarray, name: str, d: np.ndarray) -> None:
    """Write `d` into every float16 of the blocks (scale, and min where there is one)."""
    half = np.ascontiguousarray(d, "<f2")
    if name == "IQ1_M":
        # Four bits of it in the top of each of the last four uint16.
        words = np.ascontiguousarray(blocks[:, 48:]).view("<u2")
        words &= 0x0FFF
        words |= (half.view("<u2")[:, None] >> np.arange(0, 16, 4, dtype=np.uint16) & 0xF) << 12
        blocks[:, 48:] = words.view(np.uint8)
        return
    if name in LAYOUTS:
        offsets = [LAYOUTS[name].d, LAYOUTS[name].dmin]
    elif name.startswith("TQ"):
        offsets = [blocks.shape[1] - 2]
    else:
        offsets = [0, 2] if name.endswith("_1") else [0]
    for at in offsets:
        if at is not None:
            blocks[:, at : at + 2] = half.view(np.uint8).reshape(-1, 2)
