"""The codebook types, IQ1 to IQ3: codes index tables of vectors of four or eight weights.

The tables (256 to 2048 vectors) live in the `gguf` package, and so does their decoder, which is used as it is; some
hundred blocks at a time, so that its temporaries stay small, and as one row, which it decodes in one go.
"""

from __future__ import annotations

import numpy as np

from mlxq.formats.geometry import block_format

#: The types of this module.
CODEBOOK_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def dequantize(blocks: np.ndarray, name: str, out: np.ndarray) -> None:
    """Weights of blocks uint8 `[n, type_size]`, contiguous, into `out` float32 `[n, 256]`: `gguf.quants.dequantize`."""
    import gguf

    with np.errstate(invalid="ignore", over="ignore"):
        row = gguf.quants.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType[name])
    out[...] = row.reshape(-1, block_format(name).block_size)
