"""The whole of a conversion: checkpoint, plan, quantizers, writers, proof. The only package that sees all stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.api import DEFAULT_CONTEXT, public
from mlxq.conversion.job import ConversionResult, Job
from mlxq.conversion.method_choice import MethodChoice
from mlxq.conversion.request import GGUF_SUFFIX, BudgetRequest, CalibrationRequest, GgufRequest, is_gguf, size_in_bytes
from mlxq.errors import PlanError
from mlxq.plan.methods import CALIBRATED
from mlxq.plan.planner import Plan, PlanOptions
from mlxq.types import CancelToken, ProgressCallback

if TYPE_CHECKING:
    from mlxq.conversion.budget import Known
    from mlxq.conversion.plan_file import PlanFile

__all__ = ["ConversionResult", "convert", "export"]


@public
def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    type: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    tensor_types: str | Sequence[str] = (),
    keep: str | Sequence[str] = (),
    dtype: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    exact: bool = False,
    method: str | None = None,
    calib: str | os.PathLike[str] = "builtin",
    calib_sequences: int = 128,
    calib_length: int = 512,
    seed: int = 0,
    tune: int = 0,
    max_memory: str | None = None,
    target_bpw: float | None = None,
    target_size: str | None = None,
    fit: str | None = None,
    target_kl: float | None = None,
    context: int = DEFAULT_CONTEXT,
    costs: str | os.PathLike[str] | None = None,
    plan: str | os.PathLike[str] | None = None,
    pre: str | None = None,
    modelfile: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> ConversionResult:
    """Quantize a model into an MLX directory that stock mlx-lm loads, or a GGUF file that llama.cpp loads; prove it.

    Args:
        source: a Hugging Face or MLX directory, a GGUF file, or a Hub id `org/name`.
        output: the directory to make, or a file name that ends in `.gguf`; not needed for a dry run. With the
            portable recipe both, in a list: then the two decode to the same weights.
        type: of a GGUF file, as llama.cpp names it (`Q4_K_M`, `Q8_0`, `BF16` ...); default what a quantized source
            holds, else `Q4_K_M`.
        bits, group_size: of MLX's affine grid; default 4 and 64, or the codes of an already quantized source.
        recipe: of an MLX directory: `uniform`, `mixed` (more bits for sensitive tensors), `portable` (the same,
            in codes that a GGUF file can hold exactly), or `four-way` (4 bits that a GGUF file, GPTQ and AWQ hold
            exactly, in float16; see `export`).
        tensor_types: overrides, the last that matches wins: `REGEX=BITS[:GROUP]` with parameter names for MLX,
            `REGEX=TYPE` with GGUF names for GGUF.
        keep: regular expressions of parameters that stay float in an MLX directory.
        dtype: `float16`, `bfloat16` or `float32` for scales and kept tensors of an MLX directory; default the
            source's.
        imatrix: file of an importance matrix that weights the errors of a GGUF file's tensors, or of the portable
            recipe's.
        exact: refuse whatever would change a decoded weight.
        method: how codes are chosen: `rtn` (round to nearest: seconds instead of minutes), or by what a calibration
            text sends into each layer: `search` (scale and bias of each group), `gptq` (searched grids with error
            feedback), or `awq` and `awq+gptq` (the same two after channels are scaled where that changes nothing but
            what rounding costs; norms and biases change with them). Default: `gptq` where a matrix gets 6 bits or fewer
            and loses by that, `rtn` else, with an importance matrix, and where `gptq` cannot run; the plan's notes
            say which, and why. The portable recipe has a search of its own.
        calib: calibration text: `builtin`, `self` (the model writes it), or a file of text or JSON lines.
        calib_sequences, calib_length: how much of it is read, and in sequences of how many tokens.
        seed: of what is drawn: the model's own text, and the tokens that sensitivities are measured with.
        tune: gradient steps for each block, after its codes are chosen: they go on to move scales, biases and codes
            until the block gives what the float model's block gives. 0: none.
        max_memory: such as `8GB`: beyond it, hidden states of the text wait in a temporary file. Default: half of the
            machine's memory.
        target_bpw, target_size, fit, target_kl: a budget, one of the four: bits per weight, a size such as `4.2GB`,
            the memory of the machine that has to hold weights and a cache of `context` tokens, or the divergence from
            the source in nats per token: then some results are made and measured, and the smallest within it is kept.
            Each tensor's bits and group, or in a GGUF file its type, are chosen by what they cost the model's
            predictions.
        context: tokens, for `fit`.
        costs: file of the measured costs: read if it is there, else written, to be used again. Without a budget they
            weight the tokens for `gptq`.
        plan: file of what was chosen for each matrix: followed if it is there, else written, to be used again.
            `tensor_types` and `keep` make exceptions.
        pre: llama.cpp's name for how the tokenizer splits text, where it cannot be found out.
        modelfile: write a `Modelfile` for Ollama beside the GGUF file.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace an existing result, on success only.
        verify: run source and result over a short text, and fail when the result is broken.
        dry_run: plan only; nothing is read but headers and what a budget is measured on, nothing is written but the
            files of `costs` and `plan`.
        on_plan: called with the plan, before any work.
        progress: called with `Progress` events, from this thread.
        cancel: stops the conversion within one chunk of rows.

    Returns:
        The plan, what the proof measured, and notes on what was lost beside it.

    Raises:
        MlxqError: a subclass for each stage; nothing is left at `output` then.
    """
    budget = BudgetRequest(target_bpw, target_size, fit, context, costs, target_kl)
    if budget and imatrix is not None:
        raise PlanError("a budget measures on the calibration text what matters: leave --imatrix out")
    outputs = list(output) or [None] if isinstance(output, (list, tuple)) else [output]
    of_gguf = {"--type": type, "--imatrix": imatrix, "--pre": pre, "--modelfile": modelfile or None}
    given = next((name for name, value in of_gguf.items() if value is not None), None)
    to_file = is_gguf(outputs[0]) or (outputs[0] is None and given is not None)
    tensor_types, keep = _patterns(tensor_types), _patterns(keep)
    saved = _saved(plan, to_file, budget)
    if saved is not None:
        type, method, on_plan = type or saved.type, method or saved.method, saved.checked(on_plan)
        tensor_types, keep = (*saved.tensor_types, *tensor_types), (*saved.keep, *keep)
    calibration = CalibrationRequest(
        os.fspath(calib),
        calib_sequences,
        calib_length,
        seed,
        max_memory=size_in_bytes(max_memory) if max_memory else None,
        tune=tune,
    )
    if tune and (recipe == "portable" or (method is not None and method not in CALIBRATED)):
        raise PlanError(f"--tune goes on from what a text has chosen: give a --method of {', '.join(CALIBRATED)}")
    job = Job(source, outputs[0], revision, overwrite, verify, dry_run, on_plan, progress, cancel or CancelToken())
    choice = MethodChoice.of(method, calibration, budget)
    if recipe == "four-way":
        of_others = {"a budget": budget or None, "--tune": tune or None, "--imatrix": imatrix}
        _refuse(of_others, "other recipes: the four-way recipe has 4 bits, and scales and zero points of its own")
    if len(outputs) > 1:
        _refuse({"a budget": budget or None}, "one output, not for the portable recipe's two")
        of_one = {"--type": type} | ({"--method": method} if recipe == "portable" else {})
        _refuse(of_one, "a GGUF file alone; the portable recipe takes --bits")
        _refuse({"--costs": costs, "--plan": plan}, "one output, not for the portable recipe's two")
        options = PlanOptions(bits, group_size, recipe, tensor_types, keep, dtype, exact, method)
        request = GgufRequest(exact=True, pre=pre, modelfile=modelfile, as_stored=True)
        from mlxq.conversion.to_both import to_both

        return choice.or_rounding(lambda: to_both(job, outputs, options, request, imatrix, calibration, choice))
    of_mlx = {"--bits": bits, "--group-size": group_size, "--recipe": recipe, "--keep": keep or None, "--dtype": dtype}
    of_mlx["--tune"] = tune or None
    if to_file:
        if recipe == "portable":
            raise PlanError("--recipe portable makes an MLX directory first: name that with an --output of its own")
        _refuse(of_mlx, "an MLX directory; a GGUF file takes --type and --tensor-type REGEX=TYPE")
        from mlxq.conversion.to_gguf import to_gguf

        request = GgufRequest(type, tensor_types, imatrix, exact, pre, modelfile, method=method)

        def file(job: Job, known: Known | None = None) -> ConversionResult:
            return to_gguf(job, request, calibration=calibration, budget=budget, known=known, choice=choice)

        result = _made(job, file, choice, budget, calibration, request.beside(job.path) if output else ())
        return _with_plan_kept(result, plan, saved)
    if recipe == "portable":
        del of_gguf["--imatrix"]
    _refuse(of_gguf, "a GGUF file: give --output a name that ends in .gguf")
    options = PlanOptions(bits, group_size, recipe, tensor_types, keep, dtype, exact, method)
    from mlxq.conversion.to_mlx import to_mlx

    def directory(job: Job, known: Known | None = None) -> ConversionResult:
        return to_mlx(job, options, imatrix, calibration, budget, known=known, choice=choice)

    return _with_plan_kept(_made(job, directory, choice, budget, calibration), plan, saved)


def _saved(path: str | os.PathLike[str] | None, to_file: bool, budget: BudgetRequest) -> PlanFile | None:
    """What a file of choices says; None where there is none yet."""
    if path is None or not Path(path).expanduser().exists():
        return None
    from mlxq.conversion.plan_file import GGUF, MLX, PlanFile

    if budget:
        raise PlanError(
            f"{os.fspath(path)}: says already what each matrix gets: leave the budget out, or name a new file"
        )
    saved = PlanFile.read(Path(path).expanduser())
    saved.check_kind(GGUF if to_file else MLX)
    return saved


def _with_plan_kept(
    result: ConversionResult, path: str | os.PathLike[str] | None, saved: PlanFile | None
) -> ConversionResult:
    """The result, when what was chosen is in the file."""
    if path is not None and saved is None:
        from mlxq.conversion.plan_file import write_plan

        write_plan(Path(path).expanduser(), result.plan, result.stored_names)
    return result


def _made(
    job: Job,
    convert: Callable[..., ConversionResult],
    choice: MethodChoice,
    budget: BudgetRequest,
    calibration: CalibrationRequest,
    beside: tuple[str, ...] | None = None,
) -> ConversionResult:
    if budget.kl is None or job.dry_run:
        return choice.or_rounding(lambda: convert(job))
    from mlxq.conversion.to_kl import to_kl

    return to_kl(job, budget.kl, calibration, convert, beside)


@public
def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    tensor_types: str | Sequence[str] = (),
    exact: bool = False,
    pre: str | None = None,
    modelfile: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> ConversionResult:
    """Write a model as a GGUF file, or as GPTQ or AWQ, as it is: quantized tensors keep their codes.

    MLX's 2 to 5 bit codes become Q4_1, Q5_1 or a smaller type that holds them exactly, with the same decoded weights.
    What no ggml type holds exactly (6-bit grids, 8-bit ones with offsets, scales beyond float16) is rounded and said.

    GPTQ and AWQ have integer zero points, which the four-way recipe makes, and every GPTQ or AWQ model has. What
    `mx.quantize` makes has them nearly: they are rounded and that is said; other grids are refused. Embedding and head
    are floats there.

    Args:
        source: an MLX directory (by mlxq or mlx-lm), a Hugging Face directory, a GGUF file, or a Hub id.
        output: the file to make, which ends in `.gguf`, or with `to` the directory; not needed for a dry run.
        to: `gptq` (the version that GPTQModel reads: 1 where zero points are the middle code, else 2), `gptq_v1`
            (version 1 for older loaders) or `awq` (4 bits); None: a GGUF file.
        tensor_types, pre, modelfile: of a GGUF file, as in `convert`.
        exact, revision, overwrite, verify, dry_run, on_plan, progress, cancel: as in `convert`.

    Raises:
        MlxqError: a subclass for each stage; nothing is left at `output` then.
    """
    job = Job(source, output, revision, overwrite, verify, dry_run, on_plan, progress, cancel or CancelToken())
    if to is not None:
        if is_gguf(output):
            raise PlanError(f"{os.fspath(output)}: --to {to} makes a directory; leave --to out for a GGUF file")
        of_gguf = {"--tensor-type": tensor_types or None, "--pre": pre, "--modelfile": modelfile or None}
        _refuse(of_gguf, f"a GGUF file, not for --to {to}")
        from mlxq.conversion.to_packed import to_packed

        return to_packed(job, to, exact=exact)
    if output is not None and not is_gguf(output):
        raise PlanError(
            f"{os.fspath(output)}: an export is a GGUF file: give it a name that ends in {GGUF_SUFFIX}, or say "
            "--to gptq or --to awq"
        )
    from mlxq.conversion.to_gguf import to_gguf

    return to_gguf(job, GgufRequest(None, _patterns(tensor_types), None, exact, pre, modelfile, as_stored=True))


def _patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _refuse(options: dict[str, object], belongs_to: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise PlanError(f"{name} is for {belongs_to}")
