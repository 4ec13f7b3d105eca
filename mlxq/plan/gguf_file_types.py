"""What llama.cpp calls whole files: names, their numbers under `general.file_type`, the type of most matrices. Pure."""

from __future__ import annotations

import difflib

from mlxq.errors import PlanError

#: File type -> (its number under `general.file_type`, the type of most matrices).
FILE_TYPES = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q8_0": (7, "Q8_0"),
    "Q4_0": (2, "Q4_0"),
    "Q4_1": (3, "Q4_1"),
    "Q5_0": (8, "Q5_0"),
    "Q5_1": (9, "Q5_1"),
    "Q2_K": (10, "Q2_K"),
    "Q2_K_S": (21, "Q2_K"),
    "Q3_K_S": (11, "Q3_K"),
    "Q3_K_M": (12, "Q3_K"),
    "Q3_K_L": (13, "Q3_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_K_M": (15, "Q4_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q6_K": (18, "Q6_K"),
    "IQ4_NL": (25, "IQ4_NL"),
    "IQ4_XS": (30, "IQ4_XS"),
}
#: Short names that llama.cpp's own tool takes too.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def file_type(name: str) -> tuple[str, int, str]:
    """A file type's full name, its number under `general.file_type` and its base type; case does not matter.

    Raises:
        PlanError: no such file type; the message lists those there are.
    """
    full = _ALIASES.get(name.upper(), name.upper())
    if full not in FILE_TYPES:
        plain = {known.replace("_", ""): known for known in FILE_TYPES}
        near = difflib.get_close_matches(full.replace("_", "").replace("-", ""), plain, n=1)
        hint = f" (did you mean {plain[near[0]]}?)" if near else ""
        raise PlanError(f"unknown GGUF file type {name!r}{hint}: choose one of {', '.join((*FILE_TYPES, *_ALIASES))}")
    return full, *FILE_TYPES[full]
