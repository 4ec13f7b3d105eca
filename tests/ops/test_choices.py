"""Stored measurements of kernels: what they decide, where they are, and files that are not what they should be."""

import json
import sys
import warnings
from pathlib import Path

import pytest

from mlxq.errors import OutputError
from mlxq.ops import choices
from mlxq.ops.choices import MARGIN, Product

PRODUCT = Product(4, 64, "F16", 512, 256)
FASTER, SLOWER = {"metal": 1e-5, "mlx": 2e-5}, {"metal": 3e-5, "mlx": 2e-5}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """A cache directory that is not there yet."""
    monkeypatch.setenv("MLXQ_CACHE_DIR", str(tmp_path / "cache"))
    choices.forget()
    yield tmp_path / "cache"
    choices.forget()


def test_nothing_is_faster_before_it_is_measured():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choices.is_faster(PRODUCT, 1)
        assert not choices.ever_faster(PRODUCT)


def test_both_measured_neighbours_decide(directory):
    assert choices.store({PRODUCT: {1: FASTER, 8: FASTER, 64: SLOWER, 512: FASTER}}) == directory / "kernels.json"
    faster = {rows: choices.is_faster(PRODUCT, rows) for rows in (1, 2, 8, 9, 63, 64, 65, 511, 512, 4096)}
    assert faster == {
        1: True, 2: True, 8: True, 9: False, 63: False, 64: False, 65: False, 511: False, 512: True, 4096: True,
    }  # fmt: skip
    assert choices.ever_faster(PRODUCT)


def test_fewer_rows_than_measured_are_not_known():
    choices.store({PRODUCT: {8: FASTER}})
    assert [choices.is_faster(PRODUCT, rows) for rows in (1, 7, 8, 9)] == [False, False, True, True]


@pytest.mark.parametrize(("part", "faster"), [(MARGIN, True), (MARGIN + 0.01, False), (1.0, False)])
def test_a_difference_within_the_margin_is_none(part, faster):
    choices.store({PRODUCT: {1: {"metal": part, "mlx": 1.0}}})
    assert choices.is_faster(PRODUCT, 1) == faster


@pytest.mark.parametrize(
    "other", [{"bits": 5}, {"group_size": 32}, {"dtype": "BF16"}, {"N": 513}, {"K": 512}, {"experts": 1}]
)
def test_another_product_is_another_measurement(other):
    choices.store({PRODUCT: {1: FASTER}})
    assert not choices.is_faster(PRODUCT._replace(**other), 1)
    assert choices.ever_faster(PRODUCT._replace(**other)) == ("dtype" in other)


def test_measurements_of_other_chips_versions_and_kernels_stay_and_are_not_used(monkeypatch, directory):
    places = [("applegpu_a", "1.0", "k1"), ("applegpu_b", "1.0", "k1"), ("applegpu_b", "2.0", "k1"), ("x", "2.0", "k2")]
    for place in places:
        monkeypatch.setattr(choices, "_here", lambda place=place: place)
        choices.store({PRODUCT: {1: FASTER}, PRODUCT._replace(K=512): {1: SLOWER}})
    monkeypatch.setattr(choices, "_here", lambda: ("applegpu_b", "2.0", "k2"))
    choices.forget()
    assert not choices.is_faster(PRODUCT, 1)
    for place in places:
        monkeypatch.setattr(choices, "_here", lambda place=place: place)
        choices.forget()
        assert choices.is_faster(PRODUCT, 1)
    # Measured anew: in the place of the old times, and of no other product's.
    choices.store({PRODUCT: {1: SLOWER}})
    assert not choices.is_faster(PRODUCT, 1)
    stored = json.loads((directory / "kernels.json").read_text())["measured"]["x"]["2.0"]["k2"]
    assert stored == {"affine_F16_gs_64_b_4_512x256": {"1": SLOWER}, "affine_F16_gs_64_b_4_512x512": {"1": SLOWER}}
    assert [p.name for p in directory.iterdir()] == ["kernels.json"]


def test_a_stack_has_a_name_of_its_own():
    assert str(PRODUCT._replace(experts=8)) == "affine_F16_gs_64_b_4_8x512x256"


def _valid(rows="1", times=FASTER):
    return {"format": 1, "measured": {"chip": {"1.0": {"kernels": {"product": {rows: times}}}}}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1"),
        (b"{", "line 1"),
        (b"\xff\xfe{}", "utf-8"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "format 1 expected, got 'list'"),
        (json.dumps({"format": 2, "measured": {}}).encode(), "format 1 expected, got 2"),
        (json.dumps({"format": 1}).encode(), "an object of chips expected"),
        (json.dumps({"format": 1, "measured": {"chip": []}}).encode(), "an object of versions of mlx expected"),
        (json.dumps({"format": 1, "measured": {"chip": {"1.0": 3}}}).encode(), "an object of kernels expected"),
        (json.dumps(_valid(rows="one")).encode(), "a number of rows expected"),
        (json.dumps(_valid(rows="9" * 5000)).encode(), "a number of rows expected"),
        (json.dumps(_valid(times=[1, 2])).encode(), "an object of back ends expected"),
        (json.dumps(_valid(times={"metal": 1.0})).encode(), "seconds of mlx expected, got None"),
        (json.dumps(_valid(times={"metal": -1.0, "mlx": 1.0})).encode(), "seconds of metal expected, got -1.0"),
        (json.dumps(_valid(times={"metal": float("nan"), "mlx": 1.0})).encode(), "seconds of metal expected, got nan"),
        (json.dumps(_valid(times={"metal": True, "mlx": 1.0})).encode(), "seconds of metal expected, got True"),
    ],
)
def test_a_damaged_file_is_one_warning_and_measured_anew(directory, content, words):
    directory.mkdir()
    path = directory / "kernels.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="not read, so mlx's kernels are used") as told:
        assert [choices.is_faster(PRODUCT, rows) for rows in (1, 2, 3)] == [False] * 3
    assert len(told) == 1
    text = str(told[0].message)
    assert words in text
    assert str(path) in text
    assert "mlxq bench --kernels" in text
    assert "\n" not in text
    with pytest.warns(UserWarning, match="not read"):
        choices.store({PRODUCT: {1: FASTER}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices.is_faster(PRODUCT, 1)


def test_what_is_valid_is_read(directory):
    directory.mkdir()
    (directory / "kernels.json").write_text(json.dumps(_valid()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choices.is_faster(PRODUCT, 1)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXQ_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match=r"cannot be written: .*MLXQ_CACHE_DIR may name another directory"):
        choices.store({PRODUCT: {1: FASTER}})


def test_an_interrupted_write_leaves_the_old_file(monkeypatch, directory):
    choices.store({PRODUCT: {1: FASTER}})
    before = (directory / "kernels.json").read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choices.os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        choices.store({PRODUCT: {1: SLOWER}})
    assert (directory / "kernels.json").read_bytes() == before
    assert [p.name for p in directory.iterdir()] == ["kernels.json"]


@pytest.mark.parametrize(
    ("platform", "xdg", "expected"),
    [
        ("darwin", "/elsewhere", Path.home() / "Library" / "Caches" / "mlxq"),
        ("linux", "/elsewhere", Path("/elsewhere/mlxq")),
        ("linux", "relative", Path.home() / ".cache" / "mlxq"),
        ("linux", None, Path.home() / ".cache" / "mlxq"),
    ],
)
def test_the_platform_says_where_caches_are(monkeypatch, platform, xdg, expected):
    monkeypatch.delenv("MLXQ_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert choices.cache_directory() == expected
