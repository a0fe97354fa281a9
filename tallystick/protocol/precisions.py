"""Precision classes: the products that providers sell of a model, which are compared and audited within their class. Pure."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from tallystick.protocol.messages import UNKNOWN

MAX_PRECISION: Final = 32
"""Bytes of a class's name."""
_PREFIXES: Final = re.compile(r"^(?:torch\.|jnp\.|gguf_|mostly_|all_|ud_(?=i?q\d))+")
"""What stands before a precision and says nothing of it: PyTorch's and JAX's modules, llama.cpp's file types, Unsloth's files."""
_K_SIZES: Final = re.compile(r"(_k)_(small|medium|large)$")
"""As llama.cpp prints the type of a file: "Q4_K - Medium"."""
_BITS_PER_WEIGHT: Final = re.compile(r"_[\d.]+_bpw$")
_SIZED: Final = re.compile(r"(bfloat|float|bf|fp|f|int|i)_?(\d+)((?:_?e\dm\d\w*)?)")
_MOST_STEPS: Final = 8
_SIZED_NAMES: Final = {"bfloat": "bf", "float": "fp", "f": "fp", "i": "int"}
_SPELLINGS: Final = {
    "half": "fp16",
    "float": "fp32",
    "single": "fp32",
    "full": "fp32",
    "double": "fp64",
    "e4m3": "fp8",
    "e5m2": "fp8_e5m2",
    "4bit": "int4",
    "8bit": "int8",
    "4_bit": "int4",
    "8_bit": "int8",
    "auto": UNKNOWN,
    "default": UNKNOWN,
    "none": UNKNOWN,
}
"""Other names: PyTorch's, those of MLX and of Hugging Face's repositories, and settings that say nothing."""
_GGUF_ENCODING: Final = re.compile(r"[-._](I?Q\d\w*|TQ\d_\d|BF16|F16|F32|FP16|FP32|MXFP4\w*)(?=[-.]|$)", re.IGNORECASE)


@lru_cache(1_024)
def precision_class(declared: str) -> str:
    """The class of a declared precision: products that differ in spelling alone are one.

    It reads the names of PyTorch (`torch.bfloat16`), safetensors (`F8_E4M3`), vLLM, SGLang and TGI (`half`, `fp8_e4m3`), GGUF as
    files, llama.cpp and Ollama write it (`Q4_K_M`, `Q4_K - Medium`, `F16`), and MLX (`4bit`). FP8 is E4M3 if no more is said.
    """
    precision = declared.lower() if len(declared) <= 4 * MAX_PRECISION else ""
    for _ in range(_MOST_STEPS):
        reduced = _reduced(precision)
        if reduced == precision:
            return precision if 0 < len(precision.encode()) <= MAX_PRECISION else UNKNOWN
        precision = reduced
    return UNKNOWN


def _reduced(precision: str) -> str:
    """The precision without one layer of what says nothing. The class is what it leaves as it is, so a class is its own class."""
    precision = _PREFIXES.sub("", re.sub(r"[\s_-]+", "_", precision).strip("_"))
    precision = _BITS_PER_WEIGHT.sub("", precision)
    precision = _K_SIZES.sub(lambda match: f"{match[1]}_{match[2][0]}", precision)
    sized = _SIZED.fullmatch(precision)
    if sized is not None:
        kind, bits, exponent = sized.groups()
        exponent = exponent.strip("_")
        precision = _SIZED_NAMES.get(kind, kind) + bits + (f"_{exponent}" if exponent and not exponent.startswith("e4m3") else "")
    return _SPELLINGS.get(precision, precision)


def gguf_precision(path: str) -> str:
    """The precision in the name of a GGUF file, such as "q4_k_m" of model-7B-Q4_K_M-00001-of-00002.gguf; unknown without one.

    Source: ggml's docs/gguf.md, "GGUF Naming Convention".
    """
    name = re.split(r"[/\\]", path)[-1]
    found = _GGUF_ENCODING.findall(re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE))
    return precision_class(found[-1]) if found else UNKNOWN
