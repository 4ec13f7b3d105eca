"""llama.cpp's quantizer (`cyllama`) on one file with an importance matrix, as a process of its own.

python bench/peer_gguf.py SOURCE.gguf RESULT.gguf TYPE MATRIX
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import cyllama_quantize

from mlxq.calibration.imatrix import ImportanceMatrix

if __name__ == "__main__":
    source, result, file_type, matrix = sys.argv[1:]
    weights = {n: e.means().reshape(-1) for n, e in ImportanceMatrix.read(matrix).entries.items()}
    cyllama_quantize.quantize(Path(source), Path(result), file_type, weights)
