"""Plans are pure, so they are tested without a model: names and shapes in, decisions out."""

import pytest

from mlxq.errors import PlanError
from mlxq.plan.planner import PlanOptions, make_plan
from mlxq.plan.roles import role
from mlxq.types import QuantSpec, TensorInfo

N_LAYERS = 16


def info(name, shape, module="linear", dtype="BF16", **kw):
    size = 1
    for d in shape:
        size *= d
    return TensorInfo(name, shape, dtype, size * 2, module=module, **kw)


def model(dtype="BF16", in_features=256):
    tensors = [info("model.embed_tokens.weight", (1000, in_features), "embedding", dtype)]
    for i in range(N_LAYERS):
        p = f"model.layers.{i}."
        tensors += [
            info(p + "self_attn.q_proj.weight", (256, in_features), dtype=dtype),
            info(p + "self_attn.v_proj.weight", (64, in_features), dtype=dtype),
            info(p + "mlp.down_proj.weight", (256, 512), dtype=dtype),
            info(p + "mlp.gate.weight", (8, in_features), dtype=dtype),
            info(p + "input_layernorm.weight", (256,), "other", dtype),
        ]
    return [*tensors, info("lm_head.weight", (1000, in_features), dtype=dtype)]


def specs(plan):
    return {p.info.name: p.spec for p in plan.tensors}


def bits_of(plan, part):
    return {n: s.bits for n, s in specs(plan).items() if part in n and s}


def test_uniform_gives_base_bits_and_respects_floors():
    plan = make_plan(model(), PlanOptions(bits=4, group_size=64))
    assert set(bits_of(plan, "q_proj").values()) == {4}
    assert set(bits_of(plan, "lm_head").values()) == {4}
    assert bits_of(plan, "embed") == {"model.embed_tokens.weight": 6}
    assert set(bits_of(plan, "mlp.gate").values()) == {8}
    assert all(p.reason for p in plan.tensors)


def test_floors_give_way_to_an_explicit_wish():
    options = PlanOptions(bits=4, tensor_types=("embed_tokens=3:32", r"mlp\.gate=4"))
    plan = make_plan(model(), options)
    assert specs(plan)["model.embed_tokens.weight"] == QuantSpec(3, 32)
    assert set(bits_of(plan, "mlp.gate").values()) == {4}


def test_mixed_recipe_gives_sensitive_layers_more():
    plan = make_plan(model(), PlanOptions(bits=4, recipe="mixed"))
    down = bits_of(plan, "down_proj")
    # First and last eighth of 16 layers, and every third of those between (llama.cpp's use_more_bits).
    expected = {0, 1, 4, 7, 10, 13, 14, 15}
    assert {int(n.split(".")[2]) for n, b in down.items() if b == 6} == expected
    assert set(down.values()) == {4, 6}
    assert bits_of(plan, "lm_head") == {"lm_head.weight": 6}
    assert plan.bpw > make_plan(model(), PlanOptions(bits=4)).bpw


def test_last_matching_override_wins_and_keep_beats_it():
    options = PlanOptions(tensor_types=("proj=8", r"layers\.3\..*q_proj=2:128"), keep=("v_proj",))
    plan = make_plan(model(), options)
    assert specs(plan)["model.layers.3.self_attn.q_proj.weight"] == QuantSpec(2, 128)
    assert specs(plan)["model.layers.4.self_attn.q_proj.weight"] == QuantSpec(8, 64)
    assert specs(plan)["model.layers.3.self_attn.v_proj.weight"] is None
    assert {p.info.name.split(".")[4] for p in plan.kept_weights} == {"v_proj"}


@pytest.mark.parametrize(("in_features", "asked", "expected"), [(576, 128, 64), (96, 64, 32), (256, 128, 128)])
def test_widths_take_the_largest_legal_group(in_features, asked, expected):
    plan = make_plan(model(in_features=in_features), PlanOptions(bits=4, group_size=asked))
    p = next(p for p in plan.tensors if "q_proj" in p.info.name)
    assert p.spec == QuantSpec(4, expected)
    assert ("because" in p.reason) == (expected != asked)


def test_rows_that_divide_by_nothing_stay_float_and_are_listed_with_bytes():
    plan = make_plan(model(in_features=100), PlanOptions(bits=4))
    kept = {p.info.name for p in plan.kept_weights}
    assert "lm_head.weight" in kept
    assert "model.layers.0.mlp.down_proj.weight" not in kept
    assert plan.nbytes_by_name["lm_head.weight"] == 1000 * 100 * 2


def test_bpw_counts_scales_and_biases():
    plan = make_plan([info("a.weight", (64, 128))], PlanOptions(bits=4, group_size=32))
    # 4 bits of code, and 16 + 16 bits of scale and bias for 32 weights.
    assert plan.bpw == 5.0
    assert plan.nbytes == 64 * 128 * 5 // 8


def quantized_source():
    spec = QuantSpec(4, 32)
    return [
        TensorInfo("model.layers.0.mlp.up_proj.weight", (64, 128), "Q4_1", 5120, spec, "F16", "linear"),
        TensorInfo("model.norm.weight", (128,), "F32", 512),
    ]


def test_quantized_source_is_repacked_unless_something_else_is_asked():
    plan = make_plan(quantized_source(), PlanOptions())
    assert [p.action for p in plan.tensors] == ["repack", "keep"]
    assert plan.tensors[1].dtype == "F16"  # float32 norms beside float16 scales would promote every activation
    assert make_plan(quantized_source(), PlanOptions(bits=4, group_size=32)).tensors[0].action == "repack"
    other = make_plan(quantized_source(), PlanOptions(bits=4, group_size=64)).tensors[0]
    assert (other.action, other.spec) == ("requantize", QuantSpec(4, 64))
    cast = make_plan(quantized_source(), PlanOptions(dtype="bfloat16")).tensors[0]
    assert (cast.action, cast.dtype) == ("repack", "BF16")
    assert "scales rounded from float16 to bfloat16" in cast.reason


def kept(norm_dtype, **options):
    """The plan of a norm in `norm_dtype` beside a weight in bfloat16."""
    tensors = [info("a.weight", (64, 128)), info("n.weight", (128,), "other", norm_dtype)]
    protected = frozenset(options.pop("protected", ()))
    return make_plan(tensors, PlanOptions(**options), cast_protected=protected).tensors[1]


def test_kept_tensors_take_the_dtype_of_the_model():
    """As stock mlx-lm's conversion does: one float32 norm would make all activations float32."""
    norm = kept("F32")
    assert norm.dtype == "BF16"
    assert "float32 beside bfloat16 would promote activations" in norm.reason
    assert kept("F16").dtype == "BF16"
    assert kept("BF16").reason == "norm, bias or buffer: no layer holds it quantized"
    assert kept("F32", dtype="float16").dtype == "F16"
    assert kept("BF16", dtype="float32").dtype == "F32"


def test_a_model_in_float32_keeps_its_norms():
    tensors = [info("a.weight", (64, 128), dtype="F32"), info("n.weight", (128,), "other", "F32")]
    assert [p.dtype for p in make_plan(tensors, PlanOptions()).tensors] == ["F32", "F32"]


def test_tensors_that_the_architecture_protects_keep_their_dtype():
    assert kept("F32", protected=["n.weight"]).dtype == "F32"
    assert kept("F32", protected=["n.weight"], dtype="float16").dtype == "F32"


def test_the_architecture_can_keep_a_layer_float_or_ask_for_bits():
    plan = make_plan(
        [info("a.weight", (64, 128)), info("b.weight", (64, 128))], PlanOptions(bits=3), float_modules={"a": 0, "b": 8}
    )
    assert [p.spec and p.spec.bits for p in plan.tensors] == [None, 8]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, ["7", "2, 3, 4, 5, 6, 8"]),
        ({"bits": 0}, ["0", "2, 3, 4, 5, 6, 8"]),
        ({"group_size": 16}, ["16", "32, 64, 128"]),
        ({"recipe": "best"}, ["best", "uniform", "mixed"]),
        ({"dtype": "fp16"}, ["fp16", "float16"]),
        ({"tensor_types": ("q_proj",)}, ["q_proj", "REGEX=BITS"]),
        ({"tensor_types": ("q_proj=7",)}, ["q_proj=7", "2, 3, 4, 5, 6, 8"]),
        ({"tensor_types": ("q_proj=4:48",)}, ["48", "32, 64, 128"]),
        ({"tensor_types": ("(=4",)}, ["(", "regular expression"]),
        ({"keep": ("[",)}, ["[", "regular expression"]),
        ({"keep": ("",)}, ["--keep", "empty"]),
        ({"keep": "lm_head"}, ["keep", "'lm_head'", "tuple or list"]),
        ({"keep": (5,)}, ["keep", "5", "tuple or list"]),
        ({"tensor_types": "v_proj=6"}, ["tensor_types", "'v_proj=6'", "tuple or list"]),
        ({"tensor_types": ("=6",)}, ["=6", "REGEX=BITS"]),
        ({"bits": 4.0}, ["4.0", "2, 3, 4, 5, 6, 8"]),
        ({"bits": True}, ["True", "2, 3, 4, 5, 6, 8"]),
        ({"group_size": 64.0}, ["64.0", "32, 64, 128"]),
    ],
)
def test_illegal_options_are_refused_before_any_model(options, words):
    with pytest.raises(PlanError) as e:
        PlanOptions(**options)
    assert all(w in str(e.value) for w in words)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("options", [{"keep": ("nothing_like_it",)}, {"tensor_types": ("nothing_like_it=4",)}])
def test_patterns_without_effect_are_refused(options):
    with pytest.raises(PlanError, match="nothing_like_it"):
        make_plan(model(), PlanOptions(**options))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("v_proj", N_LAYERS), ("self_attn", 2 * N_LAYERS), (r"layers\.0\.", 4), (".*", 4 * N_LAYERS + 2)],
)
def test_patterns_that_match_norms_and_biases_too_pass_them_by(pattern, expected):
    tensors = [*model(), *(info(f"model.layers.{i}.self_attn.v_proj.bias", (64,), "other") for i in range(N_LAYERS))]
    plan = make_plan(tensors, PlanOptions(tensor_types=(f"{pattern}=8:32",)))
    assert sum(s == QuantSpec(8, 32) for s in specs(plan).values()) == expected
    assert all(p.action == "keep" for p in plan.tensors if p.info.module == "other")


@pytest.mark.parametrize("pattern", ["layernorm", r"\.bias$"])
def test_a_pattern_that_matches_norms_and_biases_alone_is_refused(pattern):
    tensors = [*model(), info("model.layers.0.self_attn.v_proj.bias", (64,), "other")]
    with pytest.raises(PlanError, match=r"no layer can hold quantized, such as model\.layers\.0"):
        make_plan(tensors, PlanOptions(tensor_types=("q_proj=8", f"{pattern}=4")))


def test_patterns_may_come_in_a_list():
    options = PlanOptions(tensor_types=["q_proj=8"], keep=["lm_head"])
    assert options == PlanOptions(tensor_types=("q_proj=8",), keep=("lm_head",))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.block_sparse_moe.gate.weight", "router"),
        ("model.layers.1.mlp.router.weight", "router"),
        ("model.layers.1.mlp.gate_proj.weight", "linear"),
        ("model.layers.1.mlp.switch_mlp.down_proj.weight", "down"),
        ("model.layers.1.self_attn.qkv_proj.weight", "value"),
        ("lm_head.weight", "head"),
        ("output.weight", "head"),
        ("language_model.model.output.weight", "head"),
        ("model.transformer.ff_out.weight", "head"),
        ("model.transformer.blocks.3.ff_out.weight", "down"),
        ("bert.layers.1.attention.output.weight", "linear"),
        ("model.layers.1.attention.wqkv.weight", "value"),
        ("transformer.h.1.attn.c_v.weight", "value"),
        ("model.blocks.1.attn.attn_value.weight", "value"),
        ("model.layers.1.self_attn.unembed_out.weight", "value"),
        ("model.layers.1.ffn.value.weight", "down"),
        ("transformer.h.1.mlp.c_proj.weight", "down"),
        ("transformer.h.1.attn.c_proj.weight", "linear"),
    ],
)
def test_roles(name, expected):
    assert role(info(name, (64, 64))) == expected
