"""The covering set of combinations."""

import itertools

import covering


def test_each_two_values_come_together_in_few_combinations():
    axes = (range(6), "abcd", (None, True, 2.0))
    every = list(itertools.product(*axes))
    chosen = covering.pairwise(every)
    for i, j in itertools.combinations(range(3), 2):
        assert {(c[i], c[j]) for c in chosen} == set(itertools.product(axes[i], axes[j]))
    # Of the two longest axes every pair is needed.
    assert 24 <= len(chosen) <= 30 < len(every)
    assert len(set(chosen)) == len(chosen)
    assert covering.pairwise(every) == chosen
