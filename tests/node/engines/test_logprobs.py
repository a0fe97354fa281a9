"""Log-probabilities that callers did not ask for are taken out of answers, and nothing else."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.answer_rows import AnswerRows, TokenReport
from node.domain.logprob_request import LogprobRequest
from node.engines.logprobs import UnreadableLogprobs, read_reports, rewrite, take_logprobs
from tallystick.protocol.token_evidence import EvidenceRow, unpack_evidence

ABSENT, NULL = LogprobRequest(0, b"", strip=True), LogprobRequest(0, b"", strip=True, null=True)
TWO, UNCHANGED = LogprobRequest(0, b"", top=2), LogprobRequest(0, b"")


def entry(token: int, text: str, *logprobs: float) -> dict[str, Any]:
    """One token in llama.cpp's form."""
    best = [{"id": token + n, "token": text, "bytes": list(text.encode()), "logprob": p} for n, p in enumerate(logprobs)]
    return best[0] | {"top_logprobs": best}


CONTENT = {"content": [entry(7, "Hé", -0.25, -1.5, -3.0), entry(9, '"]}', -0.00048828125, -9.5, -12.0)]}
VLLM = {
    "content": [
        {"token": "token_id:7", "bytes": [116], "logprob": -0.5, "top_logprobs": [{"token": "token_id:8", "logprob": -0.25}]}
    ]
}
OLDER = {
    "text_offset": [0],
    "tokens": ["token_id:7"],
    "token_logprobs": [-0.5],
    "top_logprobs": [{"token_id:7": -0.5, "token_id:8": -0.75}],
}


def taken(data: bytes, request: LogprobRequest) -> tuple[bytes, AnswerRows]:
    """The bytes for the caller, and the rows."""
    document, rows = json.loads(data), AnswerRows()
    changes = take_logprobs(document, request, rows)
    return rewrite(data, document, changes), rows


def writings(document: Any) -> list[bytes]:
    """The ways in which engines write JSON: compact, with blanks, with escapes, over several lines."""
    return [
        orjson.dumps(document),
        json.dumps(document).encode(),
        json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(),
        json.dumps(document, indent=2).encode(),
    ]


values = st.recursive(
    st.none() | st.booleans() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["logprobs", "a", '"logprobs":']), inner),
    max_leaves=8,
)
others = st.dictionaries(st.sampled_from(["id", "usage", "x", "logprobs"]), values)
PLACES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"index": 0, "delta": {"content": "Hé"}}, {}),
    ({"index": 0}, {"finish_reason": None, "delta": {"content": '"logprobs": {"content"'}}),
    ({}, {"delta": {"content": "\\"}}),
    ({}, {}),
]


@pytest.mark.parametrize("value", [CONTENT, VLLM, OLDER, {"content": []}])
@pytest.mark.parametrize(("before", "after"), PLACES)
@pytest.mark.parametrize("number", range(4))
def test_the_caller_sees_the_answer_as_if_nothing_had_been_added(
    value: Any, before: dict[str, Any], after: dict[str, Any], number: int
) -> None:
    """Byte for byte, wherever the member stands and however the engine writes JSON."""
    others = {"id": "x\u2028", "created": 1e3, "usage": None, "timings": {"a": 0.10}}

    def answer(**member: Any) -> bytes:
        return writings(others | {"choices": [before | member | after]} | {"z": [1]})[number]

    assert taken(answer(logprobs=value), NULL)[0] == answer(logprobs=None)
    if before or after:
        assert taken(answer(logprobs=value), ABSENT)[0] == answer()
    assert json.loads(taken(answer(logprobs=value), ABSENT)[0]) == json.loads(answer())
    assert taken(answer(logprobs=value), UNCHANGED)[0] == answer(logprobs=value)
    assert taken(answer(logprobs=None), NULL)[0] == answer(logprobs=None)
    assert json.loads(taken(answer(logprobs=None), ABSENT)[0]) == json.loads(answer())
    assert taken(answer(logprobs=None), UNCHANGED)[0] == taken(answer(logprobs=None), TWO)[0] == answer(logprobs=None)
    assert taken(answer(), NULL)[0] == answer()


@given(others, st.integers(0, 3), st.integers(1, 3))
def test_any_answer_keeps_its_other_members(members: dict[str, Any], number: int, choices: int) -> None:
    """Members of the same name in other places, and texts that look like it, stay."""
    plain = members | {"choices": [{"index": n, "text": "a"} for n in range(choices)]}
    added = members | {"choices": [{"index": n, "logprobs": CONTENT, "text": "a"} for n in range(choices)]}
    assert json.loads(taken(writings(added)[number], ABSENT)[0]) == plain


@pytest.mark.parametrize("number", range(4))
def test_a_callers_own_two_best(number: int) -> None:
    """A caller that asked for two gets two, and the other bytes stay."""
    answer = {"id": "é", "choices": [{"logprobs": CONTENT, "index": 0}], "created": 1}
    two = {"content": [each | {"top_logprobs": each["top_logprobs"][:2]} for each in CONTENT["content"]]}
    data, rows = taken(writings(answer)[number], TWO)
    assert json.loads(data) == answer | {"choices": [{"logprobs": two, "index": 0}]}
    assert data.startswith(writings(answer)[number][:8])
    assert unpack_evidence(rows.commit(None, truncated=False).packed)[0].top == ((7, 250), (8, 1500), (9, 3000))


@pytest.mark.parametrize(
    ("value", "row"),
    [
        (CONTENT, EvidenceRow(7, ((7, 250), (8, 1_500), (9, 3_000)))),
        (VLLM, EvidenceRow(7, ((8, 250),))),
        (OLDER, EvidenceRow(7, ((7, 500), (8, 750)))),
        ({"content": [{"token_id": 5, "token": "a", "logprob": -1, "top_logprobs": []}]}, EvidenceRow(5, ((5, 1_000),))),
    ],
)
def test_rows_of_each_form(value: Any, row: EvidenceRow) -> None:
    """llama.cpp's, vLLM's on chats and completions, and koboldcpp's."""
    _, rows = taken(orjson.dumps({"choices": [{"logprobs": value}]}), ABSENT)
    assert unpack_evidence(rows.commit(None, truncated=False).packed)[0] == row


def test_rows_are_of_the_first_choice() -> None:
    """Another choice's tokens would be in between."""
    choices = [{"index": 1, "logprobs": OLDER}, {"index": 0, "logprobs": VLLM}, {"index": 2, "logprobs": OLDER}]
    data, rows = taken(orjson.dumps({"choices": choices}), ABSENT)
    assert json.loads(data) == {"choices": [{"index": 1}, {"index": 0}, {"index": 2}]}
    assert rows.commit(None, truncated=False).tokens == 1


@pytest.mark.parametrize(
    "value",
    [
        7,
        "x",
        [],
        {"content": 7},
        {"content": [7]},
        {"content": [{"token": "a", "logprob": -1, "top_logprobs": []}]},
        {"content": [{"id": True, "token": "a", "logprob": -1}]},
        {"content": [{"id": 1, "token": "a", "logprob": None}]},
        {"content": [{"id": 1, "token": "a", "logprob": "-1"}]},
        {"content": [{"id": 1, "logprob": -1, "top_logprobs": [{"id": 1}]}]},
        {"content": [{"token": "token_id:", "logprob": -1}]},
        {"content": [{"token": "token_id:-1", "logprob": -1}]},
        {"content": [{"token": "token_id:²", "logprob": -1}]},
        {"content": [{"token": "token_id:123456789012", "logprob": -1}]},
        {"tokens": ["token_id:1"], "token_logprobs": [], "top_logprobs": []},
        {"tokens": ["token_id:1"]},
        {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [{"a": -1}]},
    ],
)
def test_what_cannot_be_read_gives_no_rows_and_is_taken_out_all_the_same(value: Any) -> None:
    """Ollama and OpenAI name no ids, so their answers have no evidence. No job fails because of it."""
    data, rows = taken(orjson.dumps({"choices": [{"logprobs": value, "index": 0}]}), ABSENT)
    assert data == b'{"choices":[{"index":0}]}'
    rows.add([TokenReport(1, [(1, -1.0)], None)], b"", marks=False)
    assert rows.commit(None, truncated=False).tokens == 0
    with pytest.raises(UnreadableLogprobs):
        list(read_reports(value))


def test_a_log_probability_beyond_any_number() -> None:
    """Minus infinity is kept as the smallest one that rows have; engines write it for impossible tokens."""
    (report,) = read_reports({"content": [{"id": 1, "logprob": -math.inf, "top_logprobs": [{"id": 1, "logprob": -math.inf}]}]})
    assert EvidenceRow.of(report.token, report.logprobs).top == ((1, 65_535),)
