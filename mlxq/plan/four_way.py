"""What the four-way recipe asks for: what MLX, GGUF, GPTQ and AWQ files hold alike. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlxq.errors import PlanError
from mlxq.plan.roles import layer_index
from mlxq.types import TensorPlan

#: GPTQ and AWQ files that every loader opens have 4 bits. Embedding and head are floats there, and Q5_1 in GGUF files.
#: More bits would leave too few to a scale whose products float16 holds.
BITS = 4
BITS_BESIDE = 5


def check_options(bits: int, dtype: str | None, overrides: Iterable[tuple[int, str]]) -> None:
    """Refuse what the four do not hold alike; `overrides` are bits and the text of the option that asks for them.

    Raises:
        PlanError: the message says what they do hold.
    """
    if bits != BITS:
        raise PlanError(f"the four-way recipe has {BITS} bits, as AWQ does; got {bits} bits")
    if dtype not in (None, "float16"):
        raise PlanError(f"the four-way recipe stores float16, as GPTQ and AWQ do; leave --dtype {dtype} out")
    for asked, text in overrides:
        if asked > BITS_BESIDE:
            raise PlanError(f"--tensor-type {text!r}: the four-way recipe has at most {BITS_BESIDE} bits; got {asked}")


def check_plan(plans: Sequence[TensorPlan]) -> None:
    """Refuse stacks of matrices, and blocks whose layers have groups of several sizes.

    Raises:
        PlanError: the first tensor that does not fit.
    """
    inside: dict[int, str] = {}
    for plan in plans:
        if plan.spec is None:
            continue
        name = plan.info.name
        if len(plan.info.shape) > 2:
            raise PlanError(
                f"{name} is a stack of {plan.info.shape[0]} matrices, which the four-way recipe cannot hold"
            )
        if layer_index(name) is not None:
            inside.setdefault(plan.spec.group_size, name)
    if len(inside) > 1:
        (largest, first), (smallest, other) = max(inside.items()), min(inside.items())
        raise PlanError(
            f"AWQ has groups of one size, but {first} would have {largest} and {other} {smallest}; choose --group-size "
            f"{smallest}"
        )
