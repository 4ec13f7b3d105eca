"""Whole conversions to GGUF, judged by llama.cpp and the gguf package, and every way in which they may fail."""

import errno
import json

import command
import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
from llamacpp import LlamaCpp

import mlxq
from mlxq.calibration.imatrix import ImportanceMatrix, Sums
from mlxq.checkpoint.gguf.file import GgufFile
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion import convert, export
from mlxq.errors import Cancelled, CheckpointError, FormatError, OutputError, PlanError, VerificationError
from mlxq.plan.gguf_file_types import FILE_TYPES

#: Rows of whole super-blocks.
WIDE = {"hidden_size": 256, "intermediate_size": 512}
CONFIG = tiny.LLAMA | WIDE
PROMPT = list(b"the quick brown fox")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("gguf") / "source")


def make_model(directory):
    """A tiny llama whose tokenizer has a merge, without which llama.cpp takes none."""
    weights = tiny.random_tensors(tiny.llama_shapes(CONFIG))
    # The next token is one of ASCII: llama.cpp's server tells no probabilities where a text ends within a character.
    weights["lm_head.weight"][94:] = 0
    return tiny.add_merge(tiny.make_model(directory, tensors=weights, **WIDE, eos_token_id=257, bos_token_id=258))


def stored(path):
    """Tensor name -> (type name, decoded float32 row-major), read by the gguf package."""
    return {
        t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


def left(directory):
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize("file_type", [t for t in FILE_TYPES if t != "Q2_K_S"])
def test_every_file_type_holds_the_source_and_runs_in_llama_cpp(tmp_path, source, file_type):
    out = tmp_path / "m.gguf"
    result = convert(source, out, type=file_type, verify=False)
    assert result.plan.dtype == file_type
    original = mx.load(str(source / "model.safetensors"))
    w = np.array(original["model.layers.1.mlp.down_proj.weight"].astype(mx.float32))
    found = stored(out)
    w_hat = found["blk.1.ffn_down.weight"][1]
    bits = {"F32": 24, "F16": 11, "BF16": 8}.get(file_type) or int(found["blk.1.ffn_down.weight"][0].strip("IQ")[0])
    # 32 normal weights span about 4.2 deviations, 4.8 around zero, in 2^bits steps, of which 1/sqrt(12) is lost.
    assert np.linalg.norm(w_hat - w) / np.linalg.norm(w) < 1.4 / (2**bits - 1)
    assert found["output_norm.weight"][0] == "F32"

    top = LlamaCpp(out).logprobs(PROMPT, 20)
    with mlxq.load(out) as model:
        logits = np.array(model.module(mx.array([PROMPT]))[0, -1].astype(mx.float32), np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    # llama.cpp rounds activations to 8 bits in groups of 32 (or 256): 4.2 / 255 / sqrt(12) of them, in every product.
    assert max(abs(expected[i] - p) for i, p in top.items()) < 0.1


def test_llama_cpp_decodes_our_bytes_as_we_do(tmp_path, source):

    convert(source, tmp_path / "m.gguf", type="Q4_K_M", verify=False)
    with open_checkpoint(tmp_path / "m.gguf") as ours:
        for name, (kind, values) in stored(tmp_path / "m.gguf").items():
            if name == "output.weight":
                assert kind == "Q6_K"
                np.testing.assert_array_equal(ours.read("lm_head.weight"), values)
            if name == "blk.0.ffn_down.weight":
                assert kind == "Q4_K"
                np.testing.assert_array_equal(ours.read("model.layers.0.mlp.down_proj.weight"), values)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "Q8_0", "Q4_0", "Q5_0"])
def test_gguf_to_mlx_to_gguf_gives_the_same_bytes(tmp_path, source, name):
    first, last = tmp_path / "first.gguf", tmp_path / "last.gguf"
    convert(source, first, type=name, verify=False)
    convert(first, tmp_path / "mlx", verify=False)
    export(tmp_path / "mlx", last, verify=False)
    a, b = GgufFile(first), GgufFile(last)
    assert a.tensors.keys() == b.tensors.keys()
    # The output of most file types is Q6_K, which no grid of MLX holds.
    kept = {key: tensor for key, tensor in a.tensors.items() if tensor.type_name in ("F32", name)}
    assert len(kept) >= len(a.tensors) - 1
    for key, tensor in kept.items():
        other = b.tensors[key]
        assert tensor.type_name == other.type_name, key
        ours, theirs = (f.read_bytes(t.offset, t.nbytes) for f, t in ((a, tensor), (b, other)))
        assert np.array_equal(ours, theirs), key


def test_gguf_to_gguf_as_stored_is_byte_for_byte(tmp_path, source):
    convert(source, tmp_path / "a.gguf", type="Q3_K_M", verify=False)
    export(tmp_path / "a.gguf", tmp_path / "b.gguf", exact=True, verify=False)
    a, b = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    for key, tensor in a.tensors.items():
        other = b.tensors[key]
        assert np.array_equal(a.read_bytes(tensor.offset, tensor.nbytes), b.read_bytes(other.offset, other.nbytes))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_directories_of_mlx_lm_are_exported_without_loss(tmp_path, source, bits, group_size):
    """Decoded by gguf, every weight is `mx.dequantize`'s with its scales in float32."""
    from mlx_lm import convert as stock

    stock(str(source), str(tmp_path / "mlx"), quantize=True, q_bits=bits, q_group_size=group_size, dtype="float16")
    result = export(tmp_path / "mlx", tmp_path / "m.gguf", exact=True, verify=False)
    assert {p.dtype for p in result.plan.tensors} == {"F32", "Q5_1" if bits == 5 else "Q4_1"}
    arrays = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    decoded = stored(tmp_path / "m.gguf")
    name = "model.layers.1.mlp.down_proj"
    parts = [arrays[f"{name}.{p}"] for p in ("weight", "scales", "biases")]
    expected = mx.dequantize(
        parts[0], *(p.astype(mx.float32) for p in parts[1:]), group_size=group_size, bits=bits, stream=mx.cpu
    )
    np.testing.assert_array_equal(decoded["blk.1.ffn_down.weight"][1], np.array(expected))


def test_what_no_type_holds_is_rounded_and_said_or_refused(tmp_path, source):
    convert(source, tmp_path / "mlx", bits=6, verify=False)
    result = export(tmp_path / "mlx", tmp_path / "m.gguf", verify=False)
    assert {p.dtype for p in result.plan.tensors} == {"F32", "Q8_0"}
    assert "quantized anew" in result.notes[0]
    manifest = json.loads((tmp_path / "m.mlxq.json").read_text())
    errors = [t["relative_error"] for t in manifest["tensors"] if t["action"] == "requantize"]
    # Half a step of Q8_0 in a group of 32: at most 1/254 of the largest, about 4 deviations / 2 / 127 / sqrt(3).
    assert all(0 < e < 0.012 for e in errors)
    with pytest.raises(PlanError, match=r"--exact: token_embd\.weight would change.*F32"):
        export(tmp_path / "mlx", tmp_path / "other.gguf", exact=True)
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_the_portable_recipe_writes_one_quantization_twice(tmp_path, source, bits, dtype):
    """Judged by mlx and gguf: `mx.dequantize` with float32 scales gives the numbers that gguf decodes."""
    places = [tmp_path / "mlx", tmp_path / "m.gguf"]
    result = convert(source, places, recipe="portable", bits=bits, dtype=dtype, verify=False, modelfile=True)
    assert (result.path, result.gguf) == tuple(places)
    assert left(tmp_path) == ["Modelfile", "m.gguf", "m.mlxq.json", "mlx"]
    arrays = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    decoded = stored(tmp_path / "m.gguf")
    assert decoded["blk.1.ffn_up.weight"][0] == {4: "Q4_K", 5: "Q5_K", 8: "Q8_0"}[bits]
    name = "model.layers.1.mlp.up_proj"
    parts = [arrays[f"{name}.{p}"] for p in ("weight", "scales", "biases")]
    assert str(parts[1].dtype) == f"mlx.core.{dtype}"
    expected = mx.dequantize(
        parts[0], *(p.astype(mx.float32) for p in parts[1:]), group_size=32, bits=bits, stream=mx.cpu
    )
    np.testing.assert_array_equal(decoded["blk.1.ffn_up.weight"][1], np.array(expected))
    assert mlxq.compare(*places, only=("tensors",)).identical


def test_two_outputs_need_the_portable_recipe_and_one_of_each(tmp_path, source):
    with pytest.raises(PlanError, match="portable"):
        convert(source, [tmp_path / "a", tmp_path / "b.gguf"])
    with pytest.raises(PlanError, match="one directory and one file"):
        convert(source, [tmp_path / "a", tmp_path / "b"], recipe="portable")
    with pytest.raises(OutputError, match="lies in the directory"):
        convert(source, [tmp_path / "a", tmp_path / "a" / "b.gguf"], recipe="portable")
    (tmp_path / "b.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        convert(source, [tmp_path / "a", tmp_path / "b.gguf"], recipe="portable")
    with pytest.raises(PlanError, match="3 bits"):
        convert(source, tmp_path / "a", recipe="portable", bits=3)
    assert left(tmp_path) == ["b.gguf"]


def test_a_broken_pair_leaves_nothing(tmp_path, source, monkeypatch):
    from mlxq.formats import crossings

    right = crossings.from_affine

    def wrong(q, name):
        blocks = right(q, name)
        blocks[0, -1] ^= 1
        return blocks

    monkeypatch.setattr(crossings, "from_affine", wrong)
    with pytest.raises(mlxq.MlxqError):
        convert(source, [tmp_path / "a", tmp_path / "b.gguf"], recipe="portable", verify=False)
    assert left(tmp_path) == []


def test_the_proof_passes_and_is_kept_beside_the_file(tmp_path, source):
    result = convert(source, tmp_path / "m.gguf", type="Q5_K_M")
    assert result.verification.passed
    manifest = json.loads((tmp_path / "m.mlxq.json").read_text())
    assert manifest["verification"]["passed"]
    assert manifest["options"]["type"] == "Q5_K_M"
    assert left(tmp_path) == ["m.gguf", "m.mlxq.json"]


def test_a_file_made_wrong_fails_the_proof_and_leaves_nothing(tmp_path, source, monkeypatch):
    from mlxq.quantizers import ggml as encoders

    right = encoders.quantize

    def wrong(w, name, importance=None):
        return right(np.ascontiguousarray(w[::-1]), name, importance)

    monkeypatch.setattr(encoders, "quantize", wrong)
    with pytest.raises(mlxq.MlxqError, match="broken"):
        convert(source, tmp_path / "m.gguf", type="Q8_0")
    assert left(tmp_path) == []


def test_mixed_options_are_refused_before_any_work(tmp_path, source):
    for options in ({"bits": 4}, {"recipe": "mixed"}, {"keep": "x"}, {"dtype": "float16"}):
        with pytest.raises(PlanError, match="is for an MLX directory"):
            convert(source, tmp_path / "m.gguf", **options)
    with pytest.raises(PlanError, match="--type is for a GGUF file"):
        convert(source, tmp_path / "dir", type="Q4_K_M")
    with pytest.raises(PlanError, match="Q4_K_M"):
        convert(source, tmp_path / "m.gguf", type="Q4_K_X")
    with pytest.raises(PlanError, match=r"ends in \.gguf"):
        export(source, tmp_path / "dir")
    assert left(tmp_path) == []


def test_existing_files_are_kept_unless_told_otherwise(tmp_path, source):
    out = tmp_path / "m.gguf"
    convert(source, out, type="Q8_0", verify=False)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        convert(source, out, type="Q4_0", verify=False)
    assert out.read_bytes() == before
    convert(source, out, type="Q4_0", verify=False, overwrite=True)
    assert len(out.read_bytes()) < len(before)
    text = tmp_path / "notes.gguf"
    text.write_text("no model")
    with pytest.raises(OutputError, match="not a GGUF file"):
        convert(source, text, type="Q4_0", verify=False, overwrite=True)
    assert text.read_text() == "no model"
    with pytest.raises(OutputError, match="directory"):
        convert(source, make(tmp_path / "d.gguf"), type="Q4_0", verify=False, overwrite=True)


def make(directory):
    directory.mkdir()
    return directory


def test_weights_that_are_not_finite_leave_nothing(tmp_path):
    tensors = tiny.random_tensors(tiny.llama_shapes(CONFIG))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    bad = make_model(tmp_path / "bad")
    tiny.write_safetensors(bad / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj"):
        convert(bad, tmp_path / "m.gguf", type="Q4_K_M")
    assert left(tmp_path) == ["bad"]


def test_cancelling_leaves_nothing(tmp_path, source):
    token = mlxq.CancelToken()

    def cancel(event):
        token.cancel()

    with pytest.raises(Cancelled):
        convert(source, tmp_path / "m.gguf", type="Q4_K_M", progress=cancel, cancel=token)
    assert left(tmp_path) == []


def test_an_architecture_without_a_gguf_form_is_refused_by_name(tmp_path, source):
    other = make_model(tmp_path / "source")
    (other / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="'mamba' cannot be written as GGUF"):
        convert(other, tmp_path / "m.gguf")
    assert left(tmp_path) == ["source"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, source):
    result = convert(source, tmp_path / "m.gguf", type="Q4_K_M", dry_run=True)
    types = {p.info.name: p.dtype for p in result.plan.tensors}
    assert types["lm_head.weight"] == "Q6_K"
    assert types["model.layers.0.self_attn.q_proj.weight"] == "Q4_K"
    assert left(tmp_path) == []


def test_the_command_line(tmp_path, source):
    arguments = ("convert", source, "-o", tmp_path / "m.gguf", "--type", "q4_k_m", "--method", "rtn")
    done = command.mlxq(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Q4_K" in done.stdout
    assert "bits per weight" in done.stdout
    again = command.mlxq(*arguments)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "--overwrite" in again.stderr


def test_both_containers_name_their_one_source(tmp_path, source):
    """Also in the file that was made from the directory, which is a stage of the work and no source."""
    convert(source, [tmp_path / "mlx", tmp_path / "m.gguf"], recipe="portable", verify=False)
    manifests = [json.loads(p.read_text()) for p in (tmp_path / "mlx" / "mlxq.json", tmp_path / "m.mlxq.json")]
    assert manifests[0]["source"] == manifests[1]["source"]
    assert manifests[1]["source"]["kind"] == "huggingface"
    assert manifests[1]["options"]["recipe"] == "portable"
    assert manifests[1]["notes"] == ["each of 21 tensors decodes to the numbers of the MLX directory mlx"]


def test_a_pair_that_fails_at_its_end_leaves_nothing(tmp_path, source, monkeypatch):
    from mlxq.writers.output import OutputDirectory

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputDirectory, "_move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, [tmp_path / "a", tmp_path / "b.gguf"], recipe="portable", modelfile=True, verify=False)
    assert left(tmp_path) == []


@pytest.mark.parametrize("old", [("b.gguf", "b.mlxq.json"), ("b.gguf",), ()])
def test_a_directory_that_cannot_take_its_place_leaves_the_old_file(tmp_path, source, monkeypatch, old):
    from mlxq.writers.output import OutputDirectory

    convert(source, [tmp_path / "a", tmp_path / "b.gguf"], recipe="portable", bits=8, verify=False)
    for name in {"b.gguf", "b.mlxq.json"} - {*old}:
        (tmp_path / name).unlink()
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    there = []

    def full(self):
        there.extend(p.name for p in tmp_path.glob("b.*"))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OutputDirectory, "_move", full)
    with pytest.raises(OutputError, match="the disk is full"):
        convert(source, [tmp_path / "a", tmp_path / "b.gguf"], recipe="portable", overwrite=True, verify=False)
    assert sorted(there) == ["b.gguf", "b.mlxq.json"], "the file was there already"
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    monkeypatch.undo()
    convert(source, [tmp_path / "a", tmp_path / "b.gguf"], recipe="portable", overwrite=True, verify=False)
    assert left(tmp_path) == ["a", "b.gguf", "b.mlxq.json"]


def test_a_file_with_one_weight_off_fails_the_comparison_and_leaves_nothing(tmp_path, source, monkeypatch):
    from mlxq.writers.gguf.target import GgufTarget

    right = GgufTarget._repack

    def wrong(self, plan, rows, mapped):
        blocks = right(self, plan, rows, mapped).copy()
        blocks[0, -1] ^= 1
        return blocks

    monkeypatch.setattr(GgufTarget, "_repack", wrong)
    with pytest.raises(VerificationError, match="tensors differ"):
        convert(source, [tmp_path / "a", tmp_path / "b.gguf"], recipe="portable", modelfile=True, verify=False)
    assert left(tmp_path) == []


def split(path, directory):
    """The parts of a GGUF file, eight tensors each."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(make(directory) / "m.gguf", "llama", split_max_tensors=8)
    for key, value in reader.fields.items():
        if value.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, value.contents())
        elif not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, value.contents(), value.types[0])
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.iterdir())


def test_the_source_is_never_replaced(tmp_path, source):
    out, plans = tmp_path / "m.gguf", []
    convert(source, out, type="Q8_0", verify=False)
    (tmp_path / "link.gguf").symlink_to(out)
    for place in (out, tmp_path / "link.gguf"):
        with pytest.raises(OutputError, match="is the source"):
            convert(out, place, type="Q4_0", overwrite=True, on_plan=plans.append)
    parts = split(out, tmp_path / "parts")
    before = [p.read_bytes() for p in parts]
    for part in parts[1:]:
        with pytest.raises(OutputError, match="is a part of the source"):
            convert(parts[0], part, type="Q4_0", overwrite=True, on_plan=plans.append)
    assert [p.read_bytes() for p in parts] == before
    assert len(parts) == 3
    assert plans == []


def test_an_importance_matrix_is_never_replaced(tmp_path, source):
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.ones((1, 256), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = (tmp_path / "imatrix.gguf").read_bytes()
    with pytest.raises(OutputError, match="is the importance matrix"):
        convert(source, tmp_path / "imatrix.gguf", imatrix=tmp_path / "imatrix.gguf", overwrite=True)
    assert (tmp_path / "imatrix.gguf").read_bytes() == before


@pytest.mark.parametrize("name", [".gguf", "deep/.gguf"])
def test_a_file_without_a_name_is_refused_before_any_work(tmp_path, source, name):
    with pytest.raises(OutputError, match="no name before its ending"):
        convert(source, tmp_path / name, on_plan=pytest.fail)
    assert left(tmp_path) == []


def test_what_a_tokenizer_lacks_shows_before_the_plan(tmp_path, source):
    bare = make_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="bare: no tokenizer"):
        convert(bare, tmp_path / "m.gguf", on_plan=pytest.fail)


def test_the_portable_recipe_asks_for_the_directory_too(tmp_path, source):
    with pytest.raises(PlanError, match="makes an MLX directory first"):
        convert(source, tmp_path / "m.gguf", recipe="portable")


def test_a_manifest_names_tensors_as_the_model_and_as_the_file_do(tmp_path, source):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        convert(source, tmp_path / name / "m.gguf", type="Q4_K_M", verify=False)
    found = json.loads((tmp_path / "a" / "m.mlxq.json").read_text())["tensors"]
    assert {t["stored"] for t in found} == stored(tmp_path / "a" / "m.gguf").keys()
    assert found[0]["name"] == "model.embed_tokens.weight"
    for file in ("m.gguf", "m.mlxq.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_dry_run_names_tensors_as_tensor_type_does(tmp_path, source):
    done = command.mlxq("convert", source, "-o", tmp_path / "m.gguf", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "blk.1.ffn_down.weight " in done.stdout
    assert "model.layers" not in done.stdout


@pytest.mark.slow
def test_what_is_printed_of_float_files_and_pairs(tmp_path, source):
    done = command.mlxq("export", source, "-o", tmp_path / "f.gguf", "--no-verify")
    assert done.returncode == 0, done.stderr
    kept = done.stdout.split("Kept float")[1].splitlines()
    assert kept[1].startswith("  16 tensors, model.embed_tokens.weight to lm_head.weight  2.7 MB")
    assert kept[2].startswith("Total")
    assert f"Wrote {tmp_path / 'f.gguf'} (2.7 MB)" in done.stdout
    done = command.mlxq(
        "convert", source, "-o", tmp_path / "d", "-o", tmp_path / "p.gguf", "--recipe", "portable", "--no-verify"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-3:]
    assert lines[0] == "Both hold the same numbers: 21 tensors compared, none differs"
    assert lines[1] == f"Wrote {tmp_path / 'd'}"
    assert lines[2].startswith(f"Wrote {tmp_path / 'p.gguf'} (")
    assert lines[2].endswith("4.770 bits per weight)")


def make_imatrix(path, names, K=256, seed=0):
    rng = np.random.default_rng(seed)
    sums = {name: Sums(rng.lognormal(0, 1, (1, K)).astype(np.float32), np.array([8], np.float32)) for name in names}
    ImportanceMatrix(sums, ("text",), 1, 8).write(path)
    return path


@pytest.mark.parametrize("outputs", [("m.gguf",), ("mlx",), ("mlx", "m.gguf")])
def test_an_importance_matrix_weights_what_it_names_and_the_rest_is_said(tmp_path, source, outputs):
    imatrix = make_imatrix(tmp_path / "i.gguf", ["blk.0.attn_q.weight"])
    options = {"type": "Q4_K_S"} if outputs == ("m.gguf",) else {"recipe": "portable"}
    places = [tmp_path / name for name in outputs]
    plain = convert(source, tmp_path / "plain.gguf", type="Q4_K_S", verify=False)
    result = convert(source, places, imatrix=imatrix, verify=False, **options)
    assert any("no importance in the matrix" in note for note in result.notes)
    w = np.array(
        mx.load(str(source / "model.safetensors"))["model.layers.0.self_attn.q_proj.weight"].astype(mx.float32)
    )
    importance = ImportanceMatrix.read(imatrix).get("blk.0.attn_q.weight")

    def weighted(path):
        with open_checkpoint(path) as checkpoint:
            w_hat = checkpoint.read("model.layers.0.self_attn.q_proj.weight")
        return float((importance * (w_hat - w) ** 2).sum())

    assert weighted(places[0]) < 0.97 * weighted(plain.path)


def test_an_importance_matrix_of_another_model_is_refused_before_any_work(tmp_path, source):
    imatrix = make_imatrix(tmp_path / "i.gguf", ["blk.0.attn_q.weight"], K=512)
    for options in ({"type": "Q4_K_M"}, {"recipe": "portable"}):
        out = tmp_path / ("m.gguf" if "type" in options else "mlx")
        with pytest.raises(PlanError, match="another model"):
            convert(source, out, imatrix=imatrix, **options)
    with pytest.raises(PlanError, match="--imatrix is for a GGUF file"):
        convert(source, tmp_path / "mlx", imatrix=imatrix)
    assert left(tmp_path) == ["i.gguf"]


@pytest.mark.parametrize("place", ["b.gguf", "a/i.gguf", "b.mlxq.json"])
def test_an_importance_matrix_is_never_replaced_by_a_pair(tmp_path, source, place):
    (tmp_path / "a").mkdir()
    imatrix = make_imatrix(tmp_path / place, ["blk.0.attn_q.weight"])
    before = imatrix.read_bytes()
    with pytest.raises(OutputError, match=r"importance matrix.*choose another output"):
        convert(source, [tmp_path / "a", tmp_path / "b.gguf"], recipe="portable", imatrix=imatrix, overwrite=True)
    assert imatrix.read_bytes() == before


def test_a_gguf_file_crosses_to_another_type_without_loss_where_its_codes_fit(tmp_path, source):
    convert(source, tmp_path / "a.gguf", type="Q4_0", tensor_types="output=Q4_0", verify=False)
    result = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q4_1", tensor_types="output=Q4_1", exact=True)
    assert {p.action for p in result.plan.tensors} == {"keep", "repack"}
    a, b = stored(tmp_path / "a.gguf"), stored(tmp_path / "b.gguf")
    assert all(np.array_equal(values, b[name][1]) for name, (_, values) in a.items())
