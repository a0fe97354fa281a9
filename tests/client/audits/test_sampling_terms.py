from __future__ import annotations

from typing import Any

import pytest

from tallystick.client.audits.sampling_terms import SamplingTerms, read_sampling


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, SamplingTerms(None)),
        ({"temperature": None}, SamplingTerms(None)),
        ({"temperature": 0}, SamplingTerms(0.0, independent=True)),
        ({"temperature": 0.7}, SamplingTerms(0.7, independent=True)),
        ({"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0}, SamplingTerms(1.0, untruncated=True, independent=True)),
        ({"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0.0}, SamplingTerms(1.0, untruncated=True, independent=True)),
        ({"temperature": 1, "top_p": 1}, SamplingTerms(1.0, independent=True)),
        ({"temperature": 1, "top_k": 1}, SamplingTerms(1.0)),
        ({"temperature": 1, "top_p": 0.1}, SamplingTerms(1.0)),
        ({"temperature": 1, "min_p": 0.5}, SamplingTerms(1.0)),
        ({"temperature": 1, "seed": 3}, SamplingTerms(1.0)),
        ({"temperature": True}, SamplingTerms(None)),
        ({"temperature": "1"}, SamplingTerms(None)),
        ({"temperature": -1}, SamplingTerms(None)),
        ({"temperature": 1e9}, SamplingTerms(None)),
        ({"temperature": 10**400}, SamplingTerms(None)),
        ({"temperature": -(10**400)}, SamplingTerms(None)),
        ({"temperature": float("nan")}, SamplingTerms(None)),
        ({"temperature": float("inf")}, SamplingTerms(None)),
        ({"temperature": 1, "top_k": 10**400, "top_p": 10**400}, SamplingTerms(1.0, independent=True)),
        (
            {"temperature": 1, "n": 1, "logit_bias": {}, "presence_penalty": 0, "stop": ["x"]},
            SamplingTerms(1.0, independent=True),
        ),
    ],
)
def test_what_a_request_declares(request_: dict[str, Any], expected: SamplingTerms) -> None:
    """Only what it says counts: engines' defaults differ."""
    assert read_sampling({"model": "m", "messages": []} | request_) == expected


@pytest.mark.parametrize(
    "member",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {"50256": -100}},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"n": 2},
        {"guided_json": {}},
        {"grammar": "root ::= x"},
        {"mirostat": 2},
        {"xtc_probability": 0.5},
        {"unheard_of": 1},
    ],
)
def test_what_may_change_the_drawing_forbids_the_test(member: dict[str, Any]) -> None:
    """Also members that no release knew."""
    assert read_sampling({"model": "m", "messages": [], "temperature": 1} | member) == SamplingTerms(None)
