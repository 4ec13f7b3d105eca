"""How much divergence rounding alone explains, from the bits of each tensor: the bounds of the proof.

To first order the divergence grows with the energy of the weights' relative error. `noise` is that energy as the
formats predict it: its mean over the matrices of the blocks, and, with less weight, that of head and embedding. The
weights come from quantizing only one of them at 3, 4 and 6 bits: of the KL that the blocks cause, the head caused 0.2
and the embedding 0.04.

Measured by rounding to nearest, group 64, embedding at 6 bits or more (KL in nats per token, over 1,264 tokens):

    bits                             8        6       5       4       3       2
    SmolLM2 widened to 226M       0.0055    0.057    0.19    0.87     3.8    16.6
      KL / noise                     99       95      81      86      83      66
    SmolLM2-135M-Instruct         0.0028    0.042    0.14    0.47     1.6     8.8
      KL / noise                     51       70      66      55      42      42

The ratio of a model is about the same at all bits. With one kind of matrix at 2 bits and the others at 8 it was 131 for
values and 56 for down-projections. Small models are the hardest, and the widened one, whose rotated weights have no
structure left for rounding to spare, is the hardest that was met. From this follow

- `suspicious_kl`, ratio 15, which small models exceed honestly. Beyond it the weights are compared too, and a tensor
  that is further from its source than rounding can bring it (`largest_rmse`) fails the proof. In the widened model at
  4 bits, one matrix of 210 with its rows shuffled moves the KL from 0.87 to 1.0 only: no bound on the KL finds that.
- `kl_bound`, ratio 600, about six times the hardest model's at uniform bits, and never under 1 nat where anything is
  rounded: 1 at 8 and 6 bits, 1.7 at 5, 6 at 4. By then all else was found in order (the configurations are the same,
  all numbers finite, no tensor out of line), so beyond it nothing is wrong but the bits: they are too few for this
  model. There is no bound past 8 nats, as much as a model with all its queries permuted or its head shifted by a row
  showed (8.1 and 12.3): rounding to 2 bits, and to 3 in a small model, may do what any damage does.
- `better_than_chance`: all of the above was measured on models that predict text better than chance does. Random
  weights make small and large divergences out of the same rounding: over 20 small random architectures at 8 bits, all
  tensors stock MLX's bit for bit, ratios went from 4 (gpt2) to 1070 (qwen3_next), and to 10^5 where norms 30 times as
  large made the random predictions sharp. Such a model has no predictions that could be spoilt, and no bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable

from mlxq.types import FLOAT_BYTES, QuantSpec, TensorInfo

#: KL in nats per token that tells nothing any more: results with gross damage start here.
UNRELATED = 8.0

_SUSPICIOUS_RATIO = 15.0
_BOUND_RATIO = 600.0
#: Below this the KL is no reason to refuse a result in which all else is in order.
_LEAST_BOUND = 1.0
#: A source must be so many nats per token better than equal odds for all tokens to count as one that predicts text.
_BETTER_THAN_CHANCE = 0.5
#: float32 arithmetic along other paths: far above what was seen (1e-9), far below what rounding weights does.
_FLOOR = 1e-3
_HEAD, _EMBEDDING = 0.2, 0.04
_LAYER = re.compile(r"\.\d+\.")


def precision(info: TensorInfo) -> QuantSpec | None:
    """The affine grid that a tensor's rounding is measured by; None for floats.

    Of an affine tensor its own. Of ggml's blocks one with their bits and groups of 32, which they are better than, but
    for the four-bit floats, whose codes crowd near 0 as if they were 3 bits, and ternary codes, coarser than 2.
    """
    if info.dtype in FLOAT_BYTES:
        return None
    if info.spec is not None and info.spec.mode != "affine":
        # The mantissa decides: codes crowd near 0 as if they had a bit less, and of eight-bit floats three.
        return QuantSpec(3 if info.spec.bits == 4 else 5, info.spec.group_size)
    digits = re.search(r"\d", info.dtype)
    if digits is None:
        return info.spec
    bits = 3 if info.dtype.endswith("FP4") else int(digits[0])
    return QuantSpec(max(bits, 2), 32)


def expected_rmse(spec: QuantSpec | None) -> float:
    """Relative RMSE that rounding to nearest causes in Gaussian weights: 0.091 at 4 bits, group 64.

    A group of 64 spans about 4.7 deviations in `2^bits - 1` steps, and a step's error is `1 / sqrt(12)` of it: 1.37
    over the number of steps. Groups of 32 and 128 span 4.2 and 5.3, about `group_size^0.15`. Real weights have
    somewhat longer tails (measured: 1.37 to 1.6). Values rounded to bfloat16 (scales, offsets, tensors that are kept)
    add up to 0.004.
    """
    grid = 1.37 / (2**spec.bits - 1) * (spec.group_size / 64) ** 0.15 if spec else 0.0
    return math.hypot(grid, 0.004)


def largest_rmse(spec: QuantSpec | None) -> float:
    """Relative RMSE that rounding to nearest does not exceed, whatever the weights.

    A grid that holds 0 errs by at most the weight itself: 1. The worst group has one outlier, of twice as many steps as
    there are codes, so that all `g - 1` others, half a step each, become 0: `sqrt(g - 1) / (2 (2^bits - 1))`, which is
    2.3 to 3.7 times `expected_rmse`. Six times leaves room for rounded scales.
    """
    return min(1.05, 6 * expected_rmse(spec))


def smallest_step(spec: QuantSpec | None, dtype: str | None) -> float:
    """Absolute error of a weight that a grid may have however small the weights are; 0 where there is none.

    `mx.quantize` lets no step be below 1e-7 (`eps` in mlx's affine_quantize), so that smaller weights become 0. Half a
    unit of float16's subnormal numbers, 2^-25, is lost by an offset, and by a step as many times as the code counts.

    Args:
        spec: of the tensor; None where it is float.
        dtype: `F32`, `F16` or `BF16`, of scales and offsets, or of the float tensor.
    """
    subnormal = 2.0**-25 * (2**spec.bits if spec else 1) if dtype == "F16" else 0.0
    return subnormal + (1e-7 if spec else 0.0)


def noise(tensors: Iterable[TensorInfo], exact: Collection[str] = ()) -> float:
    """Energy of the relative error that the formats of a result's tensors predict; see this module's docstring.

    `exact` names the tensors that hold what the source holds, in the same codes or the same float type: they add
    nothing.
    """
    blocks: list[float] = []
    head = embedding = other = 0.0
    tied = True
    for info in tensors:
        energy = 0.0 if info.name in exact else expected_rmse(precision(info)) ** 2
        if info.module == "other":
            other = max(other, energy)
        elif info.module == "embedding":
            embedding = max(embedding, energy)
        elif _LAYER.search(info.name):
            blocks.append(energy)
        else:
            head, tied = max(head, energy), False
    mean = sum(blocks) / len(blocks) if blocks else 0.0
    return mean + other + _EMBEDDING * embedding + _HEAD * (embedding if tied else head)


def suspicious_kl(tensors: Iterable[TensorInfo], exact: Collection[str] = ()) -> float:
    """KL in nats per token up to which a result needs no second look."""
    return _FLOOR + _SUSPICIOUS_RATIO * noise(tensors, exact)


def kl_bound(tensors: Iterable[TensorInfo], exact: Collection[str] = (), *, predicts: bool = True) -> float:
    """KL in nats per token beyond which a result is refused though all else is in order; infinite where none is.

    `predicts` says whether the source predicts text better than chance does (`better_than_chance`).
    """
    energy = noise(tensors, exact)
    if energy == 0:
        return _FLOOR
    bound = max(_FLOOR + _BOUND_RATIO * energy, _LEAST_BOUND)
    return bound if predicts and bound < UNRELATED else math.inf


def better_than_chance(nll: float, vocabulary: int | None) -> bool:
    """Whether a mean negative log likelihood (nats per token) is better than chance's by a margin; see the module.

    Args:
        nll: of the source over the text.
        vocabulary: number of tokens; None where it is not known, then the model is taken to predict.
    """
    return vocabulary is None or nll < math.log(vocabulary) - _BETTER_THAN_CHANCE
