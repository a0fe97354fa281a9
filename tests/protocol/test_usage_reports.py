from __future__ import annotations

from typing import Any

import pytest

from tallystick.protocol.usage_reports import ReportedUsage, find_usage, read_usage

OPENAI = {"prompt_tokens": 20, "completion_tokens": 5}


@pytest.mark.parametrize(
    ("document", "counts"),
    [
        ({"usage": OPENAI}, (20, 0, 5)),
        ({"choices": [{"index": 0, "usage": OPENAI}]}, (20, 0, 5)),
        ({"usage": None, "x_groq": {"usage": OPENAI}}, (20, 0, 5)),
        ({"usage": {"prompt_tokens": 0, "completion_tokens": 0}, "x_groq": {"usage": OPENAI}}, (20, 0, 5)),
        ({"response": {"usage": {"input_tokens": 20, "output_tokens": 5}}}, (20, 0, 5)),
        ({"message": {"usage": {"input_tokens": 20, "output_tokens": 5}}}, (20, 0, 5)),
        ({"meta": {"tokens": {"input_tokens": 20, "output_tokens": 5}}}, (20, 0, 5)),
        ({"usage": {"tokens": {"input_tokens": 20, "output_tokens": 5}}}, (20, 0, 5)),
        ({"usageMetadata": {"promptTokenCount": 20, "candidatesTokenCount": 5, "totalTokenCount": 32}}, (20, 0, 12)),
        ({"prompt_eval_count": 20, "eval_count": 5}, (20, 0, 5)),
        ({"timings": {"prompt_n": 8, "cache_n": 12, "predicted_n": 5}}, (20, 12, 5)),
        ({"timings": {"predicted_n": -1}}, None),
        ({"choices": [{"delta": {"usage": OPENAI}}]}, (20, 0, 5)),
        ({"usage": {"billed_units": {"input_tokens": 20, "output_tokens": 5}}}, (20, 0, 5)),
        ({"usage": {"inputTokens": 20, "outputTokens": 5, "totalTokens": 25}}, (20, 0, 5)),
        ({"choices": [{"delta": None}, {"delta": []}]}, None),
        ({"choices": "x", "message": 7, "meta": []}, None),
    ],
)
def test_usage_is_found_wherever_it_stands(document: dict[str, Any], counts: tuple[int, int, int] | None) -> None:
    """Each place that an engine uses is read, and a place without counts hides no other."""
    assert find_usage(document) == (None if counts is None else ReportedUsage(*counts))


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        (OPENAI | {"prompt_cache_hit_tokens": 15, "prompt_cache_miss_tokens": 5}, (20, 15, 5)),
        (OPENAI | {"cached_tokens": 15}, (20, 15, 5)),
        (OPENAI | {"prompt_tokens_details": {"cached_tokens": 15}}, (20, 15, 5)),
        (OPENAI | {"cache_read_input_tokens": 15}, (20, 15, 5)),
        ({"input_tokens": 20, "output_tokens": 5, "cache_read_input_tokens": 15}, (35, 15, 5)),
        ({"input_tokens": 20, "output_tokens": 5, "cache_read_input_tokens": 15, "cache_creation_input_tokens": 3}, (38, 15, 5)),
        ({"input_tokens": 20, "output_tokens": 5, "cache_read_input_tokens": 15, "total_tokens": 25}, (20, 15, 5)),
        ({"input_tokens": 20, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 15}}, (20, 15, 5)),
        ({"output_tokens": 9}, (None, 0, 9)),
        ({"prompt_tokens": 12, "completion_tokens": None, "total_tokens": None}, (12, 0, None)),
        ({"prompt_tokens": 12, "completion_tokens": None, "total_tokens": 12}, (12, 0, None)),
        ({"prompt_tokens": 12, "completion_tokens": None, "total_tokens": 16}, (12, 0, 4)),
        ({"prompt_tokens": None, "completion_tokens": 4}, (None, 0, 4)),
        ({"prompt_tokens": 12}, (12, 0, None)),
        ({"prompt_tokens": 21, "completion_tokens": 5, "total_tokens": 86}, (21, 0, 65)),
        ({"prompt_tokens": 21, "completion_tokens": 5, "total_tokens": 20}, (21, 0, 5)),
        ({"prompt_tokens": 3.0, "completion_tokens": 4.0}, (3, 0, 4)),
        ({"prompt_tokens": "3", "completion_tokens": "4"}, (3, 0, 4)),
        ({"prompt_tokens": "3x", "completion_tokens": 4}, None),
        ({"prompt_tokens": "-3", "completion_tokens": 4}, None),
        ({"prompt_tokens": "9" * 13, "completion_tokens": 4}, None),
        ({"completion_tokens": 4, "total_tokens": 16}, (12, 0, 4)),
        ({"completion_tokens": 4, "total_tokens": 3}, (0, 0, 4)),
        ({"completion_tokens": None, "total_tokens": 3}, (None, 0, None)),
        ({"prompt_tokens": 3.5, "completion_tokens": 4}, None),
        ({"prompt_tokens": 3, "completion_tokens": -4}, None),
        ({"total_tokens": 7}, (7, 0, 0)),
    ],
)
def test_counts_mean_what_their_engine_means(usage: dict[str, Any], counts: tuple[int | None, int, int | None] | None) -> None:
    """Cached input is part of the input, reasoning is part of the output, and a missing count is not zero."""
    assert read_usage(usage) == (None if counts is None else ReportedUsage(*counts))


def test_later_reports_complete_earlier_ones() -> None:
    """A message reports its input first and its output last; zeros and missing counts replace nothing."""
    first = ReportedUsage(25, 10, 1)
    assert first.updated(ReportedUsage(None, 0, 9)) == ReportedUsage(25, 10, 9)
    assert first.updated(ReportedUsage(0, 0, 0)) == first.updated(None) == first
    assert ReportedUsage(None, 0, None).updated(ReportedUsage(0, 0, 0)) == ReportedUsage(0, 0, 0)
    assert ReportedUsage(0, 0, 0).is_empty
    assert not ReportedUsage(0, 0, 1).is_empty
