from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.domain.ask_book import AskBook, ListedAsk
from coordinator.domain.listed_ask import OTHER, PROVEN, RELIABLE
from coordinator.domain.matching import explain, rank_candidates, shortlist, spare_asks
from coordinator.domain.search import rejection
from tallystick.protocol.criteria import MAX_CANDIDATES, Demand, Reason
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.payer_rules import STRANGER, Payer, PayerRule
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import Submission
from tests.coordinator.harness import MODEL, START, make_ask, make_submission, person

ANN, BOB, CAT = person("ann"), person("bob"), person("cat")


def _book_of(*asks: tuple[Signer, dict[str, Any]], free: int = 1) -> tuple[AskBook, list[Verified[Ask]]]:
    book, made = AskBook(), []
    for key, changes in asks:
        made.append(make_ask(key, **changes))
        book.replace(key.address, made[-1:], Capacity(free, 4))
    return book, made


def _standing(free: int = 1, **changes: Any) -> ListedAsk:
    book, _ = _book_of((ANN, changes), free=free)
    return next(iter(book.of_model(changes.get("model", MODEL))))


def _refusal(book: AskBook, **demand: Any) -> TallyError:
    with pytest.raises(TallyError) as caught:
        shortlist(book, Demand(**({"model": MODEL} | demand)), START)
    return caught.value


@pytest.mark.parametrize(
    ("reason", "demand", "ask"),
    [
        (Reason.NOT_PINNED, {"pin": frozenset({BOB.address})}, {}),
        (Reason.EXCLUDED, {"exclude": frozenset({ANN.address})}, {}),
        (Reason.INPUT_PRICE, {"max_input_price": 999_999}, {}),
        (Reason.OUTPUT_PRICE, {"max_output_price": 1_999_999}, {}),
        (Reason.STAKE, {"min_stake": 1}, {}),
        (Reason.ROUTE, {"route": "/v1/rerank"}, {}),
        (Reason.REGION, {"require": Requirements(region=("eu",))}, {}),
        (Reason.TIER, {"require": Requirements(tier=("edge",))}, {}),
        (Reason.PRECISION, {"require": Requirements(precision=("bf16",))}, {"spec": Spec(precision="fp8")}),
        (Reason.ENGINE, {"require": Requirements(engine=("vllm",))}, {}),
        (Reason.FEATURES, {"require": Requirements(features=("tools",))}, {"spec": Spec(features=("logprobs",))}),
        (Reason.CONTEXT, {"require": Requirements(context_tokens=8_193)}, {}),
        (Reason.TOO_LONG, {"input_tokens": 8_193}, {}),
        (Reason.UNSUPPORTED, {"essential": ("vision",)}, {"spec": Spec(features=("-vision",))}),
        (Reason.ROUTE, {"route": "/v1/embeddings"}, {"spec": Spec(features=("-/v1/embeddings",))}),
        (Reason.ASK_EXPIRED, {}, {"valid_until": START}),
        (Reason.ASK_EXPIRED, {}, {"valid_from": START + 1}),
    ],
)
def test_each_predicate_has_a_reason(reason: Reason, demand: dict[str, Any], ask: dict[str, Any]) -> None:
    """Each requirement that an ask does not meet has a reason of its own."""
    assert rejection(_standing(**ask), Demand(model=MODEL, **demand), START) is reason


def test_a_discount_for_batch_jobs() -> None:
    """A batch job gets the provider's cheaper ask, an interactive one the other; the index does not mix them up. An order of an
    interactive job on the cheaper ask is refused.
    """
    book, cheap = AskBook(), make_ask(ANN, output_price=5, spec=Spec(features=("batch_only",)))
    full = make_ask(ANN, seq=9)
    book.replace(ANN.address, [full, cheap], Capacity(1, 4))
    for _ in range(2):
        assert [entry.digest for entry in shortlist(book, Demand(MODEL), START)] == [full.digest]
        assert [entry.digest for entry in shortlist(book, Demand(MODEL, batch=True), START)] == [cheap.digest]
    candidates = make_submission(cheap).candidates
    fitting, _ = rank_candidates(candidates, book, tried=(), score=lambda _: 100.0, now=START, batch=True)
    assert [ranked.listed_ask.digest for ranked in fitting] == [cheap.digest]
    with pytest.raises(Refusal, match="one for batch jobs alone") as caught:
        rank_candidates(candidates, book, tried=(), score=lambda _: 100.0, now=START)
    assert caught.value.code is Code.ORDER_TERMS


def test_a_discount_does_not_hide_why_an_ask_is_too_dear() -> None:
    """An interactive job is told of the price of asks for all jobs; alone, an ask for batch jobs is named as such."""
    cheap = make_ask(ANN, output_price=5, spec=Spec(features=("batch_only",)))
    book = AskBook()
    book.replace(ANN.address, [make_ask(ANN, seq=9), cheap], Capacity(1, 4))
    assert _refusal(book, max_output_price=1).code is Code.PRICE_ABOVE_CAP
    book.replace(ANN.address, [cheap], Capacity(1, 4))
    refusal = _refusal(book)
    assert refusal.code is Code.NO_PROVIDER
    assert Reason.BATCH_ONLY.value in str(refusal)


def test_a_price_for_some_payers() -> None:
    """Any number of cheap asks for others hides no ask, and alone they are named as such; a payer they are for gets them."""
    features = PayerRule(settled=Amount(5)).to_features()
    book, full = AskBook(), make_ask(BOB, seq=9)
    book.replace(BOB.address, [full], Capacity(1, 4))
    for number in range(600):
        stranger = person(f"stranger {number}")
        book.replace(stranger.address, [make_ask(stranger, output_price=5, spec=Spec(features=features))], Capacity(1, 1))
    demand = Demand(MODEL, payer=STRANGER)
    assert [entry.digest for entry in shortlist(book, demand, START)] == [full.digest]
    assert [entry.digest for entry in spare_asks(book, demand, lambda _: 1.0, 0.5)] == [full.digest]
    first = person("stranger 1").address
    payer = Payer(ANN.address, {first: Amount(5)})
    assert [entry.provider for entry in shortlist(book, Demand(MODEL, payer=payer), START)] == [first, BOB.address]
    book.set_capacity(BOB.address, Capacity(0, 4))
    assert [entry.digest for entry in shortlist(book, demand, START)] == [full.digest]
    book.drop(BOB.address)
    refusal = _refusal(book, payer=STRANGER)
    assert Reason.PAYER.value in str(refusal)
    for number in range(600):
        book.drop(person(f"stranger {number}").address)
    book.replace(BOB.address, [full], Capacity(1, 4))
    index = book.index_of(MODEL)
    assert index is not None
    assert index.payer_groups == 0


def test_a_busy_node_has_its_own_reason() -> None:
    """A node without a free slot is refused with exactly that reason."""
    assert rejection(_standing(free=0), Demand(model=MODEL), START) is Reason.BUSY


@pytest.mark.parametrize(
    "demand",
    [
        {},
        {"pin": frozenset({ANN.address}), "exclude": frozenset({BOB.address})},
        {"max_input_price": 1_000_000, "max_output_price": 2_000_000},
    ],
)
def test_bounds_are_inclusive(demand: dict[str, Any]) -> None:
    """Maxima include their bound; an ask is valid from its first second to the last one before its end."""
    fits = _standing(valid_from=START, valid_until=START + 1)
    assert rejection(fits, Demand(model=MODEL, **demand), START) is None


def test_the_shortlist_is_ranked_and_bounded() -> None:
    """The cheapest asks come first, at most as many as requested."""
    book, _ = _book_of(*[(person(str(n)), {"input_price": 0, "output_price": 1_000 * n}) for n in range(20, 0, -1)])
    listed_asks = shortlist(book, Demand(model=MODEL, limit=3), START)
    assert [listed_ask.ask.message.output_price for listed_ask in listed_asks] == [1_000, 2_000, 3_000]
    assert len(shortlist(book, Demand(model=MODEL), START)) == MAX_CANDIDATES


def test_the_shortlist_is_sorted_as_asked() -> None:
    """Asks can be sorted by measured time to first token or throughput; unknown values come last, and the cheaper ask wins a
    tie.
    """
    keys = [person(name) for name in ("ann", "bob", "cid", "dan")]
    speeds = [Capacity(1, 1), Capacity(1, 1, 50, 300), Capacity(1, 1, 20, 100), Capacity(1, 1, 50, 300)]
    book = AskBook()
    for number, (key, speed) in enumerate(zip(keys, speeds, strict=True)):
        book.replace(key.address, [make_ask(key, output_price=1_000_000 * number)], speed)
    named = {key.address: name for key, name in zip(keys, "abcd", strict=True)}
    for sort, order in (("price", "abcd"), ("latency", "cbda"), ("throughput", "bdca")):
        listed_asks = shortlist(book, Demand(model=MODEL, sort=sort), START)
        assert "".join(named[listed_ask.node.provider] for listed_ask in listed_asks) == order
        assert len(shortlist(book, Demand(model=MODEL, sort=sort, limit=2), START)) == 2
    with pytest.raises(BadMessage, match="sort"):
        Demand(model=MODEL, sort="beauty")


def test_unreliable_providers_can_be_excluded() -> None:
    """A client may require providers whose recent jobs mostly succeeded."""
    book, _ = _book_of((ANN, {}), (BOB, {}))
    scores = {ANN.address: 0.89, BOB.address: 0.9}
    rejected: list[tuple[Reason, ListedAsk]] = []
    listed_asks = shortlist(book, Demand(model=MODEL, min_reputation=90), START, rejected, scores.__getitem__)
    assert [listed_ask.node.provider for listed_ask in listed_asks] == [BOB.address]
    assert [reason for reason, _ in rejected] == [Reason.REPUTATION]


def test_a_pinned_provider_is_found_however_dear() -> None:
    """A provider that is requested by name is found behind any number of cheaper ones."""
    book, _ = _book_of(*[(person(str(n)), {"output_price": n}) for n in range(300)], (ANN, {"output_price": 10**9}))
    listed_asks = shortlist(book, Demand(model=MODEL, pin=frozenset({ANN.address})), START)
    assert [listed_ask.node.provider for listed_ask in listed_asks] == [ANN.address]


def test_excluded_providers_do_not_hide_the_others() -> None:
    """Providers behind any number of cheap excluded ones are found."""
    unwanted = [person(str(n)) for n in range(300)]
    book, _ = _book_of(*[(key, {"output_price": n}) for n, key in enumerate(unwanted)], (ANN, {"output_price": 10**9}))
    listed_asks = shortlist(book, Demand(model=MODEL, exclude=frozenset(key.address for key in unwanted)), START)
    assert [listed_ask.node.provider for listed_ask in listed_asks] == [ANN.address]


def test_the_work_is_bounded() -> None:
    """A bounded number of asks is judged, and the reasons of the cheapest are told."""
    dead = [(person(str(n)), {"valid_until": START, "output_price": n}) for n in range(600)]
    book, _ = _book_of(*dead, (ANN, {"output_price": 10**9}))
    assert "256 x" in str(_refusal(book))


@pytest.mark.parametrize("sort", ["price", "latency", "throughput"])
def test_busy_and_unsuitable_asks_hide_nobody(sort: str) -> None:
    """A free ask is found behind any number of cheaper ones that are busy, or in another region."""
    book, _ = _book_of((ANN, {"output_price": 10**9, "spec": Spec(region="eu")}))
    for number in range(700):
        key = person(str(number))
        busy = number % 2
        spec = Spec(region="eu" if busy else "us")
        book.replace(key.address, [make_ask(key, output_price=number, spec=spec)], Capacity(1 - busy, 1, 1_000, 1))
    demand = Demand(MODEL, require=Requirements(region=("EU",)), sort=sort)
    assert [listed_ask.provider for listed_ask in shortlist(book, demand, START)] == [ANN.address]


def test_a_wallet_with_many_asks_takes_one_place() -> None:
    """Several asks of one provider take one place of the shortlist, the cheapest that fits."""
    book = AskBook()
    book.replace(ANN.address, [make_ask(ANN, output_price=n, seq=n) for n in range(1, 200)], Capacity(1, 1))
    book.replace(BOB.address, [make_ask(BOB, output_price=10**9)], Capacity(1, 1))
    listed_asks = shortlist(book, Demand(MODEL, max_output_price=10**9), START)
    assert [listed_ask.ask.message.output_price for listed_ask in listed_asks] == [1, 10**9]


@pytest.mark.parametrize("limit", [0, MAX_CANDIDATES + 1])
def test_limits_are_bounded(limit: int) -> None:
    """A shortlist has one to eight entries."""
    with pytest.raises(BadMessage, match="limit"):
        Demand(model=MODEL, limit=limit)


def test_an_unknown_model() -> None:
    """A model without asks is refused for good, and the refusal names it."""
    error = _refusal(AskBook())
    assert (type(error), error.code, error.status) == (Refusal, Code.UNKNOWN_MODEL, 404)
    assert MODEL in str(error)


@pytest.mark.parametrize(
    "demand", [{"max_input_price": 1}, {"max_output_price": 1}, {"max_input_price": 1, "max_output_price": 1}]
)
def test_all_too_dear(demand: dict[str, Any]) -> None:
    """If only the price prevents a match, the refusal says so, with the lowest prices on offer."""
    book, _ = _book_of((ANN, {"input_price": 70, "output_price": 900}), (BOB, {"input_price": 80, "output_price": 500}))
    error = _refusal(book, **demand)
    assert (type(error), error.code, error.status) == (Refusal, Code.PRICE_ABOVE_CAP, 402)
    assert "0.00007 for input and 0.0005 for output" in str(error)


@pytest.mark.parametrize("choice", [{"pin": frozenset({ANN.address})}, {"exclude": frozenset({BOB.address})}])
def test_too_dear_among_those_asked_for(choice: dict[str, Any]) -> None:
    """The refusal says that the wanted providers are too expensive even if cheap unwanted ones exist."""
    book, _ = _book_of((ANN, {"input_price": 70}), (BOB, {"input_price": 1}))
    error = _refusal(book, max_input_price=10, **choice)
    assert error.code is Code.PRICE_ABOVE_CAP
    assert "every provider asked for" in str(error)
    assert "0.00007 for input" in str(error)


def test_busy_providers_are_offered_if_nobody_is_free() -> None:
    """A job can wait for providers that are busy: those with the shortest queue come first, then the cheaper ones."""
    book, _ = _book_of((ANN, {}), (BOB, {"output_price": 1}), (CAT, {"output_price": 9_000_000}), free=0)
    backlog = {ANN.address: 2.0, BOB.address: 2.0, CAT.address: 0.5}
    demand = Demand(MODEL)
    waiting = shortlist(book, demand, START, backlog=lambda node: backlog[node.provider])
    assert _providers(waiting) == [CAT.address, BOB.address, ANN.address]
    assert _providers(shortlist(book, replace(demand, max_output_price=2_000_000, limit=1), START)) == [BOB.address]
    assert _providers(shortlist(book, replace(demand, pin=frozenset({ANN.address})), START)) == [ANN.address]
    book.set_capacity(ANN.address, Capacity(1, 4))
    assert _providers(shortlist(book, demand, START)) == [ANN.address]


def test_a_node_without_slots_is_not_waited_for() -> None:
    """A busy provider that would not fit anyway, or has no slots at all, is no reason to wait."""
    book, _ = _book_of((ANN, {}))
    book.set_capacity(ANN.address, Capacity(0, 0))
    error = _refusal(book)
    assert (type(error), error.code, error.fault) == (Unavailable, Code.NODE_BUSY, Fault.PROVIDER)
    assert f"1 x {Reason.BUSY.value}" in str(error)
    book.set_capacity(ANN.address, Capacity(0, 4))
    assert _refusal(book, max_input_price=1).code is Code.PRICE_ABOVE_CAP


@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        ({"pin": frozenset({CAT.address})}, f"2 x {Reason.NOT_PINNED.value}"),
        ({"exclude": frozenset({ANN.address, BOB.address})}, f"2 x {Reason.EXCLUDED.value}"),
        ({"min_stake": 1}, f"2 x {Reason.STAKE.value}"),
        ({"min_stake": 1, "exclude": frozenset({BOB.address})}, f"1 x {Reason.EXCLUDED.value}"),
    ],
)
def test_no_provider_is_suitable(demand: dict[str, Any], reason: str) -> None:
    """If no provider is suitable, the refusal counts the reasons."""
    book, _ = _book_of((ANN, {}), (BOB, {}))
    error = _refusal(book, **demand)
    assert (type(error), error.code) == (Refusal, Code.NO_PROVIDER)
    assert reason in str(error)


# Candidates of a job


def _ranked(
    book: AskBook, submission: Submission, *, tried: frozenset[Address] = frozenset(), bad: Address | None = None
) -> tuple[list[Address], dict[Address, str]]:
    fit, against = rank_candidates(
        submission.candidates,
        book,
        tried=tried,
        score=lambda provider: 0.5 if provider == bad else 1.0,
        now=START,
        ranked=submission.ranked,
    )
    return [ranked.listed_ask.provider for ranked in fit], against


def test_candidates_are_ranked_by_price_and_reputation() -> None:
    """The cheapest candidate comes first; a bad reputation counts like a higher price."""
    book, asks = _book_of((ANN, {"input_price": 100, "output_price": 100}), (BOB, {"input_price": 150, "output_price": 150}))
    submission = make_submission(*asks)
    assert _ranked(book, submission)[0] == [ANN.address, BOB.address]
    assert _ranked(book, submission, bad=ANN.address)[0] == [BOB.address, ANN.address]
    backwards = replace(submission, candidates=submission.candidates[::-1], ranked=True)
    assert Submission.loads(backwards.dumps()) == backwards
    assert _ranked(book, backwards)[0] == [BOB.address, ANN.address], "as the client would have them"


def test_a_candidate_that_cannot_take_the_job_is_explained() -> None:
    """Each rejected candidate has its reason: it failed, it is busy, or its ask is gone."""
    book, asks = _book_of((ANN, {}), (BOB, {}), (CAT, {}))
    submission = make_submission(*asks)
    book.drop(BOB.address)
    book.set_capacity(CAT.address, Capacity(0, 1))
    fit, against = _ranked(book, submission, tried=frozenset({ANN.address}))
    assert fit == []
    assert against == {
        ANN.address: Reason.FAILED.value,
        BOB.address: Reason.ASK_GONE.value,
        CAT.address: Reason.BUSY.value,
    }


def test_an_expired_order_is_no_candidate() -> None:
    """An order whose deadline passed during another provider's attempt is not dispatched."""
    book, asks = _book_of((ANN, {}))
    assert _ranked(book, make_submission(*asks, deadline=START)) == ([], {ANN.address: Reason.ORDER_EXPIRED.value})


@pytest.mark.parametrize(
    "terms",
    [
        {"model": "another"},
        {"input_price": 1},
        {"cached_input_price": 1},
        {"output_price": 1},
        {"max_output_tokens": 1_025},
    ],
)
def test_terms_must_be_the_asks(terms: dict[str, Any]) -> None:
    """Terms that differ from the ask that they name are refused, in either party's favour."""
    book, asks = _book_of((ANN, {}))
    with pytest.raises(Refusal, match="terms") as caught:
        _ranked(book, make_submission(*asks, terms=terms))
    assert caught.value.code is Code.ORDER_TERMS


def test_an_order_on_another_provider_than_the_asks() -> None:
    """An order cannot use another provider's ask."""
    book, asks = _book_of((ANN, {}), (BOB, {}))
    submission = make_submission(asks[1], terms={"ask": asks[0].digest})
    with pytest.raises(Refusal, match="another provider"):
        _ranked(book, submission)


def _providers(listed_asks: list[ListedAsk]) -> list[Address]:
    return [listed_ask.node.provider for listed_ask in listed_asks]


def test_a_request_goes_where_its_needs_are_declared() -> None:
    """Asks that declare what a request needs are the only ones chosen, however dear; the others learn why."""
    tools = Spec(features=("logprobs", "Tools"))
    book, _ = _book_of((ANN, {"output_price": 1}), (BOB, {"spec": tools}), (CAT, {"spec": tools, "output_price": 9_000_000}))
    demand = Demand(MODEL, needs=Requirements(features=("tools",)))
    assert _providers(shortlist(book, demand, START)) == [BOB.address, CAT.address]
    explained = explain(book.of_model(MODEL), demand, START, lambda _: 1.0)
    assert [reason for _, reason in explained] == [Reason.UNDECLARED, None, None]


def test_a_need_that_nobody_declares_goes_to_all() -> None:
    """A feature that nobody declares may be there all the same, so no request becomes unanswerable for lack of a declaration."""
    book, _ = _book_of((ANN, {}), (BOB, {"spec": Spec(features=("logprobs",))}), (CAT, {"spec": Spec(features=("-tools",))}))
    demand = Demand(MODEL, needs=Requirements(features=("tools",)), essential=("tools",))
    assert sorted(_providers(shortlist(book, demand, START))) == sorted([ANN.address, BOB.address])
    explained = explain(book.of_model(MODEL), demand, START, lambda _: 1.0)
    assert [reason for _, reason in explained].count(Reason.UNSUPPORTED) == 1


def test_a_declared_need_is_found_behind_many_others() -> None:
    """The search for a declaration does not end with the first asks that fit."""
    asks: list[tuple[Signer, dict[str, Any]]] = [(person(str(n)), {"output_price": n}) for n in range(200)]
    book, _ = _book_of(*asks, (ANN, {"output_price": 10**6, "spec": Spec(features=("vision",))}))
    assert _providers(shortlist(book, Demand(MODEL, needs=Requirements(features=("vision",))), START)) == [ANN.address]


def test_a_long_request_goes_to_a_long_context() -> None:
    """A context that is likely to hold the request is chosen; if there is none, one that may hold it."""
    book, _ = _book_of((ANN, {"output_price": 1}), (BOB, {"context_tokens": 32_768}), (CAT, {"context_tokens": 65_536}))
    for likely, least, chosen in (
        (20_000, 9_000, {BOB.address, CAT.address}),
        (60_000, 9_000, {CAT.address}),
        (70_000, 40_000, {CAT.address}),
        (70_000, 9_000, {BOB.address, CAT.address}),
        (70_000, 100, {ANN.address, BOB.address, CAT.address}),
    ):
        demand = Demand(MODEL, needs=Requirements(context_tokens=likely), input_tokens=least)
        assert set(_providers(shortlist(book, demand, START))) == chosen


def test_a_request_longer_than_every_context_is_told_the_longest() -> None:
    """The error is OpenAI's own, which clients recognise, and says the largest context on offer."""
    book, _ = _book_of((ANN, {}), (BOB, {"context_tokens": 32_768}))
    error = _refusal(book, input_tokens=40_000)
    assert (error.code, error.status) == (Code.CONTEXT_LENGTH_EXCEEDED, 400)
    assert "32768 tokens" in str(error)


def test_a_need_that_nobody_has_names_models_that_do() -> None:
    """A request that no provider of its model can answer is told which models can."""
    seeing, embedding = Spec(features=("vision",)), Spec(features=("embeddings",))
    book, _ = _book_of((ANN, {"spec": Spec(features=("-vision", "-/v1/embeddings"))}), (BOB, {"model": "eye", "spec": seeing}))
    book.replace(CAT.address, [make_ask(CAT, model="vec", spec=embedding)], Capacity(1, 1))
    error = _refusal(book, needs=Requirements(features=("vision",)), essential=("vision",))
    assert (error.code, error.status, error.retry) == (Code.UNSUPPORTED, 400, False)
    assert "vision (image input); models on offer that do: eye" in str(error)
    error = _refusal(book, route="/v1/embeddings", needs=Requirements(features=("embeddings",)))
    assert (error.code, error.status) == (Code.UNKNOWN_ROUTE, 404)
    assert "/v1/embeddings; models on offer that do: vec" in str(error)
    assert "no other model on offer is known" in str(_refusal(book, essential=("video", "vision"), pin={ANN.address}))


def test_strangers_that_are_never_free_keep_no_job_waiting() -> None:
    """A job waits for the most reliable busy providers first, and one provider's many asks hide no other's."""
    book, _ = _book_of((BOB, {}), (CAT, {}), free=0)
    book.replace(ANN.address, [make_ask(ANN, input_price=0, seq=seq) for seq in range(256)], Capacity(0, 1_000))
    assert set(_providers(shortlist(book, Demand(MODEL), START))) == {ANN.address, BOB.address, CAT.address}
    book.set_reliability(CAT.address, RELIABLE)
    book.set_reliability(BOB.address, PROVEN)
    assert _providers(shortlist(book, Demand(MODEL), START)) == [CAT.address, BOB.address, ANN.address]
    book.set_reliability(CAT.address, OTHER)
    assert _providers(shortlist(book, Demand(MODEL, limit=1), START)) == [BOB.address]


def test_a_least_integrity_is_a_requirement_like_the_others() -> None:
    """Only products that audits vouch for meet it, pinned or not, and the reason is told to the others."""
    book, ann, bob = AskBook(), person("ann"), person("bob")
    book.standing = lambda ask: (500, 12) if ask.provider == ann.address else (17, 0)
    for key in (ann, bob):
        book.replace(key.address, [make_ask(key)], Capacity(4, 4))
    rejected: list[tuple[Reason, ListedAsk]] = []
    wanted = Demand(MODEL, min_integrity=50)
    assert [entry.provider for entry in shortlist(book, wanted, START, rejected)] == [ann.address]
    assert {reason for reason, entry in rejected if entry.provider == bob.address} == {Reason.INTEGRITY}
    pinned = replace(wanted, pin=frozenset({bob.address}))
    for demand in (pinned, replace(wanted, min_integrity=51)):
        with pytest.raises(TallyError, match="audits vouch for it less than `min_integrity` asks for"):
            shortlist(book, demand, START)
    explained = explain(book.of_model(MODEL), wanted, START, lambda _provider: 1.0)
    assert {ranked.entry.provider: reason for ranked, reason in explained} == {ann.address: None, bob.address: Reason.INTEGRITY}
