"""Starts llama.cpp's own server from the xllamacpp wheel: MODEL PORT [embedding]. Runs under that wheel's Python."""

import sys
import threading

import xllamacpp  # type: ignore[import-not-found]

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 1_024, 2, 1
params.endpoint_metrics = params.endpoint_slots = params.use_jinja = True
if "embedding" in sys.argv:
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
threading.Event().wait()
