"""What a tokenizer does and llama.cpp leaves out: lines for the report of a conversion to GGUF."""

from __future__ import annotations

from pathlib import Path

from mlxq.checkpoint.gguf.pretokenizers import names_splitting, splits_of
from mlxq.writers.gguf.tokenizer import around
from mlxq.writers.gguf.tokenizer_files import TokenizerFiles
from mlxq.writers.gguf.vocabulary import beyond
from mlxq.writers.gguf.whitespace import normalizers, parts_of, space_prefix


def tokenizer_differences(files: dict[str, Path | bytes], vocab_size: int | None = None) -> list[str]:
    """One line for each way in which texts can get other ids from llama.cpp than from the tokenizer.

    Args:
        files: the model's companion files.
        vocab_size: rows of the embedding.

    Raises:
        CheckpointError: a file cannot be read.
    """
    source = TokenizerFiles(files, {}, {})
    if source.tokenizer is None:
        return []
    return [*_of_text(source), *_of_added_tokens(source, vocab_size), *_of_ends(source)]


def _of_text(source: TokenizerFiles) -> list[str]:
    model = source.tokenizer["model"]
    steps = parts_of(source.tokenizer.get("pre_tokenizer"), "pretokenizers")
    kinds = {s["type"] for s in steps}
    lines = []
    if any(n["type"] == "NFC" for n in normalizers(source.tokenizer)):
        lines.append("text that is not in Unicode's composed form (NFC) gets other ids: llama.cpp does not compose it")
    if "Metaspace" in kinds and space_prefix(source):
        lines.append(
            "text that begins with a space gets other ids: llama.cpp puts one more before it, as SentencePiece does"
        )
    if any(s["type"] == "ByteLevel" and s.get("add_prefix_space") for s in steps):
        lines.append("the tokenizer puts a space before a text; llama.cpp does not")
    if model.get("type") == "BPE" and "ByteLevel" in kinds:
        exact = splits_of(source.tokenizer["pre_tokenizer"], exact=True)
        if exact is None or not names_splitting(exact, bool(model.get("ignore_merges"))):
            lines.append(
                "llama.cpp cuts text by expressions of its own for this tokenizer: some texts, such as words with "
                "combining marks, can get other ids"
            )
    if model.get("type") == "Unigram" and model.get("byte_fallback"):
        lines.append("characters that no token covers become the unknown one: llama.cpp's unigram has no bytes")
    return lines


def _of_added_tokens(source: TokenizerFiles, vocab_size: int | None) -> list[str]:
    lines = []
    left_out = beyond(source, vocab_size) if vocab_size is not None else []
    if left_out:
        lines.append(
            f"{len(left_out)} added tokens, {left_out[0].content!r} the first, are left out: they have none of the "
            f"{vocab_size} rows of the embedding"
        )
    strips = [t.content for t in source.added_tokens().values() if t.strips]
    if strips:
        lines.append(
            f"{len(strips)} added tokens, {strips[0]!r} the first, take spaces beside them or whole words only, which "
            "GGUF cannot say"
        )
    return lines


def _of_ends(source: TokenizerFiles) -> list[str]:
    lines = []
    for text, name, older in zip(around(source), ("bos", "eos"), ("cls", "sep"), strict=True):
        if text is not None and text not in (source.special_text(name), source.special_text(older)):
            lines.append(
                f"the tokenizer puts {text!r} around a text, which is not its {name.upper()}: GGUF cannot say so"
            )
    return lines
