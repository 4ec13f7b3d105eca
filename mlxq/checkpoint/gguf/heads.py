"""The rows of q and k in two orders: halves of each head, as Hugging Face has them, or pairs, as ggml rotates them.

Converters store each head's rows as pairs `(j, j + head_dim / 2)` one after another; Hugging Face has the first halves
of all pairs, then the second (source: `LlamaModel.permute` in llama.cpp's converter).
"""

from __future__ import annotations

import numpy as np


def unpermuted_rows(start: int, stop: int, head_dim: int) -> np.ndarray:
    """Rows of a GGUF q or k tensor that are rows `start` to `stop` of the Hugging Face one."""
    head, within = np.divmod(np.arange(start, stop), head_dim)
    half, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half


def permuted_rows(start: int, stop: int, head_dim: int) -> np.ndarray:
    """Rows of a Hugging Face q or k tensor that are rows `start` to `stop` of the GGUF one."""
    head, within = np.divmod(np.arange(start, stop), head_dim)
    pair, half = np.divmod(within, 2)
    return head * head_dim + half * (head_dim // 2) + pair
