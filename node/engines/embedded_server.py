"""Serves one model with llama.cpp's own server. A script that runs without this project's packages:

embedded_server.py FOLDER MODEL_FILE MODEL_NAME HOST PORT
"""

from __future__ import annotations

import os
import signal
import sys

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
    params.cpuparams.n_threads = min(MAX_THREADS, os.cpu_count() or 1)
    params.use_jinja = True
    params.endpoint_metrics = True
    params.ui = False
    server = xllamacpp.Server(params)
    print(f"llama.cpp serves {model_name} at {server.listening_address}/v1", flush=True)  # noqa: T201 - the script's output
    signal.sigwait(stop_signals)
    os._exit(0)  # the server's destructor would wait for open connections


if __name__ == "__main__":
    main()
