"""What is wrong with a converted model, in one line, out of what the proof measured."""

from __future__ import annotations

import math
from typing import Any

from mlxq.checkpoint.config import to_json
from mlxq.checkpoint.safetensors import quoted
from mlxq.evaluate.divergence import Divergence
from mlxq.evaluate.tensors import TensorError

#: Tensors named when a result is broken.
NAMED = 5
#: Keys of config.json that a conversion sets: formats and dtype of the stored tensors.
_OWN_KEYS = frozenset({"quantization", "quantization_config", "torch_dtype", "dtype"})


def config_difference(source: dict[str, Any], result: dict[str, Any]) -> str:
    """The first key, and both values, in which a result's normalized config is not its source's; else empty."""
    for key in sorted((source.keys() | result.keys()) - _OWN_KEYS):
        # Compared as text: NaN, which some configurations hold, is not equal to itself.
        if (key in source) != (key in result) or to_json({key: source[key]}) != to_json({key: result[key]}):
            there, here = (quoted(c[key]) if key in c else "absent" for c in (source, result))
            return f"{key} is {here} in its config.json, but {there} in the source's"
    return ""


def failure(difference: str, divergence: Divergence, bound: float, bpw: float, errors: list[TensorError]) -> str:
    """Why the result is refused, in one line that names the worst tensors; empty where it is not.

    Args:
        difference: what `config_difference` found.
        divergence: between source and result.
        bound: the largest KL that is accepted.
        bpw: bits per weight of the result.
        errors: of the tensors, the worst first; empty when they were not compared.
    """
    broken = [e for e in errors if e.broken]
    worst = f"; worst: {', '.join(map(str, broken[:NAMED]))}" if broken else ""
    if difference:
        return f"the converted model is broken: {difference}{worst}"
    finite = math.isfinite(divergence.kl) and not (
        math.isfinite(divergence.nll_source) and not math.isfinite(divergence.nll_result)
    )
    if not finite:
        reason = "the converted model yields logits that are NaN or infinite"
        return f"{reason}{worst}" if broken else f"{reason}; no tensor is out of line{_largest(errors)}"
    if broken:
        count = f"{len(broken)} of {len(errors)} tensors are" if len(broken) > 1 else "one tensor is"
        return f"the converted model is broken: {count} further from the source than rounding can bring them{worst}"
    if divergence.kl > bound:
        error = f" ± {divergence.kl_se:.2g}" if divergence.kl_se is not None else ""
        return (
            f"the converted model is too far from the source: KL divergence {divergence.kl:.3g}{error} nats per token,"
            f" and {bound:.3g} is the most that is accepted at {bpw:.2f} bits per weight; no tensor is out of line"
            f"{_largest(errors)}; use more bits, or --no-verify to write it all the same"
        )
    return ""


def _largest(errors: list[TensorError]) -> str:
    return f", the largest error is that of {', '.join(map(str, errors[:3]))}" if errors else ""


def remarks(
    divergence: Divergence, bound: float, compared: bool, predicts: bool, vocabulary: int | None
) -> tuple[str, ...]:
    """What a passing number does not say by itself."""
    notes = []
    if compared and math.isinf(bound) and not predicts:
        notes.append(
            "the source predicts the text no better than chance, so no divergence can tell whether the result is good;"
            " every tensor was compared instead"
        )
    elif compared and math.isinf(bound):
        notes.append("at these bits rounding may change predictions without bound; every tensor was compared instead")
    if vocabulary and divergence.nll_source <= math.log(vocabulary) < divergence.nll_result:
        notes.append("the result predicts text worse than chance does: use more bits")
    return tuple(notes)
