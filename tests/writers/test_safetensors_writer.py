"""The planned layout is a valid safetensors file, whatever the order of writes; the official reader is the judge."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors import safe_open

from mlxq.errors import OutputError
from mlxq.writers.safetensors import Entry, SafetensorsWriter, sha256


def test_parts_in_any_order_from_threads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.integers(0, 2**32, (16, 24), dtype=np.uint32),
        "a.scales": rng.standard_normal((16, 3)).astype(np.float16),
        "odd": rng.standard_normal(3).astype(np.float16),
        "b": rng.standard_normal((7, 5)).astype(np.float32),
    }
    dtypes = {"uint32": "U32", "float16": "F16", "float32": "F32"}
    entries = [Entry(n, dtypes[str(a.dtype)], a.shape) for n, a in arrays.items()]
    writer = SafetensorsWriter(tmp_path, [entries[:2], entries[2:3], entries[3:]])
    parts = []
    for name, a in arrays.items():
        row = a.nbytes // a.shape[0]
        parts += [(name, a[i : i + 1].tobytes(), i * row) for i in range(a.shape[0])]
    rng.shuffle(parts)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda p: writer.write(*p), parts))
    digests = writer.close()
    assert digests == {"model.safetensors": sha256(tmp_path / "model.safetensors")}
    with safe_open(tmp_path / "model.safetensors", "np") as f:
        assert f.metadata() == {"format": "mlx"}
        stored = f.keys()
        assert {n: f.get_tensor(n).tobytes() for n in stored} == {n: a.tobytes() for n, a in arrays.items()}


def test_shards_keep_groups_together_and_are_indexed(tmp_path):
    groups = [[Entry(f"l{i}.weight", "U32", (8, 8)), Entry(f"l{i}.scales", "BF16", (8, 2))] for i in range(5)]
    writer = SafetensorsWriter(tmp_path, groups, max_shard_bytes=600)
    for g in groups:
        for e in g:
            writer.write(e.name, bytes(e.nbytes))
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    for i in range(5):
        assert index["weight_map"][f"l{i}.weight"] == index["weight_map"][f"l{i}.scales"]
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, "np") as f:
            stored = f.keys()
            assert name in stored
    assert index["metadata"]["total_size"] == 5 * (256 + 32)


def test_incomplete_or_oversized_writes_are_refused(tmp_path):
    writer = SafetensorsWriter(tmp_path, [[Entry("a", "F32", (4,))]])
    with pytest.raises(OutputError, match="planned"):
        writer.write("a", bytes(20))
    writer.write("a", bytes(8))
    with pytest.raises(OutputError, match="not written whole"):
        writer.close()
