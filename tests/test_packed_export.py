"""Quantized models as GPTQ and AWQ directories: read back they hold the same codes and weights."""

import itertools
import json
import shutil

import numpy as np
import pytest
import tiny

import mlxq
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError, OutputError, PlanError
from mlxq.evaluate.comparison.compare import compare
from mlxq.formats import affine
from mlxq.formats.floats import to_float32
from mlxq.types import QuantSpec

FORMATS = ("gptq", "gptq_v1", "awq")
SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 264}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model in all four, and as `gptq_v1`; one group of one layer has zero point 0."""
    root = tmp_path_factory.mktemp("four")
    tensors = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA | SMALL))
    tensors[f"{LAYER}.weight"][5, :64] = np.linspace(0, 1, 64)
    tiny.add_merge(tiny.make_model(root / "source", tensors=tensors, **SMALL))
    mlxq.convert(root / "source", [root / "mlx", root / "model.gguf"], recipe="four-way", method="rtn", verify=False)
    for to in FORMATS:
        mlxq.export(root / "mlx", root / to, to=to, exact=True, verify=to == "awq")
    return root


def stored(directory):
    """Arrays of a directory's one safetensors file, read by hand."""
    data = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, out = json.loads(data[8 : 8 + size]), {}
    assert header.pop("__metadata__") == {"format": "pt"}
    types = {"I32": np.int32, "F16": np.float16}
    for name, entry in header.items():
        begin, end = (8 + size + at for at in entry["data_offsets"])
        out[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
    return out


def fields(words, axis, order=range(8)):
    """4-bit codes of int32 words along an axis."""
    words = words.view(np.uint32)
    parts = [None] * 8
    for i, at in enumerate(order):
        parts[at] = words >> (4 * i) & 15
    out = np.stack(parts, axis=axis + 1)
    shape = list(words.shape)
    shape[axis] *= 8
    return out.reshape(shape).astype(np.float16)


def formula(tensors, to, module):
    """What a CUDA loader computes, in float16: `(q - z) * s`, by its own reading of the words; `[N, K]`."""
    weight, zeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if to == "awq":
        q, z = (fields(words, 1, AWQ_ORDER) for words in (weight, zeros))
        group_of = np.arange(len(q)) // (len(q) // len(scales))
    else:
        q, z = fields(weight, 0), fields(zeros, 1) + (to == "gptq_v1")
        group_of = tensors[f"{module}.g_idx"]
    return ((q - z[group_of]) * scales[group_of]).T


def test_all_pairs_decode_to_the_same_numbers(made):
    for a, b in itertools.combinations(("mlx", "model.gguf", *FORMATS), 2):
        found = compare(made / a, made / b, only=("tensors", "config", "tokenizer", "template"))
        assert found.passed, (a, b, found.failure)
        # A mirrored group of version 1 has zeros of the other sign.
        allowed = {"identical", "equal"} if "gptq_v1" in (a, b) else {"identical"}
        assert {c.status for c in found.tensors} <= allowed, (a, b)


@pytest.mark.parametrize("to", FORMATS)
def test_a_loader_s_float16_formula_gives_mlx_s_numbers(made, to):
    tensors = stored(made / to)
    with open_checkpoint(made / "mlx") as mlx:
        for name, info in mlx.tensors.items():
            if not info.spec or not name.startswith("model.layers"):
                expected = to_float32(mlx.read(name), "F32" if info.spec else "F16")
                np.testing.assert_array_equal(tensors[name].astype(np.float32), expected)
                continue
            found = formula(tensors, to, name.removesuffix(".weight"))
            assert found.dtype == np.float16
            np.testing.assert_array_equal(found.astype(np.float32), mlx.read(name))


@pytest.mark.parametrize("to", FORMATS)
def test_the_import_reads_the_same_codes(made, to):
    with open_checkpoint(made / "mlx") as mlx, open_checkpoint(made / to) as read:
        for name, info in read.tensors.items():
            if info.spec is None:
                continue
            a, b = (affine.unpack(c.read_quantized(name).w_q, 4, info.shape[-1]) for c in (mlx, read))
            differs = (a != b).any(axis=1)
            # Version 1 has no zero point 0: that group is mirrored.
            mirrored = [5] if to == "gptq_v1" and name == f"{LAYER}.weight" else []
            np.testing.assert_array_equal(np.flatnonzero(differs), mirrored)
            np.testing.assert_array_equal(mlx.read(name), read.read(name))


@pytest.mark.parametrize("to", FORMATS)
def test_import_and_export_give_the_same_bytes(made, to, tmp_path):
    mlxq.export(made / to, tmp_path / "again", to=to, verify=False)
    mlxq.convert(made / to, tmp_path / "mlx", verify=False)
    mlxq.export(tmp_path / "mlx", tmp_path / "through", to=to, verify=False)
    weights = (made / to / "model.safetensors").read_bytes()
    for other in ("again", "through"):
        assert (tmp_path / other / "model.safetensors").read_bytes() == weights
    again, first = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "again", made / to))
    assert again == first


def test_settings_say_what_loaders_ask_for(made):
    gptq, v1, awq = (json.loads((made / to / "config.json").read_text()) for to in FORMATS)
    assert {c["torch_dtype"] for c in (gptq, v1, awq)} == {"float16"}
    found = gptq["quantization_config"]
    assert {k: found[k] for k in ("quant_method", "bits", "group_size", "desc_act", "sym", "lm_head")} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
    }
    assert (found["checkpoint_format"], v1["quantization_config"]["checkpoint_format"]) == ("gptq_v2", "gptq")
    assert json.loads((made / "gptq/quantize_config.json").read_text()) == found
    assert awq["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    older = json.loads((made / "awq/quant_config.json").read_text())
    assert (older["w_bit"], older["q_group_size"], older["version"]) == (4, 64, "GEMM")
    assert "quantization" not in awq
    assert (made / "awq/tokenizer.json").read_bytes() == (made / "mlx/tokenizer.json").read_bytes()
    errors = {t["relative_error"] for t in json.loads((made / "awq/mlxq.json").read_text())["tensors"]}
    assert errors == {0.0}


def test_stock_codes_are_exported_with_their_error(made, tmp_path):
    mlxq.convert(made / "source", tmp_path / "stock", method="rtn", verify=False)
    result = mlxq.export(tmp_path / "stock", tmp_path / "awq", to="awq")
    assert any("zero points rounded to integers" in note for note in result.notes)
    # Quantizing to 4 bits changes the weights by about 0.1; bfloat16 scales are off by up to 2^-9, a step by 15 times.
    errors = [t["relative_error"] for t in json.loads((tmp_path / "awq/mlxq.json").read_text())["tensors"]]
    assert 0 < max(errors) < 0.01
    with pytest.raises(PlanError, match=r"--exact: .* zero points are integers only when rounded"):
        mlxq.export(tmp_path / "stock", tmp_path / "exact", to="awq", exact=True)
    assert not (tmp_path / "exact").exists()


def test_unfit_sources_are_refused_and_leave_nothing(made, tmp_path):
    mlxq.convert(made / "source", tmp_path / "portable", recipe="portable", verify=False)
    strange = shutil.copytree(made / "mlx", tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    before = sorted(p.name for p in tmp_path.iterdir())
    cases = [
        (tmp_path / "portable", "awq", PlanError, "weight: .* no integer zero point .*--recipe four-way"),
        (made / "source", "gptq", PlanError, "no layer is quantized with 2, 3, 4, 8 bits"),
        (strange, "gptq", CheckpointError, "'gpt2' cannot be exported"),
        (made / "mlx", "exl2", PlanError, "--to exl2: choose one of gptq, gptq_v1, awq"),
    ]
    for source, to, error, message in cases:
        with pytest.raises(error, match=message):
            mlxq.export(source, tmp_path / "out", to=to)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(OutputError, match="exists"):
        mlxq.export(made / "mlx", made / "awq", to="awq")
    with pytest.raises(PlanError, match="makes a directory"):
        mlxq.export(made / "mlx", tmp_path / "out.gguf", to="awq")
    with pytest.raises(PlanError, match="--pre is for a GGUF file"):
        mlxq.export(made / "mlx", tmp_path / "out", to="awq", pre="llama-bpe")


@pytest.mark.parametrize("option", [{"tune": 3}, {"target_bpw": 4.5}, {"imatrix": "x.gguf"}])
def test_the_recipe_refuses_what_would_leave_its_grid(made, tmp_path, option):
    with pytest.raises(PlanError, match="four-way recipe has 4 bits"):
        mlxq.convert(made / "source", tmp_path / "out", recipe="four-way", **option)


def test_layers_that_differ_are_named_to_gptq_s_loaders(made, tmp_path):
    rules = {"tensor_types": ["down_proj=8", "up_proj=6"], "keep": ["v_proj"]}
    mlxq.convert(made / "source", tmp_path / "mixed", method="rtn", dtype="float16", verify=False, **rules)
    result = mlxq.export(tmp_path / "mixed", tmp_path / "gptq", to="gptq")
    dynamic = json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]["dynamic"]
    block = r"model\.layers\.0\."
    assert dynamic == {
        f"+:^{block}mlp\\.down_proj$": {"bits": 8, "group_size": 64},
        f"-:^{block}mlp\\.up_proj$": {},
        f"-:^{block}self_attn\\.v_proj$": {},
    }
    assert any("`dynamic`" in note for note in result.plan.notes)
    with open_checkpoint(tmp_path / "gptq") as read:
        assert read.tensors[f"{LAYER}.weight"].spec == QuantSpec(8, 64)
        assert read.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "F16"
    kept = next(p for p in result.plan.tensors if "up_proj" in p.info.name)
    assert kept.reason == "GPTQ has no 6-bit group 64; decoded from AFFINE"
