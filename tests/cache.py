"""Where real models and tokenizers that tests read are kept."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("MLXQ_TEST_CACHE", ROOT / ".cache"))
