"""Calibration text from files, read as far as needed: UTF-8 text, and JSON lines with `text` or chat `messages`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlxq.errors import CalibrationError

#: Bytes of text that are tokenized at once. The cut is between lines, so that tokens are what they would be anyway.
_PIECE = 1 << 16
_SPACE = b" \t\r\n"
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """A piece of text, or the token ids of a conversation; `raw` is what was read of the source for it."""

    domain: str
    content: str | list[int]
    raw: bytes


def documents(path: str | Path, tokenizer: Any) -> Iterator[Document]:
    """The documents of a file, in order; a text file is one, given in pieces.

    Raises:
        CalibrationError: not a file or not readable, not UTF-8 (with the byte), or a line of JSON that holds neither
            `text` nor `messages`, or messages that cannot be encoded (with the line).
    """
    path = Path(path)
    if path.is_dir():
        raise CalibrationError(f"{path}: the calibration text is a directory: name a file of text or JSON lines")
    try:
        with open(path, "rb") as f:
            if path.suffix.lower() in _JSON_LINES:
                yield from _json_lines(path, f, tokenizer)
            else:
                yield from _pieces(path, f)
    except OSError as e:
        raise CalibrationError(f"{path}: the calibration text cannot be read: {e.strerror or e}") from e


def _pieces(path: Path, f: BinaryIO) -> Iterator[Document]:
    offset, held = 0, b""
    while True:
        block = f.read(_PIECE)
        held += block
        if not block and not held:
            return
        cut = _cut(held) if block else len(held)
        piece, held = held[:cut], held[cut:]
        text = _decoded(path, piece, offset)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += len(piece)
        if piece.strip():
            yield Document("text", text, piece)


def _cut(data: bytes) -> int:
    """Where to cut: before the last line that begins with text, else before the last space, else between characters."""
    end = len(data)
    while (end := data.rfind(b"\n", 0, end)) >= 0:
        if end + 1 < len(data) and data[end + 1] not in _SPACE:
            return end + 1
    space = data.rstrip(_SPACE).rfind(b" ")
    if space > 0:
        return space
    end = len(data)
    while end > len(data) - 4 and end > 1 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    # The lead byte of a character goes with what follows it.
    return end - 1 if end > 1 and data[end - 1] & 0x80 else end


def _decoded(path: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CalibrationError(
            f"{path}: the calibration text is not UTF-8: byte 0x{data[e.start]:02x} at offset {offset + e.start};"
            " convert it to UTF-8"
        ) from None


def _json_lines(path: Path, f: BinaryIO, tokenizer: Any) -> Iterator[Document]:
    offset = 0
    for number, raw in enumerate(f, 1):
        line = _decoded(path, raw, offset).strip().removeprefix("\ufeff")
        offset += len(raw)
        if line:
            yield _document(f"{path}, line {number}", line, raw, tokenizer)


def _document(where: str, line: str, raw: bytes, tokenizer: Any) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise CalibrationError(f"{where}: is not JSON: {e}") from None
    fields = value if isinstance(value, dict) else {}
    if isinstance(fields.get("text"), str):
        text = fields["text"].strip()
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise CalibrationError(f"{where}: `text` has half of a surrogate pair, which no UTF-8 text can hold")
        return Document("text", f"{text}\n\n" if text else "", raw)
    if _are_messages(fields.get("messages")):
        return Document("chat", _conversation(where, fields["messages"], tokenizer), raw)
    found = f"an object with {', '.join(map(repr, list(fields)[:5])) or 'nothing in it'}"
    raise CalibrationError(
        f"{where}: is {found if isinstance(value, dict) else f'of type {type(value).__name__}'}; a line holds"
        ' {"text": "..."} or {"messages": [{"role": ..., "content": ...}, ...]}'
    )


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def _conversation(where: str, messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(f"{where}: has `messages`, but this model's tokenizer has no chat template: give `text`")
    try:
        return [int(i) for i in tokenizer.apply_chat_template(messages, return_dict=False)]
    except Exception as e:  # templates are programs, and fail as they like
        raise CalibrationError(f"{where}: the chat template refuses the messages: {' '.join(str(e).split())}") from e
