"""`mlxq bench --kernels` where there is Metal: ours and mlx's are timed, and the choice is stored and followed."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from block_models import write as write_blocks
from pretended_gpu import pretend_gpu
from tiny import make_model

import mlxq
from mlxq.cli.app import run
from mlxq.evaluate.kernels import clock as clocks
from mlxq.evaluate.kernels import measure
from mlxq.ops import choices


@pytest.fixture
def gpu(metal, monkeypatch, tmp_path):
    """A GPU whose memory is small and whose time is short."""
    import mlxq.cli.bench  # noqa: F401

    pretend_gpu(monkeypatch, metal=True)
    monkeypatch.setattr(measure, "_WORKING_SET", {"gpu": 1, "cpu": 1})
    monkeypatch.setattr(clocks, "_PASSES", 1)
    monkeypatch.setattr(clocks, "_MOST_PRODUCTS", 1)
    monkeypatch.setattr(clocks, "_COPIED", {"gpu": 1 << 20, "cpu": 1 << 20})
    monkeypatch.setenv("MLXQ_CACHE_DIR", str(tmp_path / "cache"))
    choices.forget()
    with metal.options(mode="fast"):
        yield metal
    choices.forget()


def test_affine_products_are_timed_stored_and_followed(gpu, tmp_path, capsys):
    source = make_model(tmp_path / "float", num_hidden_layers=1)
    mlxq.convert(source, tmp_path / "4bit", bits=4, group_size=64, verify=False)
    capsys.readouterr()
    assert run(["bench", str(tmp_path / "4bit"), "--kernels", "--rows", "1", "--json"]) == 0
    out, told = capsys.readouterr()
    content = json.loads(out)
    assert content["metal"] is True
    assert {(p["ours"]["backend"], p["mlx"]["backend"]) for p in content["products"]} == {("metal", "mlx")}
    assert {p["dtype"] for p in content["products"]} == {"BF16"}
    path = tmp_path / "cache" / "kernels.json"
    assert f"Stored in {path}" in told
    stored = json.loads(path.read_text())["measured"][choices.chip()][mx.__version__]
    (products,) = stored.values()
    assert "affine_BF16_gs_64_b_4_128x256" in products
    for p in content["products"]:
        product = choices.Product(p["bits"], p["group_size"], p["dtype"], p["N"], p["K"])
        assert choices.is_faster(product, 1) == (p["ours"]["seconds"] <= choices.MARGIN * p["mlx"]["seconds"])
    if not gpu.real:
        assert {name for name, _ in gpu.launches} == {"affine_qmv_bfloat16_gs_64_b_4"}


def test_blocks_have_a_yardstick_and_nothing_to_choose(gpu, tmp_path, capsys):
    path = write_blocks(tmp_path / "m.gguf", "Q4_K", "qwen3moe")
    assert run(["bench", str(path), "--kernels", "--rows", "1,2"]) == 0
    out = capsys.readouterr().out
    assert "4-bit group 32" in out
    assert "Nothing to choose: there are no affine weights here" in out
    assert not (tmp_path / "cache").exists()
    if not gpu.real:
        assert {name.split("_q4_k")[0] for name, _ in gpu.launches} == {"ggml_qmv", "ggml_gather_qmv"}


def test_nothing_is_stored_when_that_is_asked(gpu, tmp_path, capsys):
    mlxq.convert(make_model(tmp_path / "float", num_hidden_layers=1), tmp_path / "4bit", bits=4, verify=False)
    assert run(["bench", str(tmp_path / "4bit"), "--kernels", "--rows", "1", "--no-store"]) == 0
    assert "of 5 affine products" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
