"""Chunks cover tensors exactly, and memory is asked for before it is used."""

import math
import threading
import time

import pytest

from mlxq.types import TensorInfo
from mlxq.writers import stream


def rows_of(*shape):
    return list(TensorInfo("t", shape, "BF16", 2).row_ranges(stream.CHUNK_WEIGHTS))


@pytest.mark.parametrize("shape", [(5,), (100_000, 768), (8, 1024, 4096), (3, 2, 64), (1, 1 << 23)])
def test_chunks_cover_every_row_once_and_stay_small(shape):
    rows = rows_of(*shape)
    assert [r.start for r in rows] == [0, *[r.stop for r in rows[:-1]]]
    assert rows[-1].stop == shape[0]
    one_row = math.prod(shape[1:])
    assert all((r.stop - r.start) * one_row <= max(stream.CHUNK_WEIGHTS, one_row) for r in rows)


def test_a_scalar_is_one_chunk():
    assert rows_of() == [None]


def hold_in_thread(budget, key, nbytes):
    """A thread that holds until it is told to let go: (holds now, let go)."""
    has, leave = threading.Event(), threading.Event()

    def run():
        with budget.hold(key, nbytes):
            has.set()
            leave.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    return has, lambda: (leave.set(), thread.join())


def test_budget_waits_for_bytes_and_shares_by_key():
    budget = stream._Budget(100)
    a, end_a = hold_in_thread(budget, "a", 70)
    assert a.wait(5)
    shared, end_shared = hold_in_thread(budget, "a", 70)
    assert shared.wait(5)
    b, end_b = hold_in_thread(budget, "b", 50)
    time.sleep(0.1)
    assert not b.is_set()
    end_a()
    time.sleep(0.1)
    assert not b.is_set()  # the other holder of "a" still has it
    end_shared()
    assert b.wait(5)
    end_b()
    huge, end_huge = hold_in_thread(budget, "c", 10**9)
    assert huge.wait(5)
    end_huge()
    assert budget._free == 100
