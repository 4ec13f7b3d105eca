"""mlxq: one quantization, every runtime, proven. Importing it loads nothing heavy and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> module that defines it, imported on first use.
_EXPORTS = {
    "convert": "mlxq.conversion",
    "ConversionResult": "mlxq.conversion",
    "export": "mlxq.conversion",
    "write_importance": "mlxq.conversion.importance",
    "load": "mlxq.runtime.load",
    "Model": "mlxq.runtime.load",
    "generate": "mlxq.runtime.generate",
    "stream": "mlxq.runtime.generate",
    "inspect": "mlxq.evaluate.inspect",
    "compare": "mlxq.evaluate.comparison.compare",
    "Comparison": "mlxq.evaluate.comparison.compare",
    "evaluate_model": "mlxq.evaluate.quality.measure",
    "evaluate_models": "mlxq.evaluate.quality.measure",
    "Evaluation": "mlxq.evaluate.quality.results",
    "ModelQuality": "mlxq.evaluate.quality.results",
    "quantize": "mlxq.ops",
    "dequantize": "mlxq.ops",
    "quantized_matmul": "mlxq.ops",
    "MlxqError": "mlxq.errors",
    "QuantSpec": "mlxq.types",
    "Progress": "mlxq.types",
    "CancelToken": "mlxq.types",
}

__all__ = [
    "CancelToken",
    "Comparison",
    "ConversionResult",
    "Evaluation",
    "MlxqError",
    "Model",
    "ModelQuality",
    "Progress",
    "QuantSpec",
    "__version__",
    "compare",
    "convert",
    "dequantize",
    "evaluate_model",
    "evaluate_models",
    "export",
    "generate",
    "inspect",
    "load",
    "quantize",
    "quantized_matmul",
    "stream",
    "write_importance",
]

if TYPE_CHECKING:
    from mlxq.conversion import ConversionResult, convert, export
    from mlxq.conversion.importance import write_importance
    from mlxq.errors import MlxqError
    from mlxq.evaluate.comparison.compare import Comparison, compare
    from mlxq.evaluate.inspect import inspect
    from mlxq.evaluate.quality.measure import evaluate_model, evaluate_models
    from mlxq.evaluate.quality.results import Evaluation, ModelQuality
    from mlxq.ops import dequantize, quantize, quantized_matmul
    from mlxq.runtime.generate import generate, stream
    from mlxq.runtime.load import Model, load
    from mlxq.types import CancelToken, Progress, QuantSpec


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mlxq' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
