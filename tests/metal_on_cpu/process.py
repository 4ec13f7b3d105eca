"""The worker process as seen from a test: buffers go to it in shared memory, and a time limit holds."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metal_on_cpu import toolchain
from metal_on_cpu.tokens import MslError

_PAGE = 64 << 10  # at least the largest page size of Linux
_CHUNK = 1 << 20
_REPORT = 16 << 20
_FILL = 0xCD


class Worker:
    """One worker process, started when needed and again after a kernel ended it. One launch at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None

    def run(self, library: Path, buffers: Sequence[dict], config: dict, blocks: int, time_limit: float) -> str:
        """Runs a kernel and returns the runtime's report; arrays of outputs are filled in.

        Args:
            library: the kernel's shared library.
            buffers: for each `array` (one-dimensional, contiguous), `kind` and `start`: see the runtime's `MslBuffer`;
                and `parts`, slices of its bytes that go there and back, where the others stay zeros.
            config: fields of the runtime's `MslConfig`.
            blocks: how many blocks count instructions.
            time_limit: seconds of processor time.

        Raises:
            MslError: the worker died or did not answer.
        """
        spans, end = [], 0
        for b in buffers:
            spans.append(end)
            end += max(-(-b["array"].nbytes // _PAGE), 1) * _PAGE
        fd = os.memfd_create("metal_on_cpu")
        try:
            os.ftruncate(fd, end + _REPORT)
            with mmap.mmap(fd, end + _REPORT) as memory:
                return self._run(fd, memory, library, buffers, spans, end, config, blocks, time_limit)
        finally:
            os.close(fd)

    def _run(self, fd, memory, library, buffers, spans, end, config, blocks, time_limit) -> str:
        for b, start in zip(buffers, spans, strict=True):
            nbytes = b["array"].nbytes
            data = b["array"].view(np.uint8)
            for part in b.get("parts", [slice(0, nbytes)]):
                _copy(memory, start + part.start, data[part])
            tail = -nbytes % _PAGE if nbytes else _PAGE
            memory[start + nbytes : start + nbytes + tail] = bytes([_FILL]) * tail
        request = {
            "library": str(library),
            "buffers": [
                (start, b["array"].nbytes, b["start"], b["kind"], b["array"].itemsize)
                for b, start in zip(buffers, spans, strict=True)
            ],
            "config": {**config, "time_limit_ms": int(time_limit * 1000)},
            "blocks": blocks,
            "report": (end, _REPORT),
        }
        length = self._ask(json.dumps(request).encode(), fd, time_limit)
        for b, start in zip(buffers, spans, strict=True):
            if b["kind"] == 1:
                out = np.frombuffer(memory, np.uint8, b["array"].nbytes, start)
                for part in b.get("parts", [slice(None)]):
                    b["array"].view(np.uint8)[part] = out[part]
                del out
        return memory[end : end + length].decode(errors="replace")

    def _ask(self, request: bytes, fd: int, time_limit: float) -> int:
        with self._lock:
            if self._process is None:
                self._start()
            # The runtime ends a run after its processor time; this is for a worker that is stuck outside of a kernel.
            self._socket.settimeout(10 * time_limit + 30)
            try:
                socket.send_fds(self._socket, [request], [fd])
                answer = self._socket.recv(64)
            except TimeoutError:
                self._stop(kill=True)
                raise MslError(f"time limit: the worker did not answer {10 * time_limit + 30:g} s") from None
            except OSError:
                answer = b""
            if not answer:
                raise MslError(f"crash: the kernel ended its process ({self._stop()})")
            length = json.loads(answer)
            if length < 0:
                self._stop()
            return abs(length)

    def _start(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).with_name("worker.py")
        command = [sys.executable, "-E", "-S", str(script), str(toolchain.runtime()), str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._socket = mine

    def _stop(self, kill: bool = False) -> str:
        """Ends the process and says how it ended."""
        if kill:
            self._process.kill()
        self._socket.close()
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._process = self._socket = None
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"status {status}"


def _copy(memory: mmap.mmap, start: int, data: np.ndarray) -> None:
    """Writes bytes; zeros, which the file has already, take no memory."""
    for at in range(0, data.size, _CHUNK):
        chunk = data[at : at + _CHUNK]
        if chunk.any():
            memory[start + at : start + at + chunk.size] = chunk.data


worker = Worker()
