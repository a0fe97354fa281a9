"""The error classes, their table, and their form on the wire."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol import errors
from tallystick.protocol.errors import (
    MAX_RETRY_AFTER,
    PUBLIC,
    BadMessage,
    BadReceipt,
    BadSeal,
    BadSignature,
    Code,
    Fault,
    PeerError,
    Refusal,
    TallyError,
    Unavailable,
    error_from_json,
    rate_limited,
    retry_headers,
)
from tests.protocol.strategies import json_values, many, some

OPENAI_TYPES = {
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "insufficient_quota",
    "not_found_error",
    "server_error",
}
messages = st.text(max_size=100)
made: st.SearchStrategy[TallyError] = st.one_of(
    st.builds(Refusal, st.sampled_from(Code), messages, fault=st.none() | st.sampled_from(Fault)),
    st.builds(Unavailable, st.sampled_from(Code), messages, fault=st.none() | st.sampled_from(Fault)),
    st.sampled_from([BadMessage, BadSignature, BadReceipt, BadSeal]).flatmap(messages.map),
)


def test_every_code_has_a_public_row() -> None:
    """The table is complete: each code has an HTTP error status and a type of OpenAI's."""
    assert PUBLIC.keys() == set(Code)
    for public in PUBLIC.values():
        assert 400 <= public.status < 600
        assert public.type in OPENAI_TYPES


STATUSES = {
    400: "bad_message bad_seal order_expired order_misdirected order_terms",
    401: "bad_signature unauthenticated",
    402: "price_above_cap cost_above_cap unauthorised_tab insufficient_funds unsecured",
    404: "unknown_model unknown_job unknown_route",
    409: "order_replayed chain_refused",
    413: "body_too_large",
    415: "unsupported_encoding",
    499: "cancelled",
    502: "bad_receipt undelivered provider_failed engine_unavailable",
    503: "no_provider node_busy node_gone chain_unavailable coordinator_unavailable database_unavailable port_unavailable "
    "already_running process_failed shutting_down client_busy",
    504: "timed_out",
}


def test_statuses_are_these() -> None:
    """SDKs decide by the status whether to retry, so an existing code's status never changes."""
    for status, codes in STATUSES.items():
        assert [PUBLIC[Code(code)].status for code in codes.split()] == [status] * len(codes.split())


def test_every_concrete_error_has_a_code_and_a_fault() -> None:
    """Every class that can be raised has a code, a fault and a retry class."""
    for error in (BadMessage("x"), BadSignature("x"), BadReceipt("x"), BadSeal("x")):
        assert isinstance(error, PeerError)
        assert not error.retry
        assert error.status == PUBLIC[error.code].status
    assert not Refusal(Code.NODE_BUSY, "x").retry
    assert Unavailable(Code.NODE_BUSY, "x").retry
    assert BadReceipt("x").fault is Fault.PROVIDER
    assert BadMessage("x", fault=Fault.COORDINATOR).fault is Fault.COORDINATOR
    assert BadMessage("x", code=Code.BODY_TOO_LARGE).status == 413


def test_the_tree_is_three_branches() -> None:
    """The class alone tells a violated rule, a valid refusal and a temporary failure apart."""
    branches = (PeerError, Refusal, Unavailable)
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, TallyError) and cls is not TallyError:
            assert sum(issubclass(cls, branch) for branch in branches) == 1


@given(made, st.integers(400, 599))
@many
def test_an_error_keeps_its_code_fault_and_retry_over_the_wire(error: TallyError, status: int) -> None:
    """Code, fault, retry class and text survive JSON, whatever the HTTP status."""
    for body in (orjson.loads(orjson.dumps(error.as_json())), json.loads(json.dumps(error.as_json()))):
        again = error_from_json(body, status)
        assert (again.code, again.fault, again.retry, str(again)) == (error.code, error.fault, error.retry, str(error))
        assert again.as_json() == error.as_json()
        assert isinstance(again, Unavailable if error.retry else Refusal)


def test_the_shape_is_that_of_openai() -> None:
    """An OpenAI SDK finds message, type, param and code in their usual places."""
    body = Refusal(Code.UNSECURED, "not enough").as_json()
    assert body == {
        "error": {
            "message": "not enough",
            "type": "insufficient_quota",
            "param": None,
            "code": "unsecured",
            "fault": "client",
            "retry": False,
        }
    }


def _nested(depth: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(depth):
        tree = [tree]
    return tree


HOSTILE: list[Any] = [
    None,
    [],
    "error",
    {},
    {"error": None},
    {"error": "text"},
    {"error": []},
    {"error": {}},
    {"error": {"code": [], "fault": {}, "message": [], "retry": "yes"}},
    {"error": {"code": {"a": 1}, "fault": 7, "message": {"a": {}}, "retry": 1}},
    {"error": {"code": "bad_message", "fault": "nobody", "message": _nested(100_000), "retry": False}},
    {"error": {"code": _nested(900), "message": "x"}},
    {"error": {"message": 10**5000, "code": 10**5000}},
    {"error": {"message": "x" * 1_000_000, "code": "unsecured", "fault": "client"}},
    {"error": {"message": "\ud800", "code": "\ud800"}},
    {"error": {"message": "x", "code": float("nan"), "fault": float("inf")}},
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("status", [200, 400, 404, 500, 503, 0, -1])
def test_hostile_shapes_become_errors_that_can_be_shown(body: Any, status: int) -> None:
    """Any error document of a peer becomes an error of this project, of bounded size, that can be sent on as JSON."""
    error = error_from_json(body, status)
    assert isinstance(error, TallyError)
    assert len(orjson.dumps(error.as_json())) < 5_000
    assert error.status in {public.status for public in PUBLIC.values()}


@given(
    json_values
    | st.fixed_dictionaries({"error": st.dictionaries(st.sampled_from(["message", "code", "fault", "retry"]), json_values)})
)
@many
def test_any_json_becomes_an_error(body: Any) -> None:
    """`error_from_json` raises nothing."""
    for status in (400, 502):
        error = error_from_json(body, status)
        assert isinstance(error, TallyError)
        orjson.dumps(error.as_json())


@given(st.integers(500, 599), st.integers(0, 499))
@some
def test_an_unknown_shape_is_judged_by_its_status(broken: int, refused: int) -> None:
    """An error document of unknown shape may be retried only with a 5xx status."""
    assert isinstance(error_from_json("<html>", broken), Unavailable)
    assert isinstance(error_from_json("<html>", refused), BadMessage)


def test_an_unknown_code_does_not_hide_the_known_fault() -> None:
    """A newer peer's unknown code becomes a general one, and its fault is kept; the same holds for an unknown fault."""
    newer = error_from_json({"error": {"message": "m", "code": "quite_new", "fault": "engine", "retry": True}}, 503)
    assert (newer.code, newer.fault, newer.retry) == (Code.COORDINATOR_UNAVAILABLE, Fault.ENGINE, True)
    foreign = error_from_json({"error": {"message": "m", "code": "unknown_model", "type": "x", "param": None}}, 404)
    assert (foreign.code, foreign.fault, foreign.retry) == (Code.UNKNOWN_MODEL, Fault.NOBODY, False)


@pytest.mark.parametrize("retry", ["false", "no", 1, [0], {"a": 1}, None, 0])
def test_only_true_means_try_again(retry: object) -> None:
    """Only the boolean true in the retry member allows a retry."""
    assert not error_from_json({"error": {"message": "m", "code": "node_busy", "fault": "nobody", "retry": retry}}, 503).retry


@pytest.mark.parametrize(("delay", "seconds"), [(0.0, 1), (0.2, 1), (1.0, 1), (41.3, 42), (1e9, MAX_RETRY_AFTER)])
def test_a_rate_limit_tells_when_it_ends(delay: float, seconds: int) -> None:
    """In words, to programs and to HTTP libraries, whose retries follow the header."""
    error = rate_limited("too many requests", delay)
    assert str(error) == f"too many requests; try again in {seconds} s"
    assert retry_headers(error) == {"retry-after": str(seconds)}
    assert error_from_json(error.as_json(), error.status).retry_after == seconds


def test_no_header_asks_for_a_retry_that_does_not_help() -> None:
    """Other temporary errors may be tried again after a second."""
    assert retry_headers(Refusal(Code.ORDER_REPLAYED, "x")) == {}
    assert retry_headers(BadMessage("x")) == {}
    assert retry_headers(Unavailable(Code.COORDINATOR_UNAVAILABLE, "x")) == {"retry-after": "1"}
