"""Writes gptqmodel_<name>/: a tiny llama that GPTQModel quantized, its settings as it saves them, and what it predicts.

    pip install torch transformers gptqmodel      # made with torch 2.13, transformers 5.23, GPTQModel 7.7.0, on a CPU
    python tests/goldens/make_gptqmodel_llama.py

`logits.npz` holds the token ids and the float32 logits of transformers' own llama in float32 with the weights that
GPTQModel's layers decode. The model is random: only layouts and settings are looked at, not its quality.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (1, 2)]
from tiny import write_tokenizer  # noqa: E402

CASES = {
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "gptq_act": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "format": FORMAT.GPTQ_V2},
    "awq": {"bits": 4, "group_size": 32, "method": METHOD.AWQ, "format": FORMAT.GEMM},
}


def float_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=260, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=257, eos_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float16)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "norm" not in name:
                w.mul_(8)
    model.save_pretrained(directory)
    write_tokenizer(directory)


def decoded(layer: torch.nn.Module) -> torch.Tensor:
    """`[K, N]`."""
    if hasattr(layer, "dequantize_weight"):
        return layer.dequantize_weight()
    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)


def decoded_logits(model: torch.nn.Module, stored: dict[str, torch.Tensor], tokens: torch.Tensor) -> np.ndarray:
    """Of a float32 llama whose projections hold what the quantized layers decode, with the scales of the file:
    GPTQModel loads them as bfloat16, which rounds them, where the model is of that type.
    """
    plain = LlamaForCausalLM(model.config).to(torch.float32).eval()
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear):
                packed = layers[name]
                if hasattr(packed, "qweight"):
                    packed.scales = stored[f"{name}.scales"].to(torch.float32)
                    w = decoded(packed)
                    module.weight.copy_(w.T.to(torch.float32))
                else:
                    module.weight.copy_(packed.weight)
            elif hasattr(module, "weight"):
                module.weight.copy_(layers[name].weight)
        return plain(tokens).logits.numpy()


def without_paths(value):
    """Settings without those that name a place on the machine that they were made on."""
    if not isinstance(value, dict):
        return value
    return {k: without_paths(v) for k, v in value.items() if not (isinstance(v, str) and v.startswith("/"))}


def main() -> None:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "float"
        float_model(source)
        rng = np.random.default_rng(0)
        texts = [{"input_ids": rng.integers(0, 256, 64).tolist(), "attention_mask": [1] * 64} for _ in range(32)]
        for name, options in CASES.items():
            if len(sys.argv) > 1 and name not in sys.argv[1:]:
                continue
            out = here / f"gptqmodel_{name}"
            shutil.rmtree(out, ignore_errors=True)
            model = GPTQModel.load(str(source), QuantizeConfig(device="cpu", **options))
            model.quantize(texts, batch_size=4)
            saved = Path(scratch) / name
            model.save(str(saved))
            loaded = GPTQModel.load(
                str(saved), device="cpu", backend=BACKEND.TORCH_AWQ if name == "awq" else BACKEND.TORCH
            )
            tokens = torch.tensor(rng.integers(0, 256, (1, 16)))
            logits = decoded_logits(loaded.model, load_file(saved / "model.safetensors"), tokens)
            out.mkdir()
            for file in saved.iterdir():
                if file.name in ("config.json", "quantize_config.json"):
                    (out / file.name).write_text(
                        json.dumps(without_paths(json.loads(file.read_text())), indent=1) + "\n"
                    )
                elif file.suffix == ".safetensors":
                    shutil.copy(file, out / file.name)
            np.savez_compressed(out / "logits.npz", tokens=tokens.numpy(), logits=logits)
            print(out, sorted(p.name for p in out.iterdir()))


if __name__ == "__main__":
    main()
