"""The lines of output and error files."""

from __future__ import annotations

import json

import pytest

from tallystick.client.batches.output_lines import (
    MAX_ERROR_BODY,
    UNANSWERED,
    answered_line,
    longest_unanswered,
    unanswered_line,
)
from tallystick.client.batches.ports import LineAnswer


@pytest.mark.parametrize("custom_id", ["a", "\u0001" * 512, "\U0001f600" * 512, "\ud800", '"' * 512])
@pytest.mark.parametrize("code", UNANSWERED)
def test_no_line_without_an_answer_is_longer_than_its_place(custom_id: str, code: str) -> None:
    """The place that is kept for a line is enough for each way not to be answered, whatever its id has."""
    line = unanswered_line("batch_" + "0" * 32, 50_000, custom_id, code)
    assert len(line) <= longest_unanswered("batch_" + "0" * 32, 50_000, custom_id) < len(line) + 300
    assert json.loads(line)["error"]["code"] == code


def test_long_errors_are_cut() -> None:
    """The body of an error is kept up to a bound, as text; an answer is kept whole."""
    long = json.dumps({"text": "x" * MAX_ERROR_BODY}).encode()
    error = json.loads(answered_line("b", 1, "a", LineAnswer(400, "r", long)))
    assert error["response"]["body"] == long[:MAX_ERROR_BODY].decode()
    answer = json.loads(answered_line("b", 1, "a", LineAnswer(200, "r", long)))
    assert answer["response"]["body"] == json.loads(long)
