"""How the codes of a tensor can be asked to be chosen."""

from __future__ import annotations

from mlxq.errors import PlanError
from mlxq.types import TensorPlan

#: Those that look at what a calibration text sends into the layers; of these, which scale the layers' inputs, and
#: which feed errors back.
CALIBRATED = ("search", "gptq", "awq", "awq+gptq")
SCALING = ("awq", "awq+gptq")
FEEDBACK = ("gptq", "awq+gptq")
METHODS = ("rtn", *CALIBRATED)


def check_method(method: str | None) -> None:
    """Refuse what is no method; None is the default.

    Raises:
        PlanError: the message lists those there are.
    """
    if method is not None and method not in METHODS:
        raise PlanError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")


def is_calibrated(plan: TensorPlan) -> bool:
    """Whether a tensor is quantized by a method that needs a text."""
    return plan.method in CALIBRATED and plan.action in ("quantize", "requantize")
