from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.messages import UNKNOWN
from tallystick.protocol.precisions import MAX_PRECISION, gguf_precision, precision_class

SPELLINGS = {
    "bf16": ("BF16", "bfloat16", "torch.bfloat16", "BFloat16", "bf-16", "jnp.bfloat16"),
    "fp16": ("F16", "half", "float16", "torch.float16", "torch.half", "FP-16", "fp 16", "mostly F16"),
    "fp32": ("F32", "float", "float32", "all F32", "single"),
    "fp8": (" FP8 ", "fp8_e4m3", "F8_E4M3", "float8_e4m3fn", "torch.float8_e4m3fn", "float8_e4m3fnuz", "fp8-e4m3", "E4M3", "f8"),
    "fp8_e5m2": ("FP8-E5M2", "float8_e5m2", "F8_E5M2", "e5m2"),
    "fp4": ("FP4", "float4"),
    "int8": ("INT8", "I8", "8bit", "8-bit", "8 bit", "torch.int8"),
    "int4": ("INT4", "i4", "4bit", "4-bit"),
    "q4_k_m": ("Q4_K_M", "q4-k-m", "Q4_K - Medium", "Q4_K Medium", "UD-Q4_K_M", "MOSTLY_Q4_K_M", "gguf-q4_k_m"),
    "q3_k_l": ("Q3_K - Large",),
    "q8_0": ("Q8_0", "q8-0"),
    "iq2_xxs": ("IQ2_XXS - 2.0625 bpw", "UD-IQ2_XXS"),
    "mxfp4": ("MXFP4",),
    "nvfp4": ("NVFP4",),
    "awq": ("AWQ",),
    "w4a16": ("W4A16",),
    UNKNOWN: ("", "Unknown", "x" * 33, "x" * 5_000, "-", "torch.", "auto", "None", "\u00e4" * 17),
}
"""What PyTorch, safetensors, vLLM, SGLang, TGI, llama.cpp, Ollama, LM Studio, MLX and people write for each class."""


@pytest.mark.parametrize(("expected", "declared"), [(name, each) for name, spellings in SPELLINGS.items() for each in spellings])
def test_precisions_that_differ_in_spelling_are_one_class(expected: str, declared: str) -> None:
    """A provider gets no clean record by another spelling, and none that cannot be reported."""
    assert precision_class(declared) == expected
    assert precision_class(expected) == expected


def test_different_products_stay_apart() -> None:
    """Sizes and formats are never taken for each other."""
    others = (
        "q4_0",
        "q4_1",
        "q4_k_s",
        "q4_k_xl",
        "iq4_xs",
        "q5_k_m",
        "q6_k",
        "tq1_0",
        "fp6",
        "nf4",
        "gptq",
        "int4_awq",
        "fp64",
        "uint8",
    )
    classes = [precision_class(name) for name in (*SPELLINGS, *others)]
    assert len(set(classes)) == len(classes)


_PIECES = (
    *(each for spellings in SPELLINGS.values() for each in spellings if len(each) < 33),
    *("torch.", "gguf_", "all_", "ud_", "_", "-", " ", "_2.5_bpw", "_k_medium", "e4m3", "8", "q4", "."),
)


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(_PIECES), max_size=6).map("".join)))
def test_a_class_is_its_own_class(declared: str) -> None:
    """Whatever a provider declares: a report names the class, and is refused if its class were another."""
    name = precision_class(declared)
    assert precision_class(name) == name
    assert 0 < len(name.encode()) <= MAX_PRECISION


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
