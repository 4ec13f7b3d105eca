"""A process that runs kernels, so that one which crashes takes nobody with it: `worker.py RUNTIME FD`.

It reads requests from the socket FD: a JSON object, and the descriptor of a file that holds the buffers and, after
them, room for the report. The standard library alone is imported, so that starting takes some milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import socket
import sys


class Buffer(ctypes.Structure):
    """`MslBuffer` of the runtime."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("offset", "nbytes", "start")),
        *((name, ctypes.c_int32) for name in ("kind", "itemsize")),
    )


class Config(ctypes.Structure):
    """`MslConfig` of the runtime."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        *(
            (name, ctypes.c_uint32)
            for name in ("nbuffers", "check", "order", "flush_denormals", "keep_going", "threadgroup_limit")
        ),
        *((name, ctypes.c_uint32) for name in ("initialized", "time_limit_ms")),
        *((name, ctypes.c_uint64) for name in ("seed", "first_threadgroup", "n_threadgroups")),
    )


def launch(runtime: ctypes.CDLL, kernel: ctypes.CDLL, request: dict, fd: int) -> int:
    """Runs one request and returns what `msl_run` does: the report's length, negative after a crash."""
    buffers = [Buffer(*b) for b in request["buffers"]]
    config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in request["config"].items()})
    config.nbuffers = len(buffers)
    start, capacity = request["report"]
    with mmap.mmap(fd, capacity, offset=start) as out:
        text = (ctypes.c_char * capacity).from_buffer(out)
        array = (Buffer * len(buffers))(*buffers)
        entry = ctypes.cast(kernel.__msl_entry, ctypes.c_void_p)
        try:
            return runtime.msl_run(
                entry,
                ctypes.byref(config),
                fd,
                array,
                ctypes.c_uint32(request["blocks"]),
                text,
                ctypes.c_uint64(capacity),
            )
        finally:
            del text


def main() -> None:
    """Serves requests until the socket closes, or until a kernel left the process in doubt."""
    runtime = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    runtime.msl_run.restype = ctypes.c_int64
    kernels: dict[str, ctypes.CDLL] = {}
    with socket.socket(fileno=int(sys.argv[2])) as connection:
        while True:
            message, fds, _, _ = socket.recv_fds(connection, 1 << 17, 1)
            if not message:
                return
            request = json.loads(message)
            library = request["library"]
            if library not in kernels:
                kernels[library] = ctypes.CDLL(library)
            with open(fds[0], "r+b", buffering=0):
                result = launch(runtime, kernels[library], request, fds[0])
            connection.sendall(json.dumps(result).encode())
            if result < 0:
                return


if __name__ == "__main__":
    main()
