"""What MLX format a type becomes that is no grid of MLX's, or only one twice its size. Data, and one rule.

The rule: the smallest format whose error, added by quantizing the decoded weights anew, is expected to be at most half
of what the type itself lost when it was made (`MOST_ADDED`). Both add up as squares, so the result is at most 12 %
further from the original weights than the source is. The errors are relative RMSE, measured on Gaussian weights that
ggml's own quantizers encoded (`tests/plan/test_recoding.py` measures them again), with bfloat16 scales, which at 8 bits
are worse than float16 ones. Real weights differ: the formats chosen keep a fifth of the bound in reserve, and a
conversion measures every tensor and says where one is beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxq.types import QuantSpec, TensorInfo

#: The part of a type's own error that a new format may add, and the part that it may add to Gaussian weights.
MOST_ADDED = 0.5
MOST_EXPECTED = 0.4


@dataclass(frozen=True)
class Recoding:
    """The relative RMSE of a ggml type, the spec that its weights get, and the relative RMSE which that adds."""

    own: float
    spec: QuantSpec
    added: float

    @property
    def bound(self) -> float:
        """The largest relative RMSE that may be added."""
        return MOST_ADDED * self.own


RECODINGS = {
    #                   own                        added
    "Q6_K": Recoding(0.0174, QuantSpec(8, 64), 0.0069),
    "Q3_K": Recoding(0.145, QuantSpec(5, 128), 0.0425),
    "Q2_K": Recoding(0.268, QuantSpec(4, 128), 0.0945),
    "IQ4_NL": Recoding(0.0752, QuantSpec(6, 128), 0.0239),
    "IQ4_XS": Recoding(0.0759, QuantSpec(6, 128), 0.0239),
    "IQ3_S": Recoding(0.137, QuantSpec(5, 128), 0.0448),
    "IQ3_XXS": Recoding(0.182, QuantSpec(5, 128), 0.0458),
    "IQ2_S": Recoding(0.250, QuantSpec(4, 128), 0.0957),
    "IQ2_XS": Recoding(0.301, QuantSpec(4, 128), 0.0987),
    "IQ2_XXS": Recoding(0.345, QuantSpec(4, 128), 0.100),
    "IQ1_M": Recoding(0.454, QuantSpec(3, 64), 0.180),
    "IQ1_S": Recoding(0.487, QuantSpec(3, 128), 0.168),
}

#: Formats of other tools than ggml's: codes that are no grid, or floats under scales that MLX has no place for. Their
#: own errors are those of rounding to the nearest code: FP8 with a scale for the tensor, NF4 and FP4 in blocks of 64.
FOREIGN = {
    "FP8": Recoding(0.0263, QuantSpec(8, 128), 0.0071),
    "NF4": Recoding(0.0921, QuantSpec(6, 128), 0.0234),
    "FP4": Recoding(0.121, QuantSpec(5, 128), 0.0470),
    "NVFP4+scale": Recoding(0.0942, QuantSpec(6, 128), 0.0239),
}


def recoding_of(info: TensorInfo) -> Recoding | None:
    """What a tensor becomes that is asked for as it is stored; None where it stays: MLX holds it, or it is float."""
    return RECODINGS.get(info.dtype) or (FOREIGN.get(info.dtype) if info.spec is None else None)
