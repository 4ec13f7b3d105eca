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
- `kl_bound`, ratio 600, about six times the hardest model's at uniform bits: beyond it the result fails whatever its
  weights. It finds what no tensor shows, such as a configuration other than the source's. There is no bound past 8
  nats, as much as a model with all its queries permuted or its head shifted by a row showed (8.1 and 12.3): rounding to
  2 bits, and to 3 in a small model, may do what any damage does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable

from mlxq.types import QuantSpec, TensorInfo

#: KL in nats per token that tells nothing any more: results with gross damage start here.
UNRELATED = 8.0

_SUSPICIOUS_RATIO = 15.0
_BOUND_RATIO = 600.0
#: float32 arithmetic along other paths: far above what was seen (1e-9), far below what rounding weights does.
_FLOOR = 1e-3
_HEAD, _EMBEDDING = 0.2, 0.04
_LAYER = re.compile(r"\.\d+\.")


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


def noise(tensors: Iterable[TensorInfo], exact: Collection[str] = ()) -> float:
    """Energy of the relative error that the formats of a result's tensors predict; see this module's docstring.

    `exact` names the tensors that hold what the source holds, in the same codes or the same float type: they add
    nothing.
    """
    blocks: list[float] = []
    head = embedding = other = 0.0
    tied = True
    for info in tensors:
        energy = 0.0 if info.name in exact else expected_rmse(info.spec) ** 2
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


def kl_bound(tensors: Iterable[TensorInfo], exact: Collection[str] = ()) -> float:
    """KL in nats per token that a result cannot exceed honestly; infinite where it can be anything."""
    bound = _FLOOR + _BOUND_RATIO * noise(tensors, exact)
    return bound if bound < UNRELATED else math.inf
