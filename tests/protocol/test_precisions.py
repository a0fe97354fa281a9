from __future__ import annotations

import pytest

from tallystick.protocol.messages import UNKNOWN
from tallystick.protocol.precisions import gguf_precision, precision_class


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("fp8", "fp8"),
        (" FP8 ", "fp8"),
        ("", UNKNOWN),
        ("x" * 33, UNKNOWN),
        ("bfloat16", "bf16"),
        ("BF16", "bf16"),
        ("float16", "fp16"),
        ("F16", "fp16"),
        ("half", "fp16"),
        ("Q4_K_M", "q4_k_m"),
        ("unknown", UNKNOWN),
    ],
)
def test_precisions_that_differ_in_spelling_are_one_class(declared: str, expected: str) -> None:
    """A provider gets no clean record by another spelling, and none that cannot be reported."""
    assert precision_class(declared) == expected
    assert precision_class(expected) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/models/SmolLM2-135M-Instruct.Q4_1.gguf", "q4_1"),
        ("Mixtral-8x7B-v0.1-KQ2.gguf", UNKNOWN),
        ("Hermes-2-Pro-Llama-3-8B-F16.gguf", "fp16"),
        ("Grok-100B-v1.0-Q4_0-00003-of-00009.gguf", "q4_0"),
        ("llama-3-8b-iq2_xxs.GGUF", "iq2_xxs"),
        ("C:\\models\\qwen3-32b-UD-Q4_K_XL.gguf", "q4_k_xl"),
        ("gpt-oss-20b-mxfp4.gguf", "mxfp4"),
        ("model-BF16.gguf", "bf16"),
        ("q4_0-folder/model.gguf", UNKNOWN),
        ("model.gguf", UNKNOWN),
        ("", UNKNOWN),
        ("x" * 5_000, UNKNOWN),
    ],
)
def test_names_of_gguf_files(path: str, expected: str) -> None:
    """The encoding of ggml's naming convention, wherever it stands after the model's name."""
    assert gguf_precision(path) == expected
