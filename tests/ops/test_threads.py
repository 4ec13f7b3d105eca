"""Threads of our own that used mlx leave it, so the process ends as it should."""

import subprocess
import sys
import threading

import mlx.core as mx
import pytest

from mlxq.ops.threads import in_own_thread, map_in_threads


def test_result_and_error_come_from_another_thread():
    assert in_own_thread(lambda: threading.current_thread() is threading.main_thread()) is False
    assert in_own_thread(lambda: float((mx.ones((3, 3)) @ mx.ones((3, 3))).sum())) == 27
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 / 0)


def test_the_process_ends_well():
    code = (
        "import mlx.core as mx\nfrom mlxq.ops.threads import in_own_thread, map_in_threads\n"
        "for i in range(3):\n"
        "    in_own_thread(lambda: mx.eval(mx.random.normal((256, 256)) @ mx.random.normal((256, 256))))\n"
        "    mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_unknown_keywords_of_public_operations_name_the_valid_ones():
    import mlxq

    with pytest.raises(TypeError, match=r"group_sise.*group_size"):
        mlxq.quantize(mx.ones((2, 64)), bits=4, group_sise=64)


def test_map_in_threads_yields_each_result_and_takes_items_as_threads_are_free():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = map_in_threads(lambda i: i * i, items(), 3)
    first = next(results)
    assert sorted([first, *results]) == [i * i for i in range(100)]
    assert taken == list(range(100))


def test_map_in_threads_stops_at_the_first_error():
    done = []

    def compute(i):
        if i == 5:
            raise ZeroDivisionError
        done.append(i)

    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(compute, range(10**9), 2))
    assert len(done) < 10**6
    assert not [t for t in threading.enumerate() if t.name.startswith("mlxq-") and t.name[5:].isdigit()]


def test_leaving_map_in_threads_ends_its_threads():
    results = map_in_threads(lambda i: i, range(10**9), 2)
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("mlxq-") and t.name[5:].isdigit()]
