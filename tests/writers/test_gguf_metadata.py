"""What a GGUF file says of its types."""

import gguf
import pytest

from mlxq.formats import ggml
from mlxq.plan.planner import Plan
from mlxq.types import TensorInfo, TensorPlan
from mlxq.writers.gguf.metadata import file_type_number


def plan(file_type, *types):
    infos = [TensorInfo(f"{i}", (256 * (i + 1), 256), "F32", 0) for i in range(len(types))]
    return Plan(tuple(TensorPlan(i, "keep", None, t, "") for i, t in zip(infos, types, strict=True)), file_type)


def test_the_file_type_is_the_one_asked_for_or_that_of_most_weights():
    assert file_type_number(plan("Q4_K_S", "Q5_K", "Q6_K")) == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert file_type_number(plan("as stored", "Q6_K", "Q4_K")) == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert file_type_number(plan("as stored", "Q4_K", "F16")) == gguf.LlamaFileType.MOSTLY_F16


@pytest.mark.parametrize("name", [n for n in ggml.READABLE if n not in ("F32", "NVFP4")])
def test_no_type_that_is_kept_is_called_float32(name):
    number = file_type_number(plan("as stored", name))
    assert name in gguf.LlamaFileType(number).name
