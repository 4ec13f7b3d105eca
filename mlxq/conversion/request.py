"""What can be asked for of a conversion, and how a GGUF file and what stands beside it are named."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlxq.errors import PlanError
from mlxq.runtime.memory import physical_memory
from mlxq.types import Method

GGUF_SUFFIX = ".gguf"
MODELFILE = "Modelfile"
#: Gradient steps of a block that can be asked for.
MOST_STEPS = 100_000
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class CalibrationRequest:
    """What was asked for.

    `source` is `builtin`, `self` or a file; `max_memory` bytes, by default half of the machine's memory, decide whether
    hidden states wait on disk; `tune` is how many gradient steps the codes of each block are moved by, last.

    Raises:
        PlanError: no number of steps.
    """

    source: str = "builtin"
    n_sequences: int = 128
    length: int = 512
    seed: int = 0
    sweeps: int = 1
    max_memory: int | None = None
    tune: int = 0

    def __post_init__(self) -> None:
        if type(self.tune) is not int or not 0 <= self.tune <= MOST_STEPS:
            raise PlanError(f"--tune {self.tune}: steps for each block are a whole number from 0 to {MOST_STEPS}")

    @property
    def room(self) -> int:
        """Bytes for hidden states, and for the second moments of a stack of experts: a quarter of the memory."""
        return (physical_memory() // 2 if self.max_memory is None else self.max_memory) // 4

    @property
    def is_default(self) -> bool:
        """Whether neither another text, nor more or less of it, nor tuning was asked for."""
        return replace(self, seed=0, max_memory=None) == CalibrationRequest()


@dataclass(frozen=True)
class BudgetRequest:
    """How large the result may be.

    `bpw` are bits per weight, `size` is such as `4.2GB`, `memory` that of a machine that must hold weights, a cache of
    `context` tokens and room for the rest, `kl` the divergence in nats per token that the result may have. `costs` is a
    file of measured costs, read if it is there, else written.

    Raises:
        PlanError: more than one budget, or one that is none.
    """

    bpw: float | None = None
    size: str | None = None
    memory: str | None = None
    context: int = 4096
    costs: str | os.PathLike[str] | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in self._asked().items() if value is not None]
        if len(given) > 1:
            raise PlanError(f"one budget at a time: {' and '.join(given)} were given")
        for name, number, unit in (("--target-bpw", self.bpw, "bits per weight"), ("--target-kl", self.kl, "nats")):
            if number is not None and not 0 < number < math.inf:
                raise PlanError(f"{name} {number:g}: a budget is a positive number of {unit}")
        for text in (self.size, self.memory):
            if text is not None:
                size_in_bytes(text)

    def _asked(self) -> dict[str, float | str | None]:
        asked = {"--target-bpw": self.bpw, "--target-size": self.size, "--fit": self.memory}
        return asked | {"--target-kl": self.kl}

    def __bool__(self) -> bool:
        return any(v is not None for v in self._asked().values())

    def described(self) -> dict[str, Any]:
        """What was asked for, without the place of a file."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "costs"}


@dataclass(frozen=True)
class GgufRequest:
    """What was asked for of a GGUF file; see `mlxq.convert`. `as_stored` never quantizes.

    Raises:
        PlanError: statistics from a file and from a text.
    """

    type: str | None = None
    tensor_types: tuple[str, ...] = ()
    imatrix: str | os.PathLike[str] | None = None
    exact: bool = False
    pre: str | None = None
    modelfile: bool = False
    as_stored: bool = False
    method: Method | None = None

    def __post_init__(self) -> None:
        if self.imatrix is not None and self.method is not None:
            raise PlanError(
                f"--method {self.method} and --imatrix exclude one another: importance comes from the calibration "
                "text, or from the file"
            )

    def beside(self, path: Path) -> tuple[str, ...]:
        """Names of the files that stand beside the GGUF file."""
        return (manifest_name(path), *((MODELFILE,) if self.modelfile else ()))


def is_gguf(output: str | os.PathLike[str] | None) -> bool:
    """Whether an output is named as a GGUF file."""
    return output is not None and os.fspath(output).lower().endswith(GGUF_SUFFIX)


def manifest_name(path: Path) -> str:
    """Name of the manifest beside a GGUF file."""
    return f"{path.stem}.mlxq.json"


def size_in_bytes(text: str) -> int:
    """Bytes of such as `4.2GB`, `4.2G` or `512MB` (powers of 1000), `4GiB` (powers of 1024).

    Raises:
        PlanError: it is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is not None and (match[2] or not match[3]):
        unit = match[2].lower()
        nbytes = int(float(match[1]) * (1024 ** ("kmgt".index(unit) + 1) if match[3] else _UNITS[unit]))
        if nbytes >= 1:
            return nbytes
    raise PlanError(f"{text!r} is no size: write 4.2GB, 512MB or 16GiB")
