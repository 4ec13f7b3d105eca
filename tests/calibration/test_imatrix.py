"""Importance matrices: both containers there and back, equal to other readers; one clear error for each bad file."""

import struct

import gguf
import numpy as np
import pytest

from mlxq.calibration.imatrix import ImportanceMatrix, Sums
from mlxq.errors import CheckpointError, FormatError, MlxqError, OutputError, PlanError

Q, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"
K, E = 64, 4


def sums(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.gamma(1.0, 100.0, shape).astype(np.float32)


def matrix(**changes):
    """One dense matrix and one of experts, of which the third saw no token."""
    counts = np.array([700, 1, 0, 1347], np.float32)
    experts = sums(E, K, seed=1) * (counts[:, None] > 0)
    entries = {Q: Sums(sums(1, K), np.array([2048], np.float32)), EXPERTS: Sums(experts, counts)}
    return ImportanceMatrix(**{"entries": entries, "datasets": ("wiki.txt", "code.txt"), "chunk_count": 4} | changes)


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
def test_other_readers_read_the_same(tmp_path, name):
    libgguf = pytest.importorskip("libgguf", reason="libgguf, which reads importance matrices, is not installed")
    matrix().write(tmp_path / name)
    ours, theirs = ImportanceMatrix.read(tmp_path / name), libgguf.load_imatrix(tmp_path / name)
    assert ours.entries.keys() == theirs.keys()
    for tensor, values in theirs.items():
        np.testing.assert_array_equal(ours.get(tensor).reshape(-1), values)


def test_gguf_there_and_back(tmp_path):
    written = matrix(chunk_size=128)
    written.write(tmp_path / "m.gguf")
    read = ImportanceMatrix.read(tmp_path / "m.gguf")
    assert (read.datasets, read.chunk_count, read.chunk_size) == (("wiki.txt", "code.txt"), 4, 128)
    for name, entry in written.entries.items():
        np.testing.assert_array_equal(read.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(read.entries[name].counts, entry.counts)
    assert not [p for p in tmp_path.iterdir() if p.name != "m.gguf"]


def test_the_file_is_laid_out_as_llama_cpp_writes_it(tmp_path):
    matrix().write(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {k: f.types for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    uint32, text, array = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
    assert kinds == {
        "general.type": [text],
        "imatrix.datasets": [array, text],
        "imatrix.chunk_count": [uint32],
        "imatrix.chunk_size": [uint32],
    }
    assert {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors} == {
        f"{Q}.in_sum2": ("F32", [K, 1]),
        f"{Q}.counts": ("F32", [1, 1]),
        f"{EXPERTS}.in_sum2": ("F32", [K, E]),
        f"{EXPERTS}.counts": ("F32", [1, E]),
    }


def test_weights_are_sums_by_counts_and_one_for_experts_that_saw_nothing():
    m = matrix()
    np.testing.assert_array_equal(m.get(Q), m.entries[Q].sums[0] / np.float32(2048))
    experts = m.get(EXPERTS)
    assert experts.shape == (E, K)
    assert experts.dtype == np.float32
    np.testing.assert_array_equal(experts[2], np.ones(K))
    np.testing.assert_array_equal(experts[1], m.entries[EXPERTS].sums[1])
    assert m.get("blk.1.attn_q.weight") is None


def test_the_old_form_holds_the_same_weights(tmp_path):
    """It stores mean times calls: two roundings of 2**-24 each, and a third when the calls are divided out again."""
    written = matrix()
    written.write(tmp_path / "m.dat")
    read = ImportanceMatrix.read(tmp_path / "m.dat")
    assert (read.datasets, read.chunk_count) == (("code.txt",), 4)
    np.testing.assert_allclose(read.get(Q, (8, K)), written.get(Q), rtol=3 * 2**-24)
    np.testing.assert_allclose(read.get(EXPERTS, (E, 8, K)), written.get(EXPERTS), rtol=3 * 2**-24)
    # The file does not say how many experts there are; the tensor does.
    assert read.get(EXPERTS).shape == (E * K,)


def test_the_old_form_through_gguf_keeps_every_bit(tmp_path):
    matrix().write(tmp_path / "m.dat")
    old = ImportanceMatrix.read(tmp_path / "m.dat")
    old.write(tmp_path / "m.gguf")
    new = ImportanceMatrix.read(tmp_path / "m.gguf")
    for name in old.entries:
        np.testing.assert_array_equal(old.get(name), new.get(name))


def entry(name=b"x", calls=2, values=(2.0, 4.0), n=None):
    n = len(values) if n is None else n
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, n) + np.array(values, "<f4").tobytes()


def old(*entries, count=None, tail=b""):
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries) + tail


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [(b"", 0, ()), (struct.pack("<i", 7), 7, ()), (struct.pack("<ii", 7, 2) + b"ab", 7, ("ab",))],
    ids=["oldest", "chunks", "dataset"],
)
def test_old_files_end_in_three_ways(tmp_path, tail, chunks, datasets):
    (tmp_path / "m.dat").write_bytes(old(entry(), entry(b"y", 0), tail=tail))
    m = ImportanceMatrix.read(tmp_path / "m.dat")
    assert (m.chunk_count, m.datasets) == (chunks, datasets)
    assert m.get("x").tolist() == [1, 2]
    # No call at all: the values count as they are.
    assert m.get("y").tolist() == [2, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the number of entries ends at byte 4, but the file has 0"),
        (b"PK\x03\x04" + bytes(40), "67324752 entries do not fit into 44 bytes: truncated, or neither GGUF nor"),
        (old(count=0), "the number of entries is 0, expected 1 or more"),
        (old(entry(), count=-1), "the number of entries is -1"),
        (old(entry(), tail=bytes(9), count=2), "the length of the name of entry 1 is 0"),
        (old(entry(b"")), "the length of the name of entry 0 is 0, expected 1 or more"),
        (old(entry(b"\xff\xfe")), "the name of entry 0 is not UTF-8"),
        (old(entry(calls=-3)), "the number of calls of 'x' is -3"),
        (old(entry(n=0, values=(1.0,))), "the number of values of 'x' is 0"),
        (old(entry(n=2**31 - 1)), "the values of 'x' ends at byte 8589934605, but the file has"),
        (old(entry(values=(1.0, np.nan))), "'x': one of its sums is nan, expected a finite number from 0 up"),
        (old(entry(values=(1.0, np.inf))), "'x': one of its sums is inf"),
        (old(entry(), entry(values=range(20), n=40)), "the values of 'x' ends at byte 198, but the file has 118"),
        (old(entry(values=(1.0, 1e37)), tail=b""), "'x': one of its sums is inf"),
        (old(entry(values=(1.0, -1.0))), "'x': one of its sums is -1.0"),
        (old(entry(), entry()), "entry 'x' appears twice"),
        (old(entry(), tail=struct.pack("<ii", 7, 2) + b"abc"), "1 bytes follow the last field"),
        (old(entry(b"a\nb", calls=-1)), r"calls of 'a\\nb' is -1"),
    ],
    ids=lambda v: None if isinstance(v, str) else "",
)
def test_bad_old_files(tmp_path, data, message):
    (tmp_path / "m.dat").write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        ImportanceMatrix.read(tmp_path / "m.dat")
    assert str(tmp_path / "m.dat") in str(caught.value)
    assert "\n" not in str(caught.value)


def write_gguf(path, tensors, **fields):
    kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}
    writer = gguf.GGUFWriter(str(path), "")
    usual = {"general.type": "imatrix", "imatrix.chunk_count": 1, "imatrix.chunk_size": 512}
    for key, value in (usual | fields).items():
        if value is not None:
            writer.add_key_value(key, value, kinds[type(value)])
    if fields.get("imatrix.datasets", "") is not None:
        writer.add_array("imatrix.datasets", ["a.txt"])
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


F32 = np.float32
GOOD = {"x.in_sum2": np.ones((1, 4), F32), "x.counts": np.ones((1, 1), F32)}


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (GOOD, {"general.type": "model"}, "general.type is 'model', expected 'imatrix'"),
        (GOOD, {"general.type": None}, "general.type is None, expected 'imatrix'"),
        (GOOD, {"imatrix.chunk_count": None}, "imatrix.chunk_count is None, expected an integer from 0"),
        (GOOD, {"imatrix.chunk_size": 2**32 - 1}, "imatrix.chunk_size is 4294967295, expected an integer from 0"),
        (GOOD, {"imatrix.datasets": None}, "imatrix.datasets is None, expected a list of texts"),
        ({"x": np.ones(4, F32)}, {}, "no tensor is called <name>.in_sum2"),
        ({"x.in_sum2": np.ones(4, F32)}, {}, "there is no tensor 'x.counts' beside its counterpart"),
        ({"x.counts": np.ones(4, F32)}, {}, "there is no tensor 'x.in_sum2' beside its counterpart"),
        (GOOD | {"x.in_sum2": np.ones((1, 4), np.float16)}, {}, r"'x.in_sum2' is F16 \[1, 4\], expected F32"),
        (GOOD | {"x.in_sum2": np.ones((2, 2, 4), F32)}, {}, r"'x.in_sum2' is F32 \[2, 2, 4\], expected F32"),
        (GOOD | {"x.counts": np.ones((3, 1), F32)}, {}, r"'x': sums \[1, 4\] need one count for each row, got \[3\]"),
        (GOOD | {"x.counts": np.full((1, 1), -1, F32)}, {}, "'x': one of its counts is -1.0"),
        (GOOD | {"x.in_sum2": np.full((1, 4), np.nan, F32)}, {}, "'x': one of its sums is nan"),
        ({".in_sum2": np.ones((1, 4), F32), ".counts": np.ones((1, 1), F32)}, {}, "an entry has an empty name"),
    ],
)
def test_bad_gguf_files(tmp_path, tensors, fields, message):
    path = write_gguf(tmp_path / "m.gguf", tensors, **fields)
    with pytest.raises(FormatError, match=message):
        ImportanceMatrix.read(path)


def test_sums_of_activations_are_passed_over(tmp_path):
    """Newer files hold `.in_sum` too; the quantizers use squares alone."""
    m = ImportanceMatrix.read(write_gguf(tmp_path / "m.gguf", GOOD | {"x.in_sum": np.full((1, 4), -3, F32)}))
    assert m.get("x").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("cut", [0.05, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
def test_truncated(tmp_path, name, cut):
    matrix().write(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(MlxqError, match="truncated"):
        ImportanceMatrix.read(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        ImportanceMatrix.read(tmp_path / "none.dat")


def test_a_matrix_of_another_model_is_refused_when_planning(tmp_path):
    matrix().write(tmp_path / "m.gguf")
    m = ImportanceMatrix.read(tmp_path / "m.gguf")
    good = [(Q, (16, K)), (EXPERTS, (E, 16, K)), ("blk.0.attn_k.weight", (16, K))]
    assert m.check(good) == ["blk.0.attn_k.weight"]
    with pytest.raises(PlanError, match=r"m.gguf: 'blk.0.attn_q.weight' has 1 x 64 importance values, but .* 1 x 96"):
        m.check([(Q, (16, 96))])
    with pytest.raises(PlanError, match=r"has 4 x 64 importance values, but the tensor \[8, 16, 64\] has 8 x 64"):
        m.check([(EXPERTS, (8, 16, K))])
    # As many numbers, but of another model all the same.
    with pytest.raises(PlanError, match=r"has 4 x 64 importance values, but the tensor \[2, 16, 128\]"):
        m.check([(EXPERTS, (2, 16, 128))])
    with pytest.raises(
        PlanError, match=r"none of its 2 entries, such as .*, is a tensor to be quantized, such as other"
    ):
        m.check([("other.weight", (16, K))])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "0 entries of chunks of 512: both must be above 0"),
        ({"": Sums(sums(1, 4), np.ones(1, F32))}, "an entry has an empty name"),
        ({"x": Sums(sums(2, 4), np.ones(1, F32))}, r"'x': sums \[2, 4\] need one count for each row, got \[1\]"),
        ({"x": Sums(-sums(1, 4), np.ones(1, F32))}, "'x': one of its sums is -"),
    ],
)
def test_what_cannot_be_read_is_not_written(tmp_path, entries, message):
    for name in ("m.gguf", "m.dat"):
        with pytest.raises(FormatError, match=message):
            matrix(entries=entries).write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        matrix().write(tmp_path / "none" / "m.gguf")


def test_llama_cpp_quantizes_with_our_weights(tmp_path):
    """Bytes that llama.cpp makes with the weights read back are those of ggml's own encoder with the same weights."""
    libgguf = pytest.importorskip("libgguf", reason="libgguf, ggml's encoders, is not installed")
    import cyllama_quantize

    rng = np.random.default_rng(3)
    shapes = {"blk.0.attn_q.weight": (8, 256), "blk.0.ffn_down_exps.weight": (2, 8, 256)}
    weights = {n: rng.normal(size=s).astype(F32) for n, s in shapes.items()}
    entries = {
        "blk.0.attn_q.weight": Sums(sums(1, 256), np.array([1024], F32)),
        "blk.0.ffn_down_exps.weight": Sums(sums(2, 256, seed=2), np.array([512, 37], F32)),
    }
    ImportanceMatrix(entries).write(tmp_path / "m.gguf")
    m = ImportanceMatrix.read(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "f32.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    writer.add_vocab_size(2)
    for name, w in weights.items():
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    passed = {n: m.get(n, s) for n, s in shapes.items()}
    reader = cyllama_quantize.quantize(tmp_path / "f32.gguf", tmp_path / "q.gguf", "Q4_K_S", passed)
    made = {t.name: t for t in reader.tensors}
    for name, w in weights.items():
        kind = made[name].tensor_type
        stacked, importance = w.reshape(-1, *w.shape[-2:]), passed[name].reshape(-1, 256)
        expected = [libgguf.quantize_rows(x, kind, imatrix=v) for x, v in zip(stacked, importance, strict=True)]
        ours = np.concatenate([np.frombuffer(bytes(x), np.uint8) for x in expected])
        np.testing.assert_array_equal(made[name].data.reshape(-1), ours)
        assert kind.name in ("Q4_K", "Q5_K")
