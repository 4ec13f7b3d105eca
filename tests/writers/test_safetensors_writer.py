"""The planned layout is a valid safetensors file, whatever the order of writes; the official reader is the judge."""

import errno
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors import safe_open

from mlxq.errors import Cancelled, CheckpointError, OutputError
from mlxq.writers import files
from mlxq.writers.laid_out import sha256
from mlxq.writers.safetensors import Entry, SafetensorsWriter

ENTRY = Entry("a", "F32", (4,))


def digests_of(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def failing(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


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
    assert digests == digests_of(tmp_path)
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
    assert writer.close() == digests_of(tmp_path)
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


def test_cancelling_while_outputs_are_hashed(tmp_path):
    writer = SafetensorsWriter(tmp_path, [[ENTRY]])
    writer.write("a", bytes(16))

    def check():
        raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        writer.close(check)
    with pytest.raises(OutputError, match="closed"):
        writer.write("a", bytes(4))


def test_errors_of_the_callback_are_not_taken_for_the_disk(tmp_path):
    writer = SafetensorsWriter(tmp_path, [[ENTRY]])
    writer.write("a", bytes(16))
    with pytest.raises(OSError, match="Broken pipe"):
        writer.close(failing(errno.EPIPE))


def test_a_source_that_cannot_be_hashed_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*gone"):
        sha256(tmp_path / "gone")


def test_aborting_leaves_a_file_open_while_a_thread_writes_to_it(tmp_path, monkeypatch):
    """Its descriptor could otherwise be another file's by the time of the next write."""
    writer = SafetensorsWriter(tmp_path, [[ENTRY]])
    pwrite, began, go_on, seen = os.pwrite, threading.Event(), threading.Event(), []

    def slow(fd, data, offset):
        began.set()
        assert go_on.wait(30)
        seen.append((fd, os.fstat(fd).st_ino))
        return pwrite(fd, data[:4], offset)

    monkeypatch.setattr(os, "pwrite", slow)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(writer.write, "a", bytes(16))
        assert began.wait(30)
        writer.abort()
        go_on.set()
        written.result()
    inode = (tmp_path / "model.safetensors").stat().st_ino
    assert [i for _, i in seen] == [inode] * 4
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0][0])
    with pytest.raises(OutputError, match="closed"):
        writer.write("a", bytes(4))


def test_a_file_system_need_not_reserve_space(tmp_path, monkeypatch):
    for code in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
        monkeypatch.setattr(os, "posix_fallocate", failing(code), raising=False)
        directory = tmp_path / str(code)
        directory.mkdir(exist_ok=True)
        (directory / "model.safetensors").unlink(missing_ok=True)
        writer = SafetensorsWriter(directory, [[ENTRY]])
        writer.write("a", bytes(16))
        writer.close()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EFBIG, "file is too large")],
)
def test_a_full_disk_and_a_file_too_large_are_told_apart(tmp_path, monkeypatch, call, code, words):
    monkeypatch.setattr(os, call, failing(code), raising=False)
    with pytest.raises(OutputError, match=words):
        SafetensorsWriter(tmp_path, [[ENTRY]])


def test_one_write_call_never_exceeds_what_systems_take(tmp_path, monkeypatch):
    """macOS refuses 2^31 bytes at once; the limit is made small here to see the parts."""
    monkeypatch.setattr(files, "_MAX_WRITE", 5)
    pwrite, sizes = os.pwrite, []

    def counted(fd, data, offset):
        sizes.append(len(data))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    with open(tmp_path / "f", "wb") as f:
        files.write_at(f.fileno(), bytes(range(12)), 3)
    assert sizes == [5, 5, 2]
    assert (tmp_path / "f").read_bytes() == bytes(3) + bytes(range(12))
