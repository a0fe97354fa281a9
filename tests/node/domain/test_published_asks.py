from __future__ import annotations

from dataclasses import replace

from node.domain.published_asks import Offer, for_payers
from tallystick.protocol.link import MAX_FEATURES, read_asks
from tallystick.protocol.payer_rules import MAX_RULE_WALLETS, PayerRule, payer_rule
from tallystick.protocol.pricing import Prices
from tallystick.protocol.types import Address
from tests.node.harness import DOMAIN, NOW, OFFER, PROVIDER, SEALING, make_asks

OTHER = replace(OFFER, model="other", engine="second", upstream="other")


def test_an_ask_contains_the_offer() -> None:
    """An ask contains the offer's model, prices and limits, this node's sealing key, and the provider's signature."""
    ask = make_asks().current[0]
    assert ask.verify(DOMAIN).message.provider == PROVIDER.address
    message = ask.message
    assert Prices(message.input_price, message.cached_input_price, message.output_price) == OFFER.prices
    assert (message.model, message.max_output_tokens, message.sealing_key) == ("model", 1_024, SEALING.public)
    assert (message.valid_from, message.valid_until) == (NOW, NOW + 3_600)


def test_unchanged_offers_are_not_signed_again() -> None:
    """Publishing the same offers changes nothing until half of an ask's validity has passed; then a new ask has a higher seq."""
    asks = make_asks()
    first = asks.current[0]
    assert not asks.publish([OFFER], NOW + 1_799)
    assert asks.current == (first,)
    assert asks.publish([OFFER], NOW + 1_800)
    assert asks.current[0].message.seq > first.message.seq
    assert asks.current[0].message.valid_until == NOW + 1_800 + 3_600


def test_a_changed_offer_gets_a_new_ask() -> None:
    """A new price makes a new ask; other models keep theirs, and the seqs differ."""
    asks = make_asks(OFFER, OTHER)
    first = asks.current
    dearer: Offer = replace(OTHER, prices=Prices(1, 1, 1))
    assert asks.publish([OFFER, dearer], NOW + 1)
    assert asks.current[0] == first[0]
    assert asks.current[1].message.input_price == 1
    assert len({ask.message.seq for ask in (*first, *asks.current)}) == 3


def test_withdrawn_asks_are_gone_at_once() -> None:
    """While an engine is down, orders that name its asks are refused; the asks of other engines stay."""
    asks = make_asks(OFFER, OTHER)
    ask, others = asks.current
    assert asks.publish([OTHER], NOW + 1)
    assert asks.find(ask.digest, NOW + 1) is None
    assert asks.find(others.digest, NOW + 1) is not None
    assert asks.offers == (OTHER,)


def test_seqs_grow_over_restarts() -> None:
    """A restarted node signs higher seqs without having stored any."""
    assert make_asks(now=NOW + 10).current[0].message.seq > make_asks(now=NOW).current[0].message.seq


def test_an_ask_that_no_coordinator_reads_is_left_out() -> None:
    """For it, a coordinator would refuse the whole node: such as one that lists many wallets beside many features."""
    many = replace(OFFER.spec, features=tuple(f"feature-{number}" for number in range(MAX_FEATURES - 2)))
    wallets = PayerRule(frozenset(Address(f"0x{number:040x}") for number in range(3)))
    offer = replace(OFFER, spec=many)
    asks = make_asks(offer, for_payers(offer, Prices(1, 1, 1), wallets))
    assert asks.offers == (offer,)
    read_asks([ask.to_json() for ask in asks.current])


def test_asks_for_some_payers_take_no_room_of_others() -> None:
    """What everybody may buy is listed first if not all asks have room."""
    wallets = PayerRule(frozenset(Address(f"0x{number:040x}") for number in range(MAX_RULE_WALLETS)))
    models = [replace(OFFER, model=f"model-{number}") for number in range(40)]
    offers = [each for offer in models for each in (offer, for_payers(offer, Prices(1, 1, 1), wallets))]
    asks = make_asks(*offers)
    listed = [offer for offer in asks.offers if payer_rule(offer.spec.features) is None]
    assert listed == models
    assert len(models) < len(asks.offers) < len(offers)
    read_asks([ask.to_json() for ask in asks.current])
