"""Plans are pure, so they are tested without a model: names and shapes in, decisions out."""

import pytest

from mlxq.errors import PlanError
from mlxq.formats import ggml
from mlxq.formats.geometry import block_format
from mlxq.plan.planner import PlanOptions, make_plan
from mlxq.plan.recoding import RECODINGS
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


def blocks(dtype, shape=(64, 256), name="a.weight", module="linear"):
    """A tensor of a GGUF file as its checkpoint describes it."""
    format_ = block_format(dtype)
    nbytes = shape[0] * shape[1] // format_.block_size * format_.type_size
    spec, scales_dtype = ggml.affine_spec(dtype), ggml.affine_scales_dtype(dtype)
    return TensorInfo(name, shape, dtype, nbytes, spec, scales_dtype, module)


def norm(dtype="F32"):
    return TensorInfo("n.weight", (256,), dtype, 1024)


@pytest.mark.parametrize(
    ("type_name", "dtype", "rounded"),
    [
        ("Q4_K", None, "float32 to float16"),
        ("Q5_K", "bfloat16", "float32 to bfloat16"),
        ("Q5_K", "float32", None),
        ("Q4_1", None, None),
        ("Q4_1", "float32", None),
        ("Q8_0", "bfloat16", "float16 to bfloat16"),
        ("MXFP4", "bfloat16", None),
        ("MXFP4", None, None),
    ],
)
def test_codes_are_kept_whatever_the_float_type_of_scales(type_name, dtype, rounded):
    plan = make_plan([blocks(type_name), norm()], PlanOptions(dtype=dtype)).tensors[0]
    assert (plan.action, plan.spec) == ("repack", ggml.affine_spec(type_name))
    assert plan.reason == "codes as in the source" + (f", scales rounded from {rounded}" if rounded else "")


@pytest.mark.parametrize("type_name", RECODINGS)
def test_types_without_a_fitting_grid_become_the_format_of_the_table(type_name):
    plan = make_plan([blocks(type_name), norm()], PlanOptions()).tensors[0]
    assert (plan.action, plan.spec) == ("requantize", RECODINGS[type_name].spec)
    assert f"of about {RECODINGS[type_name].added:.2g}" in plan.reason
    assert f"(source: {type_name})" in plan.reason
    asked = make_plan([blocks(type_name), norm()], PlanOptions(bits=4)).tensors[0]
    assert (asked.action, asked.spec) == ("requantize", QuantSpec(4, 64))


def test_groups_of_new_formats_fit_the_rows():
    # 768 weights are whole super-blocks, 192 whole blocks of IQ4_NL.
    assert make_plan([blocks("Q3_K", (8, 768))], PlanOptions()).tensors[0].spec == QuantSpec(5, 128)
    assert make_plan([blocks("IQ4_NL", (8, 192))], PlanOptions()).tensors[0].spec == QuantSpec(6, 64)


def test_blocks_take_the_dtype_that_the_model_computes_in():
    infos = [blocks("Q8_0", (512, 256), "e.weight", "embedding"), blocks("Q4_K"), blocks("Q6_K"), norm()]
    assert make_plan(infos, PlanOptions()).dtype == "F16"
    assert make_plan(infos, PlanOptions(), model_dtype="bfloat16").dtype == "BF16"
    assert make_plan(infos, PlanOptions(dtype="float32"), model_dtype="bfloat16").dtype == "F32"
    assert make_plan(infos, PlanOptions(), model_dtype="no dtype").dtype == "F16"
    # Floats, and the scales of an MLX directory, speak for themselves.
    assert make_plan([info("a.weight", (64, 128))], PlanOptions(), model_dtype="float16").dtype == "BF16"
    mlx = TensorInfo("a.weight", (64, 128), "AFFINE", 5120, QuantSpec(4, 32), "BF16", "linear")
    assert make_plan([mlx], PlanOptions(), model_dtype="float16").dtype == "BF16"


def test_decoded_tensors_that_are_kept_say_what_they_were():
    plan = make_plan([blocks("Q6_K"), norm()], PlanOptions(keep=("a",))).tensors[0]
    assert (plan.action, plan.dtype, plan.reason) == ("keep", "F16", "--keep a; decoded from Q6_K")


@pytest.mark.parametrize(
    ("tensor", "options", "message"),
    [
        (
            info("a.weight", (64, 256)),
            {},
            "a.weight is BF16 and would be quantized to 4-bit group 64; --keep 'a.weight'",
        ),
        (blocks("Q6_K"), {}, "a.weight would change from Q6_K to 8-bit group 64: no MLX grid .* --dtype float32"),
        (blocks("Q4_1"), {"bits": 3}, "Q4_1 to 3-bit group 64: leave its bits and group size as they are, or keep"),
    ],
)
def test_exact_refuses_what_is_known_to_change(tensor, options, message):
    with pytest.raises(PlanError, match=f"--exact: .*{message}"):
        make_plan([tensor, norm()], PlanOptions(exact=True, **options))


@pytest.mark.parametrize(
    ("tensor", "options", "action"),
    [
        (blocks("Q4_K"), {"dtype": "float32"}, "repack"),
        # Only the values tell whether anything is lost.
        (blocks("Q4_1"), {}, "repack"),
        (blocks("Q4_K"), {}, "repack"),
        (blocks("Q6_K"), {"dtype": "float32", "keep": ("a",)}, "keep"),
        # Twice as large, and exact.
        (blocks("IQ4_XS"), {"dtype": "float32"}, "repack"),
    ],
)
def test_exact_plans_what_can_be(tensor, options, action):
    plan = make_plan([tensor, norm()], PlanOptions(exact=True, **options))
    assert plan.exact
    assert [p.action for p in plan.tensors] == [action, "keep"]
    assert plan.tensors[0].spec == (tensor.spec if action == "repack" else None)


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
