"""What follows from how a line was answered."""

from __future__ import annotations

import pytest

from tallystick.client.batches.line_policy import MAX_ATTEMPTS, MAX_UNKNOWN, Decision, decide, shows_sale, wait_seconds
from tallystick.client.batches.ports import KeyState, LineAnswer


def answer(status: int, code: str = "", *, retry: bool = False) -> LineAnswer:
    """An answer without a body."""
    return LineAnswer(status, "", b"", code=code, retry=retry)


UNAVAILABLE = answer(503, "no_provider", retry=True)


@pytest.mark.parametrize("state", KeyState)
def test_an_answer_ends_the_line(state: KeyState) -> None:
    """Whatever is known of its key."""
    assert decide(answer(200), state, 0, 0) is Decision.COMPLETE


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
@pytest.mark.parametrize("state", KeyState)
def test_a_final_error_ends_the_line(status: int, state: KeyState) -> None:
    """The request is wrong, and would be wrong again."""
    assert decide(answer(status, "bad_message"), state, 0, 0) is Decision.FAIL


@pytest.mark.parametrize(
    ("state", "decision"),
    [
        (KeyState.UNUSED, Decision.WAIT),
        (KeyState.OPEN, Decision.RESUME),
        (KeyState.FREE, Decision.RESTART),
        (KeyState.BILLED, Decision.FAIL),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        UNAVAILABLE,
        answer(500),
        answer(502, "provider_failed"),
        answer(429),
        answer(408),
        answer(402, "over_budget"),
        answer(402, "insufficient_funds"),
        answer(402, "unsecured"),
        answer(402, "price_above_cap"),
        answer(409, "order_replayed"),
        answer(503, "cancelled"),
    ],
)
def test_what_may_pass_is_tried_again_unless_it_was_billed(error: LineAnswer, state: KeyState, decision: Decision) -> None:
    """A job that may still cost something is resumed, never bought again. One that cost nothing may have a successor."""
    assert decide(error, state, 0, 1_000) is decision


def test_a_line_that_breaks_every_provider_fails() -> None:
    """After MAX_ATTEMPTS jobs."""
    assert decide(UNAVAILABLE, KeyState.FREE, MAX_ATTEMPTS - 2, 0) is Decision.RESTART
    assert decide(UNAVAILABLE, KeyState.FREE, MAX_ATTEMPTS - 1, 0) is Decision.FAIL


def test_a_model_that_nobody_sells() -> None:
    """Its providers may be back soon; after MAX_UNKNOWN tries the line fails."""
    unknown = answer(404, "unknown_model")
    assert decide(unknown, KeyState.UNUSED, 0, MAX_UNKNOWN - 1) is Decision.WAIT
    assert decide(unknown, KeyState.UNUSED, 0, MAX_UNKNOWN) is Decision.FAIL
    assert decide(unknown, KeyState.BILLED, 0, 0) is Decision.FAIL


def test_a_cost_above_the_cap_is_final() -> None:
    """The request asks for more than its caller pays, now and later."""
    assert decide(answer(402, "cost_above_cap"), KeyState.UNUSED, 0, 0) is Decision.FAIL


def test_waits_double() -> None:
    """From a second to a minute."""
    assert [wait_seconds(tries) for tries in (0, 1, 2, 5, 6, 10_000)] == [1, 2, 4, 32, 60, 60]


def test_what_shows_that_a_model_is_sold() -> None:
    """An answer, and refusals that speak of its providers; not a fault of the request or of the model's name."""
    assert all(
        shows_sale(shown) for shown in (answer(200), UNAVAILABLE, answer(503, "node_busy"), answer(402, "price_above_cap"))
    )
    assert not any(
        shows_sale(shown) for shown in (answer(404, "unknown_model"), answer(400, "bad_message"), answer(503, "client_busy"))
    )
