"""A GGUF file's bytes do not depend on how its tensors are cut into chunks of rows, whatever is done to them."""

import gguf_zoo
import mlx.core as mx
import numpy as np
import pytest
from gguf_models import permute

from mlxq.calibration.imatrix import ImportanceMatrix, Sums
from mlxq.checkpoint.gguf.file import GgufFile
from mlxq.conversion import convert, export
from mlxq.quantizers.ggml import quantize
from mlxq.writers import stream, weighting

SMALL = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256}
#: Heads of 64 rows, key heads of 64 rows; with biases that are permuted too, in stacks of experts, with norms plus one.
MODELS = ("llama biases", "mixtral one expert", "gemma3_text", "qwen3_moe tied")
#: Weights of four rows of 512 or nine of 256, which cut every head.
CHUNK = 9 * 256 + 1


@pytest.fixture(scope="module", params=MODELS)
def original(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("target")
    source = gguf_zoo.save(directory / "source", gguf_zoo.ZOO[request.param] | SMALL)
    return gguf_zoo.write_gguf(source, directory / "original.gguf")


def contents(path):
    file = GgufFile(path)
    try:
        return {n: (t.type_name, file.read_bytes(t.offset, t.nbytes).tobytes()) for n, t in file.tensors.items()}
    finally:
        file.close()


def in_chunks(monkeypatch, run):
    with monkeypatch.context() as patch:
        for module in (stream, weighting):
            patch.setattr(module, "CHUNK_WEIGHTS", CHUNK)
        run()


def importance_of(path):
    """For every matrix and every expert another row; the first expert was never reached."""
    rng = np.random.default_rng(2)
    file, entries = GgufFile(path), {}
    for name, tensor in file.tensors.items():
        if len(tensor.shape) > 1:
            experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
            counts = np.ones(experts, np.float32)
            counts[0] = experts == 1
            sums = rng.uniform(0.01, 9, (experts, tensor.shape[-1])).astype(np.float32)
            entries[name] = Sums(sums * counts[:, None], counts)
    file.close()
    return ImportanceMatrix(entries)


@pytest.mark.slow
def test_chunks_make_no_difference(tmp_path, original, monkeypatch):
    importance = importance_of(original)
    importance.write(tmp_path / "m.dat.gguf")
    k_quants, directory = tmp_path / "k.gguf", tmp_path / "mlx"
    convert(original, k_quants, type="Q4_K_M", verify=False)
    convert(original, directory, bits=4, group_size=64, verify=False)
    runs = {
        "quantized": lambda out: convert(
            original, out, type="IQ4_XS", imatrix=tmp_path / "m.dat.gguf", verify=False, overwrite=True
        ),
        "quantized anew": lambda out: convert(k_quants, out, type="Q5_K_M", verify=False, overwrite=True),
        "the same codes": lambda out: convert(k_quants, out, type="Q4_1", verify=False, overwrite=True),
        "as floats": lambda out: convert(k_quants, out, type="F16", verify=False, overwrite=True),
        "as stored": lambda out: export(k_quants, out, verify=False, overwrite=True),
        "codes of MLX": lambda out: export(directory, out, verify=False, overwrite=True),
    }
    found = {}
    for what, run in runs.items():
        out = tmp_path / "out.gguf"
        run(out)
        found[what] = contents(out)
        in_chunks(monkeypatch, lambda run=run, out=out: run(out))
        assert contents(out) == found[what], what
    assert found["as stored"] == contents(k_quants)
    assert_encoded(found["quantized"], contents(original), importance, original)


def assert_encoded(found, exact, importance, path):
    """Whole matrices, encoded at once with the rows of importance that are theirs."""
    file = GgufFile(path)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    file.close()
    for name, (kind, data) in found.items():
        if kind != "F32":
            w = np.frombuffer(exact[name][1], np.float32).reshape(shapes[name])
            assert quantize(w, kind, importance.get(name, w.shape)).tobytes() == data, name


def test_heads_are_stored_in_pairs_of_rows(tmp_path, monkeypatch):
    source = gguf_zoo.save(tmp_path / "source", gguf_zoo.ZOO["llama biases"] | SMALL)
    original = gguf_zoo.write_gguf(source, tmp_path / "original.gguf")
    rows = {name: np.frombuffer(data, np.float32) for name, (_, data) in contents(original).items()}
    arrays = mx.load(str(source / "model.safetensors"))
    for part, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            values = np.array(arrays[f"model.layers.0.self_attn.{part}_proj.{kind}"])
            expected = permute(values, heads).reshape(-1)
            np.testing.assert_array_equal(rows[f"blk.0.attn_{part}.{kind}"], expected)
    in_chunks(monkeypatch, lambda: export(original, tmp_path / "again.gguf", verify=False))
    assert contents(tmp_path / "again.gguf") == contents(original)
