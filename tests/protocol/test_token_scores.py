from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.token_evidence import MAX_TOKEN_ID
from tallystick.protocol.token_scores import (
    LEAST_LOGPROB,
    MAX_POSITIONS,
    MAX_TOKENS,
    MAX_TOP,
    ScoreRequest,
    ScoreResponse,
    ScoreRow,
)

MESSAGES = [{"role": "user", "content": "Hi"}]
REQUEST = ScoreRequest("m", {"messages": MESSAGES}, (5, 6, 7), (0, 2, 3), 4)
ROWS = (
    ScoreRow.of(0, 5, {5: -0.5, 9: -1.5}, 4),
    None,
    ScoreRow.of(3, None, {2: -0.25, 9: -3.0}, 4),
)
RESPONSE = ScoreResponse("m", 11, (5, 6, 7), ROWS, -7.5)


def test_both_messages_survive_the_wire() -> None:
    """Request and answer are read as they were written; all tokens that were read count as input."""
    assert ScoreRequest.from_json(json.loads(json.dumps(REQUEST.to_json()))) == REQUEST
    document = json.loads(json.dumps(RESPONSE.to_json()))
    assert ScoreResponse.from_json(document, REQUEST) == RESPONSE
    assert document["usage"] == {"prompt_tokens": 14, "completion_tokens": 0, "total_tokens": 14}


def test_a_request_is_made_of_the_audited_one() -> None:
    """It takes over what decides the prompt, and nothing that would tell how the answer was drawn."""
    audited = {
        "model": "m",
        "messages": MESSAGES,
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "temperature": 0.3,
        "seed": 7,
        "stream": True,
        "tool_choice": None,
    }
    request = ScoreRequest.of(audited, [1, 2], [0])
    assert request.prompt.keys() == {"messages", "tools", "chat_template_kwargs"}
    assert (request.completion, request.positions, request.top) == ((1, 2), (0,), MAX_TOP)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("model", ""),
        ("model", 7),
        ("model", "m" * 257),
        ("completion", []),
        ("completion", ""),
        ("completion", None),
        ("completion", [-1]),
        ("completion", [MAX_TOKEN_ID + 1]),
        ("completion", [True]),
        ("completion", [1.5]),
        ("completion", ["5"]),
        ("completion", [1] * (MAX_TOKENS + 1)),
        ("positions", []),
        ("positions", None),
        ("positions", [4]),
        ("positions", [2, 1]),
        ("positions", [1, 1]),
        ("positions", [-1]),
        ("positions", ["0"]),
        ("positions", list(range(MAX_POSITIONS + 1))),
        ("top", 0),
        ("top", MAX_TOP + 1),
        ("top", "5"),
        ("top", True),
        ("prompt", "both"),
        ("stream", True),
        ("surprise", 1),
    ],
)
def test_requests_out_of_bounds_are_refused(member: str, value: object) -> None:
    """Whatever is no score request is refused by the member's name, before an engine is asked."""
    with pytest.raises(BadMessage) as refusal:
        ScoreRequest.from_json({**REQUEST.to_json(), member: value})
    assert any(words in str(refusal.value) for words in (member, "messages or prompt", "unknown member"))


@pytest.mark.parametrize("raw", [None, [], "x", {}, {"model": "m"}, {**REQUEST.to_json(), "prompt": [-1], "messages": None}])
def test_what_is_no_request_is_refused(raw: object) -> None:
    """Any JSON is read or refused."""
    with pytest.raises(BadMessage):
        ScoreRequest.from_json(raw)


def test_positions_of_a_text_are_bounded_by_its_bytes() -> None:
    """A token has at least one byte, so that a text of six bytes has at most six tokens."""
    assert ScoreRequest("m", {"prompt": "x"}, "héllo", (6,)).longest == 6
    with pytest.raises(BadMessage):
        ScoreRequest("m", {"prompt": "x"}, "héllo", (7,))


def broken(**changes: Any) -> dict[str, Any]:
    """The answer's JSON with other members."""
    return {**RESPONSE.to_json(), **changes}


def row(**changes: Any) -> list[Any]:
    """The answer's rows, the first with other members."""
    first, *others = RESPONSE.to_json()["rows"]
    return [{**first, **changes}, *others]


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        broken(object="list"),
        broken(tokens=[5, 6]),
        broken(tokens=[5, 6, 8]),
        broken(tokens=None),
        broken(rows=[None, None]),
        broken(rows=[None] * 4),
        broken(rows=[7, None, None]),
        broken(rows=row(position=1)),
        broken(rows=row(token=6)),
        broken(rows=row(token=None)),
        broken(rows=row(logprob=0.5)),
        broken(rows=row(logprob=math.nan)),
        broken(rows=row(logprob="-1")),
        broken(rows=row(logprob=LEAST_LOGPROB - 1)),
        broken(rows=row(top=None)),
        broken(rows=row(top=[[5]])),
        broken(rows=row(top=[[5, -1.0, 3]])),
        broken(rows=row(top=[[5, -1.0], [5, -1.0]])),
        broken(rows=row(top=[[5, -2.0], [6, -1.0]])),
        broken(rows=row(top=[[5, math.nan]])),
        broken(rows=row(top=[[5, -math.inf]])),
        broken(rows=row(top=[[5, 0.1]])),
        broken(rows=row(top=[[-1, -1.0]])),
        broken(rows=row(top=[[5, True]])),
        broken(rows=row(top=[[5, -0.01], [6, -0.01]])),
        broken(rows=row(top=[[token, -5.0] for token in range(MAX_TOP + 2)])),
        broken(prompt_tokens=-1),
        broken(end_logprob=0.5),
        broken(end_logprob="-1"),
        broken(end_logprob=math.nan),
        broken(end_logprob=-math.inf),
        broken(prompt_tokens=None),
        broken(model=None),
    ],
)
def test_answers_that_are_impossible_are_refused(raw: object) -> None:
    """A referee that answers another request, or with numbers that are no probabilities, is named and has no effect."""
    with pytest.raises(BadMessage):
        ScoreResponse.from_json(raw, REQUEST)


def test_positions_behind_a_text_have_no_row() -> None:
    """Where a text has fewer tokens than bytes, a row of a position behind its end is not believed."""
    request = ScoreRequest("m", {"prompt": "x"}, "abcd", (0, 4))
    rows = [{"position": 0, "token": 8, "logprob": None, "top": [[8, -1.0]]}, {"position": 4, "token": None, "top": [[8, -1.0]]}]
    document = {"object": "score", "model": "m", "prompt_tokens": 1, "tokens": [8, 9], "rows": rows}
    response = ScoreResponse.from_json(document, request)
    assert [row is not None for row in response.rows] == [True, False]
    with pytest.raises(BadMessage):
        ScoreResponse.from_json({**document, "tokens": [8] * 5}, request)


@given(
    st.dictionaries(st.integers(0, MAX_TOKEN_ID), st.floats(-50, -4), min_size=1, max_size=40),
    st.integers(0, 300),
    st.integers(1, MAX_TOP),
)
def test_rows_keep_the_likeliest_tokens(logprobs: dict[int, float], token: int, top: int) -> None:
    """A row lists the best tokens in order, and knows the answer's token wherever it stands."""
    scored = ScoreRow.of(0, token, logprobs, top)
    values = [value for _, value in scored.top]
    assert values == sorted(logprobs.values(), reverse=True)[:top]
    assert scored.logprob == logprobs.get(token)


@pytest.mark.parametrize("value", [0.5, math.nan, "1", None, True])
def test_engines_numbers_that_are_no_logarithms_are_refused(value: Any) -> None:
    """What an engine reports is checked before it is signed for."""
    with pytest.raises(BadMessage):
        ScoreRow.of(0, 1, {1: value}, 5)


def test_minus_infinity_is_an_impossible_token() -> None:
    """Engines write tokens that cannot come as minus infinity, and round a certain one to just above 0."""
    assert ScoreRow.of(0, 1, {1: -math.inf, 2: 5e-4}, 5).top == ((2, 0.0), (1, LEAST_LOGPROB))
