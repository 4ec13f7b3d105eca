"""The knapsack over grids: within the budget, close to it, and as good as trying everything."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxq.conversion.request import size_in_bytes
from mlxq.errors import PlanError
from mlxq.formats.geometry import affine_bytes
from mlxq.plan.budget import Option, allocate
from mlxq.types import QuantSpec

GRIDS = [QuantSpec(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]

few_options = st.lists(
    st.builds(Option, st.just("Q4_K"), st.integers(1, 30), st.integers(0, 40).map(float)), min_size=1, max_size=4
)
small_cases = st.lists(few_options, min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(small_cases, st.integers(0, 150))
def test_as_good_as_trying_everything_but_for_one_step(tensors: list[list[Option]], budget: int) -> None:
    options = {f"t{i}": of for i, of in enumerate(tensors)}
    fitting = [c for c in product(*tensors) if sum(o.nbytes for o in c) <= budget]
    if not fitting:
        with pytest.raises(PlanError, match="fewest bits"):
            allocate(options, budget)
        return
    chosen = allocate(options, budget)
    assert chosen.keys() == options.keys()
    assert all(chosen[name] in options[name] for name in options)
    assert sum(o.nbytes for o in chosen.values()) <= budget
    best = min(sum(o.cost for o in c) for c in fitting)
    found = sum(o.cost for o in chosen.values())
    # What the greedy solution of the relaxed problem lacks is less than one step along one tensor's hull, which is at
    # most the range of its costs.
    assert best <= found <= best + max(max(o.cost for o in of) - min(o.cost for o in of) for of in tensors)


def realistic(n_layers: int = 12, seed: int = 0) -> dict[str, list[Option]]:
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (768, 768),
        "k": (256, 768),
        "v": (256, 768),
        "o": (768, 768),
        "up": (2048, 768),
        "down": (768, 2048),
    }
    out = {"head": _options((49152, 768), 0.3)}
    for i in range(n_layers):
        out |= {f"{i}.{name}": _options(shape, float(np.exp(rng.normal(-3, 1)))) for name, shape in shapes.items()}
    return out


def _options(shape: tuple[int, int], sensitivity: float) -> list[Option]:
    """Four times less for each bit more, and more for larger groups."""
    return [
        Option(spec, affine_bytes(shape, spec, "F16"), sensitivity * 4.0**-spec.bits * spec.group_size**0.2)
        for spec in GRIDS
    ]


@pytest.mark.parametrize("bpw", [2.6, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0])
def test_close_to_the_budget(bpw: float) -> None:
    options = realistic()
    weights = sum(max(o.nbytes for o in of) * 8 / 9 for of in options.values())  # 8 bits in groups of 32 are 9 bpw
    budget = int(bpw * weights / 8)
    used = sum(o.nbytes for o in allocate(options, budget).values())
    assert 0.995 * budget < used <= budget


def test_more_room_never_costs_more() -> None:
    options = realistic(4)
    least = sum(min(o.nbytes for o in of) for of in options.values())
    costs = [sum(o.cost for o in allocate(options, int(least * f)).values()) for f in (1.0, 1.2, 1.5, 2.0, 4.0)]
    # Filling up what is left may go another way for a little more room: by less than a hundredth.
    assert all(b <= 1.01 * a for a, b in pairwise(costs))
    assert costs[-1] == pytest.approx(sum(min(o.cost for o in of) for of in options.values()))


def test_what_matters_gets_the_bits() -> None:
    options = {"dear": _options((512, 512), 10.0), "cheap": _options((512, 512), 0.01)}
    chosen = allocate(options, affine_bytes((1024, 512), QuantSpec(4, 64), "F16"))
    assert chosen["dear"].grid.bits > 4 > chosen["cheap"].grid.bits


def test_order_does_not_matter() -> None:
    options = realistic(3)
    budget = sum(sorted(o.nbytes for o in of)[9] for of in options.values())
    there = allocate(options, budget)
    back = allocate({name: options[name][::-1] for name in reversed(options)}, budget)
    assert sum(o.cost for o in there.values()) == pytest.approx(sum(o.cost for o in back.values()), rel=1e-6)


def test_nothing_to_choose() -> None:
    assert allocate({}, 0) == {}
    only = Option("Q4_K", 5, 1.0)
    assert allocate({"a": [only]}, 5) == {"a": only}
    with pytest.raises(PlanError, match=r"at least 5 bytes .*; 4 are left"):
        allocate({"a": [only]}, 4)
    with pytest.raises(PlanError, match="-3"):
        allocate({"a": [only]}, -3)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4.2GB", 4_200_000_000),
        ("4.2G", 4_200_000_000),
        ("512mb", 512_000_000),
        (" 16 GiB ", 16 << 30),
        ("1KiB", 1024),
        ("1k", 1000),
        ("2TB", 2 * 10**12),
        ("0.5MiB", 1 << 19),
        ("1234", 1234),
        ("7B", 7),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size_in_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "0.0GB", "4,2GB", "4.2.1GB", "1iB", "1PB", "nan", "1e9", "4 2GB", "٤GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(PlanError, match="is no size"):
        size_in_bytes(text)


def test_sizes_that_are_less_than_a_byte() -> None:
    with pytest.raises(PlanError, match="is no size"):
        size_in_bytes("0.0001k")
