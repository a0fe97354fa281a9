"""Precision classes: the products that providers sell of a model, which are compared and audited within their class. Pure."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from tallystick.protocol.messages import UNKNOWN

MAX_PRECISION: Final = 32
"""Bytes of a class's name."""
_SPELLINGS: Final = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "f16": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "f32": "fp32",
}
"""Names that mean the same: those of PyTorch's types, and those in names of GGUF files."""
_GGUF_ENCODING: Final = re.compile(r"[-._](I?Q\d\w*|TQ\d_\d|BF16|F16|F32|FP16|FP32|MXFP4\w*)(?=[-.]|$)", re.IGNORECASE)


@lru_cache(1_024)
def precision_class(declared: str) -> str:
    """The class of a declared precision: products that differ in spelling alone are one."""
    precision = declared.strip().lower()
    precision = _SPELLINGS.get(precision, precision)
    return precision if 0 < len(precision.encode()) <= MAX_PRECISION else UNKNOWN


def gguf_precision(path: str) -> str:
    """The precision in the name of a GGUF file, such as "q4_k_m" of model-7B-Q4_K_M-00001-of-00002.gguf; unknown without one.

    Source: ggml's docs/gguf.md, "GGUF Naming Convention".
    """
    name = re.split(r"[/\\]", path)[-1]
    found = _GGUF_ENCODING.findall(re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE))
    return precision_class(found[-1]) if found else UNKNOWN
