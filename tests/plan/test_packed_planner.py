"""What GPTQ and AWQ directories hold of a model's tensors, decided from names, shapes and grids alone."""

import re

import pytest

from mlxq.errors import PlanError
from mlxq.plan.packed_planner import GridFacts, make_packed_plan
from mlxq.plan.planner import PlanOptions, make_plan
from mlxq.types import QuantSpec, TensorInfo

FOUR = QuantSpec(4, 64)
BLOCK = "model.layers.0."


def info(name, shape, spec=None, module="linear"):
    return TensorInfo(name, shape, "AFFINE" if spec else "BF16", 1, spec=spec, scales_dtype="F16", module=module)


def model(**changes):
    """A block of two layers with embedding, norm and head; grids by the last part of a name."""
    specs = {"q_proj": FOUR, "down_proj": FOUR, "embed_tokens": QuantSpec(6, 64), "lm_head": FOUR} | changes
    return [
        info("model.embed_tokens.weight", (96, 128), specs["embed_tokens"], "embedding"),
        info(f"{BLOCK}self_attn.q_proj.weight", (128, 128), specs["q_proj"]),
        info(f"{BLOCK}mlp.down_proj.weight", (128, 256), specs["down_proj"]),
        info("model.norm.weight", (128,), None, "other"),
        info("lm_head.weight", (96, 128), specs["lm_head"]),
    ]


def plan(to, infos=None, *, exact=True, symmetric=False, **how):
    return make_packed_plan(infos or model(), to, lambda info: GridFacts(exact, symmetric), **how)


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_layers_of_blocks_are_codes_and_the_rest_float16(to):
    made = plan(to)
    assert [p.action for p in made.tensors] == ["keep", "repack", "repack", "keep", "keep"]
    assert {p.dtype for p in made.tensors} == {"F16"}
    assert made.float_modules == ("lm_head",)
    # 4-bit words and zero points, float16 scales; GPTQ also has the group of each column.
    words = 128 * 128 // 2 + 128 * 2 // 2 + 128 * 2 * 2
    assert made.nbytes_by_name[f"{BLOCK}self_attn.q_proj.weight"] == words + (4 * 128 if to == "gptq" else 0)
    assert made.nbytes_by_name["model.embed_tokens.weight"] == 96 * 128 * 2


@pytest.mark.parametrize(
    ("to", "symmetric", "version"), [("gptq", True, 1), ("gptq", False, 2), ("gptq_v1", False, 1), ("awq", True, 1)]
)
def test_the_version_is_the_one_that_loaders_take(to, symmetric, version):
    made = plan(to, symmetric=symmetric)
    assert (made.version, made.symmetric) == (version, symmetric)


def test_what_a_format_lacks_is_decoded():
    infos = model(down_proj=QuantSpec(8, 32))
    gptq, awq = plan("gptq", infos), plan("awq", infos)
    assert gptq.tensors[2].action == "repack"
    assert any("dynamic" in note for note in gptq.notes)
    assert awq.tensors[2].action == "keep"
    assert "AWQ has no 8-bit group 32" in awq.tensors[2].reason
    other_group = plan("awq", model(q_proj=QuantSpec(4, 32))).tensors[1]
    assert "groups of one size, here 64, not 32" in other_group.reason
    assert plan("gptq", model(q_proj=QuantSpec(6, 64))).tensors[1].action == "keep"
    odd = [*model(), info(f"{BLOCK}mlp.up_proj.weight", (12, 128), FOUR)]
    assert "12 rows do not fill" in plan("gptq", odd).tensors[-1].reason


def test_exact_refuses_rounded_zero_points():
    assert "rounded" in plan("awq", exact=False).tensors[1].reason
    with pytest.raises(PlanError, match=re.escape(f"--exact: {BLOCK}self_attn.q_proj.weight would change")):
        make_packed_plan(model(), "awq", lambda info: GridFacts(False, False), exact=True)


def test_unfit_models_are_refused():
    with pytest.raises(PlanError, match=r"no layer is quantized with 4 bits, as AWQ is; .*--recipe four-way"):
        plan("awq", model(q_proj=None, down_proj=QuantSpec(6, 64)))
    permuted = TensorInfo(f"{BLOCK}mlp.up_proj.weight", (8, 128), "GPTQ", 1, module="linear", permuted_spec=FOUR)
    with pytest.raises(PlanError, match="columns of its layers are out of order"):
        plan("gptq", [permuted])
    with pytest.raises(PlanError, match="stack of 8 matrices"):
        plan("gptq", [*model(), info(f"{BLOCK}mlp.switch_mlp.up_proj.weight", (8, 64, 64), FOUR, "switch")])
    with pytest.raises(PlanError, match=r"unknown format 'gguf': choose one of gptq, gptq_v1, awq"):
        plan("gguf")
    ambiguous = [*model(), info(f"{BLOCK}mlp.down.weight", (8, 128))]
    with pytest.raises(PlanError, match=r"mlp\.down stays float, but AWQ's loaders would take .*down_proj for it"):
        plan("awq", [*model(), info(f"{BLOCK}mlp.down.weight", (8, 128))])
    assert plan("gptq", ambiguous).float_modules == ("lm_head", f"{BLOCK}mlp.down")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "the four-way recipe has 4 bits, as AWQ does; got 5 bits"),
        ({"dtype": "bfloat16"}, "stores float16"),
        ({"tensor_types": ("q_proj=8",)}, "at most 5 bits; got 8"),
    ],
)
def test_the_four_way_recipe_refuses_what_the_four_do_not_hold(options, message):
    with pytest.raises(PlanError, match=message):
        PlanOptions(recipe="four-way", **options)


def test_the_four_way_recipe_gives_every_layer_the_same_group():
    options = PlanOptions(recipe="four-way")
    made = make_plan(model(), options)
    assert made.dtype == "F16"
    specs = {p.info.name.split(".")[-2]: p.spec for p in made.tensors}
    five = QuantSpec(5, 64)
    assert specs == {"embed_tokens": five, "q_proj": FOUR, "down_proj": FOUR, "norm": None, "lm_head": five}
    assert {p.action for p in made.tensors if p.spec} == {"requantize"}, "codes as in the source have another grid"
    assert all(p.four_way for p in made.tensors if p.spec)
    with pytest.raises(PlanError, match=r"up_proj\.weight 32; choose --group-size 32"):
        make_plan([*model(), info(f"{BLOCK}mlp.up_proj.weight", (64, 96))], options)
    with pytest.raises(PlanError, match="stack of 8 matrices"):
        make_plan([*model(), info(f"{BLOCK}mlp.switch_mlp.up_proj.weight", (8, 64, 64), None, "switch")], options)
