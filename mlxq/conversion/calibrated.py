"""What a conversion asks of calibration: whether it is needed, its text, and the codes that it makes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.texts import CalibrationText
from mlxq.checkpoint.config import context_length
from mlxq.conversion.calibration import Calibration
from mlxq.conversion.code_store import CodeStore, store_key
from mlxq.conversion.cost_file import Costs
from mlxq.conversion.folding import FoldedParameters
from mlxq.conversion.job import Job
from mlxq.conversion.request import CalibrationRequest
from mlxq.plan.methods import is_calibrated
from mlxq.plan.planner import Plan


def is_needed(plan: Plan) -> bool:
    """Whether any tensor is quantized by a method that needs a text."""
    return any(is_calibrated(p) for p in plan.tensors)


def read_text(job: Job, parameters: ParameterMap, request: CalibrationRequest) -> CalibrationText:
    """The token sequences to calibrate on.

    Raises:
        CalibrationError: the text is unfit.
    """
    from mlxq.calibration.texts import SELF, calibration_sequences
    from mlxq.runtime.tokenizer import load_tokenizer

    config = parameters.checkpoint.config
    with contextlib.ExitStack() as stack:
        generate = None
        if request.source == SELF:
            from mlxq.runtime.continuations import continuations
            from mlxq.runtime.load import load

            model = load(job.source, revision=job.revision, progress=job.progress, cancel=job.cancel)
            generate = continuations(stack.enter_context(model), cancel=job.cancel)
        return calibration_sequences(
            load_tokenizer(parameters.checkpoint),
            request.source,
            n_sequences=request.n_sequences,
            length=min(request.length, context_length(config) or request.length),
            vocab_size=config.get("vocab_size"),
            seed=request.seed,
            generate=generate,
            progress=job.progress,
        )


def calibrate(
    job: Job,
    output: Path,
    parameters: ParameterMap,
    plan: Plan,
    text: CalibrationText,
    request: CalibrationRequest,
    costs: Costs | None = None,
) -> tuple[CodeStore, list[str], FoldedParameters]:
    """Codes of every tensor that the plan gives to a calibrated method, notes on how they came about, and the weights
    that all else is to be read from, which may be scaled.

    The caller enters the store (`with store`) for the time in which it writes the result.

    Raises:
        CalibrationError: activations overflow.
    """
    key = store_key(parameters, plan, text, request, costs.text if costs else None)
    store = CodeStore(output, key, keep=job.resumable)
    run = Calibration(parameters, plan, text, request, store, job.progress, job.cancel, costs)
    try:
        # Overflow is named where it shows.
        with np.errstate(over="ignore", invalid="ignore"):
            run.run()
    except BaseException as e:
        store.leave(e)
        raise
    return store, run.notes, run.folded
