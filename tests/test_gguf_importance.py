"""An importance matrix from its file to a GGUF file's bytes, against llama.cpp's own quantizer with the same one."""

import json

import cyllama_quantize
import gguf
import gguf_zoo
import mlx.core as mx
import numpy as np
import pytest

from mlxq.calibration.imatrix import ImportanceMatrix, Sums
from mlxq.conversion import convert

pytestmark = pytest.mark.slow

LAYERS = 4
ROWS = gguf_zoo.VOCAB


@pytest.fixture(scope="module")
def original(reference_checkpoint, tmp_path_factory):
    """Real weights: the first layers and tokens of the reference checkpoint, as a GGUF file of bfloat16."""
    directory = tmp_path_factory.mktemp("importance")
    config = json.loads((reference_checkpoint / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "vocab_size": ROWS}
    arrays = {}
    for file in sorted(reference_checkpoint.glob("*.safetensors")):
        for name, array in mx.load(str(file)).items():
            parts = name.split(".")
            if "layers" not in parts or int(parts[parts.index("layers") + 1]) < LAYERS:
                array = array[:ROWS] if parts[-2] in ("embed_tokens", "lm_head") else array
                arrays[name] = array.astype(mx.float32)
    (directory / "cut").mkdir()
    mx.save_safetensors(str(directory / "cut" / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (directory / "cut" / "config.json").write_text(json.dumps(config))
    return gguf_zoo.write_gguf(directory / "cut", directory / "original.gguf", type_name="BF16")


@pytest.fixture(scope="module")
def importance(original):
    """As uneven as the squares of real activations are: GGUF name -> float32 `[K]`."""
    rng = np.random.default_rng(0)
    matrices = [t for t in gguf.GGUFReader(original).tensors if len(t.shape) == 2 and t.name != "token_embd.weight"]
    return {t.name: np.exp(rng.normal(0, 1.5, t.shape[0])).astype(np.float32) for t in matrices}


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def decoded(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def weighted_rmse(w, tensor, weight):
    return float(np.sqrt(((decoded(tensor) - w) ** 2 * weight).mean(dtype=np.float64)))


@pytest.mark.parametrize(
    ("file_type", "suffix"), [("Q4_K_M", "gguf"), ("Q4_K_M", "dat"), ("IQ4_XS", "gguf"), ("Q3_K_M", "gguf")]
)
def test_no_tensor_errs_more_than_llama_cpps(tmp_path, original, importance, file_type, suffix):
    sums = {n: Sums(v[None] * np.float32(512), np.array([512], np.float32)) for n, v in importance.items()}
    ImportanceMatrix(sums, ("words",), 1).write(tmp_path / f"m.{suffix}")
    convert(original, tmp_path / "ours.gguf", type=file_type, imatrix=tmp_path / f"m.{suffix}", verify=False)
    peers = cyllama_quantize.quantize(original, tmp_path / "peer.gguf", file_type, importance)
    ours, exact = tensors(tmp_path / "ours.gguf"), tensors(original)
    compared = 0
    for tensor in peers.tensors:
        assert ours[tensor.name].tensor_type == tensor.tensor_type
        if tensor.tensor_type.name in ("F32", "F16"):
            continue
        w, weight = decoded(exact[tensor.name]), importance.get(tensor.name, np.float32(1))
        assert weighted_rmse(w, ours[tensor.name], weight) <= weighted_rmse(w, tensor, weight), tensor.name
        compared += 1
    assert compared == 7 * LAYERS + 2


def test_importance_makes_what_matters_more_exact(tmp_path, original, importance):
    sums = {n: Sums(v[None], np.ones(1, np.float32)) for n, v in importance.items()}
    ImportanceMatrix(sums, ("words",), 1).write(tmp_path / "m.gguf")
    convert(original, tmp_path / "with.gguf", type="Q4_K_S", imatrix=tmp_path / "m.gguf", verify=False)
    convert(original, tmp_path / "without.gguf", type="Q4_K_S", verify=False)
    given, plain, exact = tensors(tmp_path / "with.gguf"), tensors(tmp_path / "without.gguf"), tensors(original)
    for name, weight in importance.items():
        if given[name].tensor_type == plain[name].tensor_type:
            w = decoded(exact[name])
            assert weighted_rmse(w, given[name], weight) < 0.95 * weighted_rmse(w, plain[name], weight), name
