"""What is written about a tokenizer makes llama.cpp give the ids that Hugging Face's tokenizer gives."""

import json

import pytest
from gguf_texts import TEXTS, fuzz
from gguf_tokenizers import LLAMA3, QWEN2, byte_level, metadata_of, sentencepiece_model, write_gguf
from llamacpp import LlamaCpp

ALL = TEXTS + fuzz(400)
SETTINGS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def assert_ids(path, tokenizer, texts=ALL):
    theirs = LlamaCpp(path)
    differing = []
    for text in texts:
        expected, actual = tokenizer.encode(text).ids, theirs.tokenize(text, add_special=True)
        if actual != expected:
            differing.append((text, actual, expected))
    assert not differing[:3]


BYTE_LEVEL = {
    "gpt-2": {"patterns": []},
    "smollm": {"patterns": [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]},
    "llama-bpe": {"patterns": [LLAMA3], "ignore_merges": True, "bos": True},
    "smaug-bpe": {"patterns": [LLAMA3]},
    "qwen2": {"patterns": [QWEN2], "added": ["<|im_end|>", "<tool>", "<|fim_pad|>"]},
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level(tmp_path, name):
    tokenizer = byte_level(**BYTE_LEVEL[name])
    n = tokenizer.get_vocab_size() + 3
    metadata = metadata_of(tokenizer, SETTINGS, n)
    assert metadata["tokenizer.ggml.pre"] == ("string", name)
    assert metadata["tokenizer.ggml.tokens"][1][-1] == f"[PAD{n - 1}]"
    assert metadata["tokenizer.ggml.token_type"][1][-1] == 5
    assert_ids(write_gguf(tmp_path / "m.gguf", metadata, n), tokenizer)
