"""FP8, MX, NVFP4, compressed-tensors, ModelOpt, bitsandbytes: what producers stored, against what they decode."""

import contextlib
import hashlib
import json

import numpy as np
import pytest
from packed_cases import cases, write_layer

from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError, MlxqError
from mlxq.formats import crossings
from mlxq.formats.floats import from_float32, to_float32

NAME = "model.layers.0.mlp.up_proj.weight"
#: Where MLX holds the weights, how: bits and groups, or the mode.
EXACT = {
    "ct-int4-g128": "4-bit group 128",
    "ct-int4-g32-asym": "4-bit group 32",
    "ct-int4-channel": "4-bit group 128",
    "ct-int4-channel-asym": "4-bit group 128",
    "ct-int8-g64-asym": "8-bit group 64",
    "ct-int3-g64": "3-bit group 64",
    "ct-int8-channel": "8-bit group 128",
    "ct-int8-channel-asym": "8-bit group 128",
    "ct-int8-tensor": "8-bit group 128",
    "ct-mxfp8": "mxfp8",
    "ct-mxfp4": "mxfp4",
    "fp8-ue8m0": "mxfp8",
    "bnb-int8": "8-bit group 128",
    "gpt-oss": "mxfp4",
}


def opened(directory, name):
    return open_checkpoint(write_layer(directory, cases()[name]))


def logical(checkpoint):
    return [info for info in checkpoint.tensors.values() if len(info.shape) > 1]


def digest(w):
    return hashlib.sha256(np.ascontiguousarray(w, np.float32).tobytes()).hexdigest()


@pytest.mark.parametrize("name", cases())
def test_decoded_as_the_producer_decodes(name, tmp_path):
    case = cases()[name]
    with opened(tmp_path, name) as checkpoint:
        infos = logical(checkpoint)
        values = [checkpoint.read(info.name) for info in infos]
        assert all(v.dtype == np.float32 and v.shape == i.shape for v, i in zip(values, infos, strict=True))
        w = values[0] if len(values) == 1 else np.stack(values, axis=2).reshape(2, 64, -1)
        # One rounding, to the dtype that the producer returns.
        assert digest(to_float32(from_float32(w, case.dtype), case.dtype)) == case.digest
        for info, whole in zip(infos, values, strict=True):
            n = info.shape[0]
            for rows in (slice(0, 1), slice(n // 3, n // 3 + 7), slice(n - 1, n), slice(0, n)):
                np.testing.assert_array_equal(checkpoint.read(info.name, rows), whole[rows])


@pytest.mark.parametrize("name", cases())
def test_codes_are_the_decoded_weights(name, tmp_path):
    with opened(tmp_path, name) as checkpoint:
        infos = logical(checkpoint)
        assert {str(info.spec) for info in infos} == {EXACT.get(name, "None")}
        if name not in EXACT:
            return
        for info in infos:
            q = checkpoint.read_quantized(info.name)
            w = checkpoint.read(info.name)
            w_hat = crossings.dequantize(q)
            if name == "bnb-int8":
                # The producer multiplies by two factors, one after another.
                np.testing.assert_allclose(w_hat, w, rtol=0, atol=2**-22 * np.abs(w).max())
            elif "asym" in name and q.dtype == "F32":
                # s q - s z in float32: the products are exact or round once, and so does the sum.
                np.testing.assert_allclose(w_hat, w, rtol=0, atol=2**-22 * np.abs(w).max())
            else:
                np.testing.assert_array_equal(w_hat, w)
            rows = slice(5 % info.shape[0], 19)
            part = checkpoint.read_quantized(info.name, rows)
            np.testing.assert_array_equal(part.w_q, q.w_q[rows])
            np.testing.assert_array_equal(part.scales, q.scales[rows])


def test_every_stored_byte_is_counted(tmp_path):
    for name, case in cases().items():
        with opened(tmp_path / name, name) as checkpoint:
            counted = sum(info.nbytes for info in checkpoint.tensors.values())
            stored = sum(array.nbytes for _, array in case.tensors.values())
            uncounted = ("weight.quant_state", "input_")
            small = sum(a.nbytes for k, (_, a) in case.tensors.items() if k.startswith(uncounted))
            assert stored - small - 16 <= counted <= stored, name


def changed(name, tensors=None, **settings):
    case = cases()[name]
    merged = {k: v for k, v in (case.settings | settings).items() if v is not None}
    return case._replace(settings=merged, tensors=case.tensors | (tensors or {}))


def edited(name, key, edit):
    dtype, array = cases()[name].tensors[key]
    array = array.copy()
    found = edit(array)
    return {key: (dtype, array if found is None else found)}


def put(value, at=0):
    def edit(array):
        array.reshape(-1)[at] = value

    return edit


def ct(**weights):
    """Settings of compressed-tensors' int4 case with other arguments of its one group."""
    settings = json.loads(json.dumps(cases()["ct-int4-g128"].settings))
    settings["config_groups"]["group_0"]["weights"] |= weights
    return {"config_groups": settings["config_groups"]}


GROUP = cases()["ct-int4-g128"].settings["config_groups"]["group_0"]
OTHER = GROUP | {"weights": GROUP["weights"] | {"group_size": 64}}
OPEN_ERRORS = {
    "scales of the wrong shape": (
        changed("fp8-blocks", edited("fp8-blocks", "weight_scale_inv", lambda a: a[:2])),
        r"weight_scale_inv' is \[2, 3\].*\[3, 3\] \(block\)",
    ),
    "no scales": (
        changed("fp8-tensor", {"weight_scale": ("F32", np.zeros((3, 3), np.float32))}),
        r"weight_scale' is \[3, 3\]",
    ),
    "float of another kind": (
        changed("fp8-blocks", {"weight": ("F8_E5M2", cases()["fp8-blocks"].tensors["weight"][1])}),
        "F8_E5M2, but must be F8_E4M3",
    ),
    "fmt": (changed("fp8-blocks", fmt="e5m2"), "FP8 weights of the format 'e5m2'"),
    "scale_fmt": (changed("fp8-blocks", scale_fmt="ue4m3"), "FP8 scales of the format 'ue4m3'"),
    "weight_block_size": (changed("fp8-blocks", weight_block_size=[128]), r"weight_block_size is \[128\]"),
    "ct format": (
        changed("ct-int4-g128", format="marlin-24", config_groups={"g": GROUP | {"format": None}}),
        "format 'marlin-24', which cannot be read",
    ),
    "ct group format": (
        changed("ct-int4-g128", config_groups={"g": GROUP | {"format": "mxfp6-pack-quantized"}}),
        "'mxfp6-pack-quantized'",
    ),
    "ct bits": (
        changed("ct-int4-g128", **ct(num_bits=7)),
        "codes of 2, 3, 4, 5, 6, 8 bits, but weights say 'int' of 7",
    ),
    "ct bits disagree": (
        changed("ct-int4-g128", **ct(num_bits=8)),
        r"says \[32, 256\], which in 8 bits is \[32, 64\] words, but weight_packed is \[32, 32\]",
    ),
    "ct group disagrees": (
        changed("ct-int4-g128", **ct(group_size=64)),
        r"weight_scale' is \[32, 2\].*must be \[32, 4\]",
    ),
    "ct no zero points": (changed("ct-int4-g128", **ct(symmetric=False)), "weight_zero_point' is missing"),
    "ct zero points": (
        changed("ct-int4-g32-asym", **ct(group_size=32)),
        "has zero points, but its config group is symmetric",
    ),
    "ct two claims": (
        changed("ct-int4-g128", config_groups={"a": GROUP, "b": OTHER}),
        "groups 'a' and 'b' both claim it",
    ),
    "ct no claim": (
        changed("ct-int4-g128", config_groups={"a": GROUP | {"targets": ["re:.*q_proj"]}}),
        "no config group claims it",
    ),
    "ct ignored": (
        changed("ct-int4-g128", ignore=["re:.*up_proj"]),
        "`ignore` \\('re:.\\*up_proj'\\) says that it is not",
    ),
    "ct pattern": (changed("ct-int4-g128", ignore=["re:("]), "no regular expression"),
    "ct sparse": (
        changed("ct-int4-g128", sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse format 'sparse-24-bitmask'",
    ),
    "ct scale dtype": (
        changed("ct-nvfp4", edited("ct-nvfp4", "weight_scale", lambda a: a[:, :8])),
        r"\[32, 8\].*must be \[32, 16\]",
    ),
    "g_idx": (
        changed("ct-int4-g128", {"weight_g_idx": ("I32", np.full(256, 2, np.int32))}),
        "groups 2 to 2, but there are 2",
    ),
    "g_idx length": (
        changed("ct-int4-g128", {"weight_g_idx": ("I32", np.zeros(255, np.int32))}),
        r"\[255\].*must be \[256\]",
    ),
    "modelopt algorithm": (changed("modelopt-nvfp4", quantization={"quant_algo": "W4A8_AWQ"}), "ModelOpt's 'W4A8_AWQ'"),
    "modelopt disagrees": (
        changed("modelopt-nvfp4", quantization={"quant_algo": "FP8"}),
        "is U8, but the settings say FP8",
    ),
    "modelopt excluded": (
        changed("modelopt-nvfp4", quantization={"quant_algo": "NVFP4", "exclude_modules": ["*up_proj*"]}),
        "exclude_modules",
    ),
    "modelopt pre_quant_scale": (
        changed("modelopt-nvfp4", {"pre_quant_scale": ("F32", np.ones(256, np.float32))}),
        "pre_quant_scale",
    ),
    "modelopt scale_2": (
        changed("modelopt-nvfp4", {"weight_scale_2": ("F32", np.ones(2, np.float32))}),
        "must be a single number",
    ),
    "nf4 kind": (changed("bnb-nf4", bnb_4bit_quant_type="af4"), "bitsandbytes weights of type 'af4'"),
    "nf4 table": (changed("bnb-nf4", edited("bnb-nf4", "weight.quant_map", put(0.5, 3))), "not the table of nf4"),
    "nf4 absmax": (
        changed("bnb-nf4", edited("bnb-nf4", "weight.absmax", lambda a: a[:-1])),
        r"absmax' is \[127\].*must be \[128\]",
    ),
    "nf4 bytes": (
        changed("bnb-nf4", edited("bnb-nf4", "weight", lambda a: a[:100])),
        "has 100 bytes, but .* take 4096",
    ),
    "nf4 state": (
        changed("bnb-nf4", edited("bnb-nf4", "weight.quant_state.bitsandbytes__nf4", lambda a: a[:-1])),
        "is not JSON",
    ),
    "int8 magnitudes": (
        changed("bnb-int8", edited("bnb-int8", "SCB", lambda a: a[:5])),
        r"SCB' is \[5\].*must be \[32\]",
    ),
    "int8 tiles": (changed("bnb-int8", {"weight_format": ("U8", np.array(2, np.uint8))}), "only rows can be read"),
    "gpt-oss scales": (
        changed("gpt-oss", edited("gpt-oss", "gate_up_proj_scales", lambda a: a[:, :, :7])),
        r"must be \[2, 64, 8\]",
    ),
    "method": (changed("gpt-oss", quant_method="hqq"), "already quantized with hqq, which cannot be read"),
}
READ_ERRORS = {
    "E4M3 NaN": (changed("fp8-blocks", edited("fp8-blocks", "weight", put(0x7F, 77))), "an E4M3 code is NaN"),
    "E4M3 NaN, negative": (changed("fp8-ue8m0", edited("fp8-ue8m0", "weight", put(0xFF, 9))), "an E4M3 code is NaN"),
    "scale 0": (
        changed("fp8-blocks", edited("fp8-blocks", "weight_scale_inv", put(0, 4))),
        "scales must be positive and finite, but one is 0",
    ),
    "scale infinite": (changed("fp8-blocks", edited("fp8-blocks", "weight_scale_inv", put(np.inf))), "one is inf"),
    "scale NaN": (
        changed("ct-int4-g128", edited("ct-int4-g128", "weight_scale", put(0x7FC0))),
        "a scale is NaN or infinite",
    ),
    "int scale 0": (changed("ct-int4-g128", edited("ct-int4-g128", "weight_scale", put(0))), "a scale is 0"),
    "no power of two": (changed("fp8-ue8m0", edited("fp8-ue8m0", "weight_scale_inv", put(0.3))), "no power of two"),
    "MX scale": (changed("ct-mxfp4", edited("ct-mxfp4", "weight_scale", put(255))), "a scale is 255, which is NaN"),
    "NVFP4 scale": (changed("ct-nvfp4", edited("ct-nvfp4", "weight_scale", put(0x7F))), "NaN or negative in E4M3"),
    "NVFP4 global scale": (
        changed("ct-nvfp4", edited("ct-nvfp4", "weight_global_scale", put(0))),
        "the tensor's scale must be positive",
    ),
    "absmax": (changed("bnb-nf4", edited("bnb-nf4", "weight.absmax", put(np.nan, 5))), "absmax\\) is NaN"),
    "nested": (
        changed("bnb-fp4-nested", edited("bnb-fp4-nested", "weight.nested_absmax", put(np.inf, 0))),
        "double quantization",
    ),
    "SCB": (changed("bnb-int8", edited("bnb-int8", "SCB", put(-1))), "SCB\\) is negative"),
}


@pytest.mark.parametrize("what", OPEN_ERRORS)
def test_refused_when_opened(what, tmp_path):
    case, message = OPEN_ERRORS[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write_layer(tmp_path, case))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", READ_ERRORS)
def test_refused_when_read(what, tmp_path):
    case, message = READ_ERRORS[what]
    with open_checkpoint(write_layer(tmp_path, case)) as checkpoint:
        info = logical(checkpoint)[0]
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read_quantized(info.name) if info.spec else checkpoint.read(info.name)


def test_a_truncated_file_is_refused(tmp_path):
    path = write_layer(tmp_path, cases()["bnb-nf4"]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_the_best_claim_decides(tmp_path):
    groups = {"all": OTHER | {"targets": ["Linear"]}, "some": GROUP | {"targets": ["re:.*up_proj$"]}}
    with open_checkpoint(write_layer(tmp_path, changed("ct-int4-g128", config_groups=groups))) as checkpoint:
        assert checkpoint.tensors[NAME].spec.group_size == 128


def test_columns_out_of_order(tmp_path):
    order = np.random.default_rng(0).permutation(256).astype(np.int32)
    case = cases()["ct-int4-g128"]
    group_of = (np.arange(256) // 128).astype(np.int32)[order]
    shuffled = changed("ct-int4-g128", {"weight_g_idx": ("I32", group_of)})
    with open_checkpoint(write_layer(tmp_path, shuffled)) as checkpoint:
        info = checkpoint.tensors[NAME]
        assert info.spec is None
        assert (info.permuted_spec.bits, info.permuted_spec.group_size) == (4, 128)
        w = checkpoint.read(NAME)
        w_hat = crossings.dequantize(checkpoint.read_quantized(NAME))
        np.testing.assert_array_equal(w_hat, w[:, checkpoint.read_order(NAME)])
    dtype, scales = case.tensors["weight_scale"]
    words = case.tensors["weight_packed"][1].view(np.uint32)
    codes = (words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(32, 256).astype(np.float32) - 8
    np.testing.assert_array_equal(w, codes * to_float32(scales, dtype)[:, group_of])


@pytest.mark.parametrize("spelt", [[16, 64], "16x64"])
def test_blocks_in_either_spelling(spelt, tmp_path):
    settings = json.loads(json.dumps(cases()["ct-fp8-block"].settings))
    settings["config_groups"]["group_0"]["weights"]["block_structure"] = spelt
    with open_checkpoint(write_layer(tmp_path, changed("ct-fp8-block", **settings))) as checkpoint:
        assert checkpoint.read(NAME).shape == (32, 256)
    settings["config_groups"]["group_0"]["weights"]["block_structure"] = "16 by 64"
    with pytest.raises(CheckpointError, match=r"block_structure is '16 by 64', but must be two positive integers"):
        open_checkpoint(write_layer(tmp_path, changed("ct-fp8-block", **settings)))


def test_embeddings_and_scales_of_a_cache(tmp_path):
    """An embedding's group is claimed by its class; scales of the key-value cache are no tensors of a model."""
    case = changed("ct-int4-g128", config_groups={"a": GROUP | {"targets": ["Embedding"]}})
    with open_checkpoint(write_layer(tmp_path / "a", case, "model.embed_tokens")) as checkpoint:
        assert list(checkpoint.tensors) == ["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="no config group claims it"):
        open_checkpoint(write_layer(tmp_path / "b", case))
    scales = {"k_scale": ("F32", np.ones(1, np.float32)), "input_scale": ("F32", np.ones(1, np.float32))}
    with open_checkpoint(write_layer(tmp_path / "c", changed("fp8-tensor", scales))) as checkpoint:
        assert list(checkpoint.tensors) == [NAME]


def test_nvfp4_without_a_scale_of_its_own_is_mlx_s(tmp_path):
    case = changed("ct-nvfp4", {"weight_global_scale": ("F32", np.ones(1, np.float32))})
    with open_checkpoint(write_layer(tmp_path, case)) as checkpoint:
        info = checkpoint.tensors[NAME]
        assert (info.dtype, str(info.spec)) == ("nvfp4", "nvfp4")
        w_hat = crossings.dequantize(checkpoint.read_quantized(NAME))
        np.testing.assert_array_equal(w_hat, checkpoint.read(NAME))


@pytest.mark.parametrize("name", ["fp8-blocks", "fp8-ue8m0", "fp8-rows"])
def test_stacks_are_read_by_matrices(name, tmp_path):
    """Experts stored as one tensor `[experts, N, K]`: each as it would be alone."""
    case = cases()[name]
    with open_checkpoint(write_layer(tmp_path / "one", case)) as checkpoint:
        alone = checkpoint.read(NAME)
    stacked = {k: (dtype, np.stack([a, np.roll(a, 1, 0), a])) for k, (dtype, a) in case.tensors.items()}
    with open_checkpoint(write_layer(tmp_path / "all", case._replace(tensors=stacked))) as checkpoint:
        w = checkpoint.read(NAME)
        assert w.shape == (3, *alone.shape)
        np.testing.assert_array_equal(w[0], alone)
        np.testing.assert_array_equal(checkpoint.read(NAME, slice(1, 3)), w[1:])
        if checkpoint.tensors[NAME].spec is not None:
            q = checkpoint.read_quantized(NAME, slice(2, 3))
            np.testing.assert_array_equal(crossings.dequantize(q)[0], alone)


JUNK = (None, True, -1, 0, 2**70, 0.5, "x", [], [None], {}, {"x": 1})


def variants(value):
    """Settings with one of their parts, at any depth, replaced by junk or taken away."""
    yield from JUNK
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: other} for other in variants(inner))


def only_named_errors(directory, case):
    """Opens and reads, or refuses."""
    with contextlib.suppress(MlxqError), open_checkpoint(write_layer(directory, case)) as checkpoint:
        for info in checkpoint.tensors.values():
            if info.dtype not in ("I8", "U8", "I32", "I64", "F8_E4M3"):
                checkpoint.read(info.name)
    (directory / "hf_quant_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", cases())
def test_any_settings_are_read_or_refused_by_name(name, tmp_path):
    case = cases()[name]
    more = {"exclude_modules": ["lm_head"], "ignore": ["lm_head"], "sparsity_config": {"format": "dense"}}
    inner = case.settings.get("quantization")
    more = {"quantization": inner | more} if inner else more
    for settings in variants(case.settings | more):
        if isinstance(settings, dict):
            only_named_errors(tmp_path, case._replace(settings=settings))


@pytest.mark.parametrize("name", cases())
def test_any_parts_are_read_or_refused_by_name(name, tmp_path):
    case = cases()[name]
    for key, (dtype, array) in case.tensors.items():
        flat = array.reshape(-1)
        others = [array[:-1] if array.ndim else array[None], array[..., :0] if array.ndim else flat[:0]]
        others += [array[None], flat, np.concatenate([flat, flat])]
        only_named_errors(tmp_path, case._replace(tensors={k: v for k, v in case.tensors.items() if k != key}))
        for other in others:
            only_named_errors(tmp_path, case._replace(tensors=case.tensors | {key: (dtype, other)}))
        for kind, storage in (("F32", np.float32), ("I32", np.int32), ("U8", np.uint8), ("BF16", np.uint16)):
            junk = np.resize(np.array([0, 1, 255, 3, 0, 200], storage), array.shape)
            only_named_errors(tmp_path, case._replace(tensors=case.tensors | {key: (kind, junk)}))
