"""Unknown keyword arguments name the valid ones."""

from __future__ import annotations

import inspect

import pytest

from mlxq.api import public


@public
def example(source, *, bits=4, group_size=64):
    """Its documentation."""
    return source, bits, group_size


def test_calls_pass_through():
    assert example(1, bits=2) == (1, 2, 64)
    assert example.__doc__ == "Its documentation."
    assert list(inspect.signature(example).parameters) == ["source", "bits", "group_size"]


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [("bit", r"; did you mean 'bits'\? valid: source, bits, group_size"), ("zzz", "; valid: source, bits, group_size")],
)
def test_unknown_keywords(keyword, hint):
    with pytest.raises(TypeError, match=rf"^example\(\) has no keyword '{keyword}'{hint}$"):
        example(1, **{keyword: 2})


def test_a_function_that_takes_any_keyword_cannot_be_checked():
    with pytest.raises(TypeError, match="any keyword"):
        public(lambda **options: options)
