from __future__ import annotations

from dataclasses import replace

from node.domain.published_asks import Offer
from tallystick.protocol.pricing import Prices
from tests.node.harness import DOMAIN, NOW, OFFER, PROVIDER, SEALING, ask_book

OTHER = replace(OFFER, model="other", engine="second", upstream="other")


def test_an_ask_says_what_the_offer_says() -> None:
    """A standing ask carries the offer's model, prices and limits, this node's sealing key, and the provider's signature."""
    ask = ask_book().current[0]
    assert ask.verify(DOMAIN).message.provider == PROVIDER.address
    message = ask.message
    assert Prices(message.input_price, message.cached_input_price, message.output_price) == OFFER.prices
    assert (message.model, message.max_output_tokens, message.sealing_key) == ("model", 1_024, SEALING.public)
    assert (message.valid_from, message.valid_until) == (NOW, NOW + 3_600)


def test_unchanged_offers_are_not_signed_again() -> None:
    """Offering the same again changes nothing until half of an ask's validity has passed; then a new ask with a higher seq."""
    book = ask_book()
    first = book.current[0]
    assert not book.publish([OFFER], NOW + 1_799)
    assert book.current == (first,)
    assert book.publish([OFFER], NOW + 1_800)
    assert book.current[0].message.seq > first.message.seq
    assert book.current[0].message.valid_until == NOW + 1_800 + 3_600


def test_a_changed_offer_gets_an_ask_of_its_own() -> None:
    """A new price is a new ask; the other models keep theirs, and seqs differ."""
    book = ask_book(OFFER, OTHER)
    first = book.current
    dearer: Offer = replace(OTHER, prices=Prices(1, 1, 1))
    assert book.publish([OFFER, dearer], NOW + 1)
    assert book.current[0] == first[0]
    assert book.current[1].message.input_price == 1
    assert len({ask.message.seq for ask in (*first, *book.current)}) == 3


def test_withdrawn_asks_are_gone_at_once() -> None:
    """When an engine is down, orders on its asks find nothing, old or new; the other engine's asks stand."""
    book = ask_book(OFFER, OTHER)
    mine, others = book.current
    assert book.publish([OTHER], NOW + 1)
    assert book.find(mine.digest, NOW + 1) is None
    assert book.find(others.digest, NOW + 1) is not None
    assert book.offers == (OTHER,)


def test_seqs_grow_over_restarts() -> None:
    """A node that starts again later signs higher seqs without remembering any."""
    assert ask_book(now=NOW + 10).current[0].message.seq > ask_book(now=NOW).current[0].message.seq
