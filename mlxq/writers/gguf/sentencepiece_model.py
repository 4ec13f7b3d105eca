"""What a SentencePiece model file (`tokenizer.model`) holds: pieces, scores, types and how text is normalized.

The file is a protocol buffer (`sentencepiece_model.proto`): `ModelProto` has pieces in field 1 (text 1, score 2, type
3), the trainer's settings in field 2 (`model_type` 3) and the normalizer's in field 3 (`precompiled_charsmap` 2,
`add_dummy_prefix` 3, `remove_extra_whitespaces` 4). The `sentencepiece` package does not tell the settings.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from mlxq.checkpoint.gguf.tokens import NORMAL
from mlxq.errors import CheckpointError

UNIGRAM, BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class SentencePieceModel:
    """Pieces by id; `scores` are log-probabilities or negative ranks, `types` SentencePiece's own numbers."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = UNIGRAM
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    precompiled_charsmap: bytes = b""


def parse_sentencepiece(data: bytes, where: object) -> SentencePieceModel:
    """Read a model file.

    Args:
        data: its bytes.
        where: names it in errors.

    Raises:
        CheckpointError: it is not such a file.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                _piece(model, value)
            elif number == 2 and isinstance(value, bytes):
                model.model_type = int(dict(_fields(value)).get(3, UNIGRAM))
            elif number == 3 and isinstance(value, bytes):
                settings = dict(_fields(value))
                model.precompiled_charsmap = settings.get(2, b"")
                model.add_dummy_prefix = bool(settings.get(3, True))
                model.remove_extra_whitespaces = bool(settings.get(4, True))
    except (ValueError, IndexError, struct.error) as e:
        raise CheckpointError(f"{where}: not a SentencePiece model: {e}") from e
    if not model.pieces:
        raise CheckpointError(f"{where}: not a SentencePiece model: it holds no pieces")
    return model


def _piece(model: SentencePieceModel, data: bytes) -> None:
    values = dict(_fields(data))
    model.pieces.append(values.get(1, b"").decode())
    model.scores.append(struct.unpack("<f", values[2])[0] if 2 in values else 0.0)
    model.types.append(int(values.get(3, NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of each field: an int, or the bytes of everything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"byte {at} begins a field of the unknown kind {wire}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} exceeds the {len(data)} there are")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number at byte {at} does not end")
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
