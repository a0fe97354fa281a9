"""Serves one model with llama.cpp's own server. A script that runs without this project's packages:

embedded_server.py FOLDER MODEL_FILE MODEL_NAME HOST PORT
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from threading import Thread
from urllib.parse import urlsplit

CONTEXT_TOKENS = 4_096
"""The context of each slot, in tokens."""
SLOTS = 2
MAX_THREADS = 8


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    folder, model_file, model_name, host, port = sys.argv[1:]
    sys.path.insert(0, folder)
    import xllamacpp  # type: ignore[import-not-found]  # noqa: PLC0415 - installed only in that folder

    stop_signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(
        signal.SIG_BLOCK, stop_signals
    )  # inherited by the server's threads, so that this thread gets the signal
    params = xllamacpp.CommonParams()
    params.model.path = model_file
    params.model_alias = {model_name}
    params.hostnames = [host]
    params.port = int(port)
    params.n_parallel = SLOTS
    params.n_ctx = CONTEXT_TOKENS * SLOTS
    params.cpuparams.n_threads = min(MAX_THREADS, _usable_cores())
    params.use_jinja = True
    params.endpoint_metrics = True
    params.ui = False
    _check_port(host, int(port))
    server = xllamacpp.Server(params)
    print(f"llama.cpp serves {model_name} at {server.listening_address}/v1", flush=True)  # noqa: T201 - the script's output
    _report_to_parent(urlsplit(server.listening_address).port or 0)
    signal.sigwait(stop_signals)
    os._exit(0)  # the server's destructor would wait for open connections


def _usable_cores() -> int:
    """The cores that this process may run on. More threads than cores would wait for each other all the time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_port(host: str, port: int) -> None:
    """Ends the script with a message if it cannot listen: the server's own error does not name the port."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        sys.exit(f"error: cannot listen on {host} port {port}: {error}; choose another port with --port")


def _report_to_parent(port: int) -> None:
    """The child's side of tallystick/runtime/supervision.py, which cannot be imported here."""
    descriptor = os.environ.pop("TALLYSTICK_PARENT_SOCKET", "")
    if not descriptor.isdecimal():
        return
    link = socket.socket(fileno=int(descriptor))
    link.sendall(json.dumps({"pid": os.getpid(), "port": port}).encode() + b"\n")

    def end_with_parent() -> None:
        while link.recv(200):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=end_with_parent, daemon=True).start()


if __name__ == "__main__":
    main()
