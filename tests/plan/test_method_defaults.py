"""Which method a plan gets where none is asked for."""

import pytest

from mlxq.plan.default_method import default_method
from mlxq.plan.planner import Plan
from mlxq.types import QuantSpec, TensorInfo, TensorPlan

pytestmark = pytest.mark.real_default


def tensor(dtype, action, to, module="linear"):
    info = TensorInfo("w", (256, 256), dtype, 1, module=module)
    spec, stored = (to, "BF16") if isinstance(to, QuantSpec) else (None, to)
    return TensorPlan(info, action, spec, stored, "why")


@pytest.mark.parametrize(
    ("dtype", "action", "to", "method", "words"),
    [
        ("BF16", "quantize", QuantSpec(4, 64), "gptq", "6 bits or fewer"),
        ("BF16", "quantize", QuantSpec(6, 64), "gptq", "6 bits or fewer"),
        ("BF16", "quantize", QuantSpec(8, 64), "rtn", "more than 6 bits"),
        ("BF16", "quantize", "Q6_K", "gptq", "6 bits or fewer"),
        ("BF16", "quantize", "Q5_1", "gptq", "6 bits or fewer"),
        ("BF16", "quantize", "Q8_0", "rtn", "more than 6 bits"),
        ("FP8", "requantize", QuantSpec(4, 64), "gptq", "6 bits or fewer"),
        ("NF4", "requantize", QuantSpec(4, 64), "gptq", "6 bits or fewer"),
        # What these become where nothing is asked for: nearer to them than they are to what they were made of.
        ("FP8", "requantize", QuantSpec(8, 128), "rtn", "more than 6 bits"),
        ("NF4", "requantize", QuantSpec(6, 128), "rtn", "lose much less than the source"),
        ("NF4", "requantize", "Q6_K", "rtn", "lose much less than the source"),
        ("Q3_K", "requantize", QuantSpec(5, 128), "rtn", "lose much less than the source"),
        ("Q3_K", "requantize", QuantSpec(4, 64), "gptq", "6 bits or fewer"),
        ("Q4_1", "repack", QuantSpec(4, 32), "rtn", ""),
        ("BF16", "keep", "BF16", "rtn", ""),
    ],
)
def test_by_what_a_tensor_loses(dtype, action, to, method, words):
    chosen, why = default_method(Plan((tensor(dtype, action, to),), "BF16"))
    assert chosen == method
    assert words in why
    assert bool(why) == bool(words)


def test_one_that_loses_much_is_enough_and_what_no_text_reaches_is_not():
    eight, four = tensor("BF16", "quantize", "Q8_0"), tensor("BF16", "quantize", "Q4_0")
    other = tensor("BF16", "quantize", "Q4_0", module="other")
    assert default_method(Plan((eight, four), "Q4_0"))[0] == "gptq"
    assert default_method(Plan((eight, other), "Q4_0"))[0] == "rtn"


def test_what_goes_on_from_a_text_gets_one():
    assert default_method(Plan((tensor("BF16", "quantize", "Q8_0"),), "Q8_0"), needs_text=True)[0] == "gptq"
