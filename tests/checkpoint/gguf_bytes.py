"""GGUF files byte by byte, good and hostile."""

from __future__ import annotations

import struct


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def tensor(name="t", dims=(4,), kind=0, offset=0) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def make(tensors=(), entries=(), data=64, version=3, magic=b"GGUF", n_tensors=None, n_entries=None) -> bytes:
    """A file from its parts; `data` bytes follow the padded header."""
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(entries) if n_entries is None else n_entries)
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + bytes(data)


ALIGNMENT = string("general.alignment") + u32(4)


def of_type(kind: int, key: str = "k") -> bytes:
    return string(key) + u32(kind)


def array_of(kind: int, count: int) -> bytes:
    return of_type(9) + u32(kind) + u64(count)


HOSTILE = {
    "empty file": (b"", "the magic number needs 4 bytes from byte 0, but the file has 0"),
    "not gguf": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "version 1": (make(version=1), "GGUF version 1: versions 2 and 3 are supported"),
    "big-endian": (make(version=0x03000000), r"GGUF version 50331648 \(a big-endian file\?\)"),
    "cut in the counts": (
        make()[:20],
        "the number of metadata entries needs 8 bytes from byte 16, but the file has 20",
    ),
    "absurd tensors": (make(n_tensors=1 << 62), r"4611686018427387904 tensors need at least \d+ bytes"),
    "absurd metadata": (make(n_entries=1 << 40), "1099511627776 metadata entries need at least"),
    "counts that wrap": (make(n_tensors=(1 << 64) // 24 + 1), "768614336404564651 tensors need at least"),
    "key longer than file": (
        make(entries=[u64(1 << 50)]),
        "the key of metadata entry 0 needs 1125899906842624 bytes from byte 32, but the file has",
    ),
    "key of 2**60": (make(entries=[u64(1 << 60)]), "the key of metadata entry 0 needs 1152921504606846976 bytes"),
    "key of 2**64 - 1": (make(entries=[u64((1 << 64) - 1)]), "metadata entry 0 needs 18446744073709551615 bytes"),
    "key empty": (make(entries=[of_type(0, "") + b"\1"]), "metadata key '' is empty"),
    "string longer than file": (
        make(entries=[of_type(8) + u64(1 << 63)]),
        "metadata key 'k' needs 9223372036854775808 bytes",
    ),
    "string of 2**60 in an array": (
        make(entries=[array_of(8, 2) + string("a") + u64(1 << 60)]),
        "a string of metadata key 'k' needs 1152921504606846976 bytes from byte .* truncated or not GGUF",
    ),
    "absurd strings": (
        make(entries=[array_of(8, 1 << 45)]),
        "35184372088832 strings in metadata key 'k' need at least",
    ),
    "absurd numbers": (
        make(entries=[array_of(5, 1 << 45)]),
        "35184372088832 numbers in metadata key 'k' need at least",
    ),
    "numbers that wrap": (
        make(entries=[array_of(10, 1 << 61)]),
        "2305843009213693952 numbers in .* need at least 18446",
    ),
    "nested array": (make(entries=[array_of(9, 1)]), "metadata key 'k' is an array of arrays, expected one of numbers"),
    "unknown element type": (
        make(entries=[array_of(13, 1)]),
        "is an array of the unknown value type 13, expected 0 to 12",
    ),
    "unknown value type": (make(entries=[of_type(99)]), "metadata key 'k' has the unknown value type 99"),
    "key not text": (make(entries=[string(b"\xff\xfe") + u32(0) + b"\0"]), "the key of metadata entry 0 is not UTF-8"),
    "value not text": (make(entries=[of_type(8) + string(b"\xff")]), "metadata key 'k' is not UTF-8"),
    "element not text": (make(entries=[array_of(8, 1) + string(b"\xff")]), "a string of metadata key 'k' is not UTF-8"),
    "repeated key": (make(entries=[of_type(0) + b"\1"] * 2), "metadata key 'k' appears twice"),
    "long repeated key": (
        make(entries=[of_type(0, "k\n" * 9999) + b"\1"] * 2),
        r"metadata key 'k\\nk.*\.\.\. appears twice",
    ),
    "alignment zero": (make(entries=[ALIGNMENT + u32(0)]), "general.alignment is 0, expected a power of two"),
    "alignment odd": (make(entries=[ALIGNMENT + u32(48)]), "general.alignment is 48"),
    "alignment huge": (
        make(entries=[ALIGNMENT + u32(1 << 31)]),
        "general.alignment is 2147483648, expected .* 1048576",
    ),
    "alignment true": (make(entries=[of_type(7, "general.alignment") + b"\1"]), "general.alignment is True"),
    "alignment text": (
        make(entries=[of_type(8, "general.alignment") + string("x")]),
        "general.alignment is 'x'",
    ),
    "no dimensions": (make([tensor(dims=())]), "'t' has 0 dimensions, expected 1 to 4"),
    "many dimensions": (make([tensor(dims=(1,) * 9)]), "'t' has 9 dimensions"),
    "2**32 - 1 dimensions": (
        make([string("t") + u32((1 << 32) - 1) + bytes(64)]),
        "'t' has 4294967295 dimensions, expected 1 to 4",
    ),
    "empty shape": (make([tensor(dims=(4, 0))]), r"impossible shape \[0, 4\]"),
    "huge shape": (
        make([tensor(dims=(1 << 40, 1 << 40))]),
        "'t' has the impossible shape .* expected 1 to 1152921504606",
    ),
    "shape that wraps to 0": (make([tensor(dims=(1 << 32, 1 << 32))]), "'t' has the impossible shape"),
    "shape that wraps to 4": (make([tensor(dims=((1 << 62) + 1, 4))]), "'t' has the impossible shape"),
    "unknown type": (make([tensor(kind=77)]), "'t' has the unknown ggml type 77"),
    "type out of use": (make([tensor(kind=4)]), "'t' has the unknown ggml type 4"),
    "partial block": (make([tensor(dims=(33,), kind=3)]), "Q4_1 packs blocks of 32 weights, but its rows have 33"),
    "partial super-block": (
        make([tensor(dims=(32, 8), kind=12)]),
        "Q4_K packs blocks of 256 weights, but its rows have 32",
    ),
    "unaligned": (make([tensor(offset=4)]), "offset 4 is not a multiple of the alignment 32"),
    "past the end": (make([tensor(dims=(17,))]), r"'t' ends at byte 132, but the file has 128: it is truncated"),
    "offset past the end": (make([tensor(offset=1 << 62)]), "'t' ends at byte .* but the file has"),
    "offset that wraps": (
        make([tensor(offset=(1 << 64) - 32)]),
        "'t' ends at byte 18446744073709551664, but the file has",
    ),
    "tensor without a name": (make([tensor("")]), "tensor '' has an empty name"),
    "tensor's name longer than file": (
        make([u64(1 << 60) + bytes(16)]),
        "the name of a tensor needs 1152921504606846976",
    ),
    "repeated tensor": (make([tensor(), tensor(offset=32)]), "tensor 't' appears twice"),
    "overlap": (
        make([tensor("a", (16,)), tensor("b", offset=32)], data=128),
        "tensors 'a' and 'b' overlap: byte 128 belongs to both",
    ),
    "same place": (make([tensor("a"), tensor("b")]), "tensors 'a' and 'b' overlap"),
}
