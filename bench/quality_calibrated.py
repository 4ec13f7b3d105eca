"""What calibration is worth: divergence from the float model beside the peers' at like sizes, as a Markdown table.

    python bench/quality_calibrated.py CHECKPOINT [--text FILE|python] [--calib head|builtin|FILE] [--only ROW ...]
    python bench/quality_calibrated.py MODEL.gguf --width 576 --seed 2 ...

A GGUF file is SmolLM2's, from which a float checkpoint is made (`make_reference.py`). All calibrate on the same text,
64 sequences of 512 tokens, and are measured by one evaluator on the last 12 x 512 tokens of the text, second half of
each sequence. Calibration text is the first 300 kB of that text (`head`), of another file, or the built-in sample.
`python` is the source of the standard library. Every conversion is a process of its own, whose time and peak memory are
shown.

The importance matrix that llama.cpp's quantizer gets is ours (its own tool sums the same squares). mlx-lm's GPTQ takes
minutes and gigabytes: it runs with --with-gptq. Each row is kept in SCRATCH/results.json as soon as it is measured, so
that an interrupted run goes on; --again measures it anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
from gguf_files import ours
from measure import run

import mlxq

HERE = Path(__file__).parent
_HEAD, _TEXT = 300_000, 1_200_000  # bytes
_SEQUENCES, _LENGTH = 64, 512


@dataclass(frozen=True)
class Row:
    """A line of the table: `make` gives the command that converts; the bar is a ratio to another row, or a KL."""

    key: str
    name: str
    make: Callable[[Bench, Path], list[str]]
    peer: str | None = None
    bar: float = math.nan
    kl: float = math.nan
    suffix: str = ""


@dataclass(frozen=True)
class Figures:
    """What was measured of a row: `seconds` and `peak_mb` of the conversion alone."""

    bpw: float
    kl: float
    kl_se: float
    changed: float
    perplexity: float
    seconds: float
    peak_mb: float


def _mlx_lm(bench: Bench, out: Path) -> list[str]:
    return [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(bench.checkpoint), "--mlx-path", str(out), "-q"]


def _mlx_lm_gptq(bench: Bench, out: Path) -> list[str]:
    home = bench.scratch / "home"  # where mlx-lm finds a calibration text
    (home / ".cache" / "mlx-lm").mkdir(parents=True, exist_ok=True)
    shutil.copy(bench.calibration_file(), home / ".cache" / "mlx-lm" / "calibration_v5.txt")
    options = ["--num-samples", str(bench.sequences), "--sequence-length", str(bench.length), "--mlx-path", str(out)]
    code = "from mlx_lm.quant.gptq import main; main()"
    return ["env", f"HOME={home}", sys.executable, "-c", code, "--model", str(bench.checkpoint), *options]


def _llama_cpp(file_type: str) -> Callable[[Bench, Path], list[str]]:
    def make(bench: Bench, out: Path) -> list[str]:
        return [
            sys.executable,
            str(HERE / "peer_gguf.py"),
            *map(str, (bench.original(), out, file_type, bench.matrix())),
        ]

    return make


def _ours(*options: str, costs: bool = True) -> Callable[[Bench, Path], list[str]]:
    def make(bench: Bench, out: Path) -> list[str]:
        measured = ["--costs", str(bench.costs())] if costs else []
        return bench.mlxq("convert", "-o", out, "--no-verify", *bench.calibration(), *options, *measured)

    return make


def _budget(bpw: float, peer: str, bar: float, kl: float = math.nan) -> Row:
    return Row(f"{bpw:g}", f"mlxq `--target-bpw {bpw:g}`", _ours("--target-bpw", f"{bpw:g}"), peer, bar, kl)


def _blocks(file_type: str, bar: float) -> list[Row]:
    peer = f"llama-{file_type}"
    make = _ours("--type", file_type, "--method", "gptq")
    return [
        Row(peer, f"llama.cpp {file_type}, importance matrix", _llama_cpp(file_type), suffix=".gguf"),
        Row(file_type, f"mlxq `--type {file_type} --method gptq`", make, peer, bar, suffix=".gguf"),
    ]


#: Bars: KL over the peer's in the same run; at 6 bits KL itself.
ROWS = [
    Row("mlx-lm", "mlx-lm's default, 4 bits, groups of 64", _mlx_lm),
    Row("mlx-lm-gptq", "mlx-lm's GPTQ, 4 bits, groups of 64", _mlx_lm_gptq),
    *_blocks("Q4_K_M", 0.6),
    *_blocks("Q3_K_M", 0.5),
    *_blocks("Q2_K", 0.4),
    _budget(6.0, "mlx-lm", math.nan, 0.005),
    _budget(5.0, "llama-Q4_K_M", 0.43),
    _budget(4.5, "mlx-lm", 0.065),
    _budget(4.0, "llama-Q3_K_M", 0.18),
    _budget(3.5, "llama-Q2_K", 0.21),
    Row("search", "mlxq `--method search`, 4 bits", _ours("--bits", "4", "--method", "search", costs=False), "mlx-lm"),
    Row("gptq", "mlxq `--method gptq`, 4 bits", _ours("--bits", "4", "--method", "gptq", costs=False), "mlx-lm"),
]


class Bench:
    """Checkpoint, texts and what was measured before; what several rows need is made once."""

    def __init__(self, args: argparse.Namespace):
        self.scratch: Path = args.scratch
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.sequences, self.length, self.measured_sequences = args.sequences, args.length, args.measured
        self.checkpoint = self._reference(args) if args.model.suffix == ".gguf" else args.model.resolve()
        self.text = self._python() if args.text == "python" else Path(args.text)
        self.calib = args.calib
        settings = [str(self.checkpoint), self._named(args.text), self._named(args.calib), self.sequences, self.length]
        #: Results of other models and texts lie beside them in the file.
        self.settings = json.dumps([*settings, self.measured_sequences])
        self._file = self.scratch / "results.json"
        self._known = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.results = {k: Figures(**v) for k, v in self._known.get(self.settings, {}).items()}

    def mlxq(self, command: str, *arguments: object) -> list[str]:
        """A command on the checkpoint."""
        executable = Path(sys.executable).with_name("mlxq")
        return [*map(str, (executable, command, self.checkpoint, *arguments))]

    def calibration_file(self) -> Path:
        """The text as a file of at most 300 kB."""
        if self.calib == "builtin":
            from mlxq.calibration import builtin

            content = b"".join(d.raw for d in builtin.documents())
        else:
            content = (self.text if self.calib == "head" else Path(self.calib)).read_bytes()[:_HEAD]
        out = self.scratch / "calibration.txt"
        out.write_text(content.decode(errors="ignore"))
        return out

    def calibration(self) -> list[str]:
        source = "builtin" if self.calib == "builtin" else str(self.calibration_file())
        numbers = ["--calib-sequences", str(self.sequences), "--calib-length", str(self.length)]
        return ["--calib", source, *numbers]

    def original(self) -> Path:
        """The checkpoint as a GGUF file of bfloat16, which llama.cpp quantizes."""
        return self._once("original.gguf", lambda out: ours(self.checkpoint, out, "BF16"), "a GGUF file")

    def matrix(self) -> Path:
        return self._once("imatrix.gguf", lambda out: self.mlxq("imatrix", out, *self.calibration()), "importance")

    def costs(self) -> Path:
        """What bits cost, measured once for all budgets."""

        def make(out: Path) -> list[str]:
            return self.mlxq("convert", "--dry-run", "--target-bpw", 8, "--costs", out, *self.calibration())

        return self._once("costs.npz", make, "costs of bits")

    def measure(self, row: Row) -> Figures:
        """Convert, evaluate, remember."""
        out = self.scratch / f"result{row.suffix}"
        _remove(out)
        took = run(row.make(self, out))
        q = mlxq.evaluate_model(
            out,
            reference=self.checkpoint,
            text=self.text,
            sequences=self.measured_sequences,
            length=self.length,
            from_end=True,
        )
        kl, changed = q.kl_mean, 1 - q.agreement.value
        figures = Figures(q.bpw, kl.value, kl.se, changed, q.perplexity.value, took.seconds, took.peak_mb)
        self.results[row.key] = figures
        self._known.setdefault(self.settings, {})[row.key] = asdict(figures)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._known, indent=1) + "\n")
        os.replace(temporary, self._file)
        mx.clear_cache()
        _remove(out)
        return figures

    def _once(self, name: str, command: Callable[[Path], list[str]], what: str) -> Path:
        """A file that several rows need; one made under other settings is made again."""
        out, mark = self.scratch / name, self.scratch / f"{name}.settings"
        if out.exists() and mark.exists() and mark.read_text() == self.settings:
            return out
        _remove(out)
        took = run(command(out))
        mark.write_text(self.settings)
        print(f"<!-- {what}, made once: {took.seconds:.0f} s, {took.peak_mb:.0f} MB -->", flush=True)
        return out

    def _reference(self, args: argparse.Namespace) -> Path:
        out = (self.scratch / f"reference-{args.width}-{args.seed}").resolve()
        options = ["--width", str(args.width), "--seed", str(args.seed)]
        run([sys.executable, str(HERE / "make_reference.py"), str(args.model), str(out), *options])
        return out

    def _python(self) -> Path:
        """Source of the standard library, in the order of names, as long as the usual texts."""
        out, content = self.scratch / "python.txt", b""
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            content += path.read_bytes() if len(content) < _TEXT else b""
        out.write_text(content[:_TEXT].decode(errors="ignore"))
        return out

    @staticmethod
    def _named(text: str) -> str:
        return text if text in ("python", "head", "builtin") else str(Path(text).resolve())


def _remove(path: Path) -> None:
    """A result of either form, with what stands beside a file."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    path.with_name(f"{path.stem}.mlxq.json").unlink(missing_ok=True)


def _line(row: Row, f: Figures, results: dict[str, Figures]) -> str:
    peer = results.get(row.peer or "")
    ratio, bar = "", ""
    if row.peer:
        ratio = f"{f.kl / peer.kl:.3f} x {row.peer}" if peer else f"{row.peer} was not measured"
    if not math.isnan(row.kl):
        bar = f"{row.kl:g}: {'met' if f.kl <= row.kl else 'not met'}"
    elif not math.isnan(row.bar):
        bar = f"{row.bar:g} x"
        if peer:
            bar += ": met" if f.kl <= row.bar * peer.kl else ": not met"
    figures = [f"{f.bpw:.2f}", f"{f.kl:.4f} ± {f.kl_se:.4f}", ratio, bar, f"{100 * f.changed:.1f} %"]
    return f"| {' | '.join([row.name, *figures, f'{f.perplexity:.2f}', f'{f.seconds:.0f}', f'{f.peak_mb:.0f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a float checkpoint, or SmolLM2's GGUF file")
    parser.add_argument("--text", default="python", help="a file, or python")
    parser.add_argument("--calib", default="head", help="head, builtin, or a file")
    parser.add_argument("--only", nargs="+", choices=[r.key for r in ROWS], metavar="ROW", help="of: %(choices)s")
    parser.add_argument("--with-gptq", action="store_true", help="also mlx-lm's GPTQ")
    parser.add_argument("--width", type=int, default=768, choices=(576, 768))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=_SEQUENCES, help="of the calibration text")
    parser.add_argument("--length", type=int, default=_LENGTH, help="tokens of a sequence")
    parser.add_argument("--measured", type=int, default=12, help="sequences that are measured")
    parser.add_argument("--scratch", type=Path, default=Path(".cache/quality"), help="results and what is made once")
    parser.add_argument("--again", action="store_true", help="measure rows that were measured before")
    args = parser.parse_args()
    bench = Bench(args)
    rows = [r for r in ROWS if (r.key in args.only if args.only else r.key != "mlx-lm-gptq" or args.with_gptq)]
    print("| result | bpw | KL, nats per token | beside a peer | bar | top-1 changed | perplexity | s | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for row in rows:
        known = None if args.again else bench.results.get(row.key)
        print(_line(row, known or bench.measure(row), bench.results), flush=True)


if __name__ == "__main__":
    main()
