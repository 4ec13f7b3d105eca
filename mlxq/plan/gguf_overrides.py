"""Types of GGUF tensors asked for by hand: `REGEX=TYPE`, searched in GGUF names. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlxq.errors import PlanError

#: Types that a tensor may be given by hand.
TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


class Overrides:
    """Types asked for by pattern; the last pattern that matches a tensor wins. Remembers which named a matrix.

    Raises:
        PlanError: a malformed pattern or an unknown type.
    """

    def __init__(self, texts: Sequence[str]):
        self._patterns = [(*_override(text), text) for text in texts]
        self._unmatched = dict.fromkeys(texts)

    def find(self, tensor: str, kept: str | None) -> tuple[str, str] | None:
        """The type asked for and the reason, or None. `kept` says why the tensor stays float32, if it does."""
        found = None
        for regex, kind, text in self._patterns:
            if not regex.search(tensor):
                continue
            if kept is not None:
                if self._unmatched.get(text, "") is None:
                    self._unmatched[text] = f"{tensor} ({kept})"
                continue
            self._unmatched.pop(text, None)
            found = kind, f"--tensor-type {text}"
        return found

    def refuse_unmatched(self) -> None:
        """After all tensors were looked up: raise PlanError for a pattern that had no effect."""
        for text, unfit in self._unmatched.items():
            if unfit is not None:
                raise PlanError(f"--tensor-type {text!r} matches only what stays float32, such as {unfit}")
            raise PlanError(f"pattern {text!r} matches no tensor; list them with --dry-run")


def _override(text: str) -> tuple[re.Pattern[str], str]:
    pattern, separator, kind = text.rpartition("=")
    if not separator or not pattern:
        raise PlanError(f"--tensor-type {text!r}: write REGEX=TYPE, e.g. 'ffn_down=Q6_K'")
    if kind.upper() not in TENSOR_TYPES:
        raise PlanError(f"--tensor-type {text!r}: unknown type {kind!r}: choose one of {', '.join(TENSOR_TYPES)}")
    try:
        return re.compile(pattern), kind.upper()
    except re.error as e:
        raise PlanError(f"--tensor-type {text!r} is not a regular expression: {e}") from e
