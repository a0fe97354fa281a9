"""Integrity of what providers sell: what a report counts, who is excluded, and what the ranking makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.domain import integrity_records
from coordinator.domain.ask_book import AskBook
from coordinator.domain.integrity_records import (
    DAILY_EFFECT,
    HALF_WEIGHT,
    MAX_PRODUCTS,
    UNAUDITED,
    IntegrityRecord,
    IntegrityRecords,
    ProductKey,
    RecordChange,
    Standing,
    effect_of,
    product_key,
    report_weight,
)
from coordinator.domain.matching import shortlist
from coordinator.domain.ranking import quality_bound, reliability
from tallystick.protocol.audit_reports import AuditVerdict
from tallystick.protocol.criteria import Demand
from tallystick.protocol.link import Capacity
from tallystick.protocol.log_leaves import WEIGHT_ONE, ReportLeaf
from tallystick.protocol.messages import Spec
from tallystick.protocol.types import Address, Amount, Hash
from tests.coordinator.harness import MODEL, START, make_ask, person

ANN, BOB, EVE = person("ann"), person("bob"), person("eve")
PRODUCT = ProductKey(ANN.address, MODEL, "unknown")
PASS, SUSPECT, CONFIRMED, UNVERIFIABLE = AuditVerdict


def report(verdict: AuditVerdict = PASS, provider: Address = ANN.address, **changes: Any) -> ReportLeaf:
    """A report that counts in full."""
    members: dict[str, Any] = {
        "at": START,
        "epoch": 0,
        "job_alias": bytes(16),
        "provider": provider,
        "model": MODEL,
        "precision": "unknown",
        "verdict": int(verdict),
        "is_probe": False,
        "weight": WEIGHT_ONE,
        "report_hash": Hash(bytes(32)),
    }
    return ReportLeaf(**(members | changes))


def after(*reports: ReportLeaf) -> IntegrityRecords:
    """The records after these reports."""
    records = IntegrityRecords()
    for index, leaf in enumerate(reports, 1):
        records.apply(leaf, index)
    return records


def standing(*reports: ReportLeaf, model: str = MODEL, precision: str = "unknown") -> Standing:
    """Ann's standing after these reports."""
    return after(*reports).standing(ProductKey(ANN.address, model, precision))


def test_a_newcomer_starts_low_and_earns_its_place() -> None:
    """Each passed audit counts, and the number of audits is told."""
    assert standing() == UNAUDITED == Standing(17, 0)
    assert standing(report()) > UNAUDITED
    assert standing(*[report()] * 50) == (882, 50)


def test_products_are_apart() -> None:
    """Another model or precision of the same provider is another product, and others' reports are not its own."""
    assert standing(report(model="other"), report(precision="fp8"), report(provider=BOB.address)) == UNAUDITED
    fp8 = product_key(make_ask(ANN, spec=Spec(precision=" FP8")).message)
    assert fp8 == (ANN.address, MODEL, "fp8")
    assert after(report(precision="fp8")).standing(fp8).audits == 1


def test_a_report_without_weight_and_one_of_a_later_kind_change_nothing_but_the_leaf() -> None:
    """A verdict that this release does not know is no verdict."""
    for leaf in (report(weight=0), report(verdict=SUSPECT, weight=0)):
        assert IntegrityRecord().after(leaf, 7).standing == UNAUDITED
    assert IntegrityRecord().after(report(), 7).leaf == 7
    assert standing(ReportLeaf(**{name: getattr(report(), name) for name in ReportLeaf.__slots__} | {"verdict": 9})) == UNAUDITED


def test_reports_of_payers_alone_exclude_nobody() -> None:
    """However often payers accuse, a provider comes where a stranger is; the coordinator's own finding excludes it."""
    accused = standing(*[report(CONFIRMED)] * 20)
    assert 0 < accused.integrity <= UNAUDITED.integrity
    assert standing(*[report()] * 30, report(SUSPECT, is_probe=True)).integrity > 700
    assert standing(*[report()] * 30, report(CONFIRMED, is_probe=True)).integrity == 0


def test_a_provider_that_is_excluded_for_one_product_is_excluded_for_all() -> None:
    """No other name of the model or of its precision washes it clean, neither one with audits nor one without."""
    caught = report(CONFIRMED, is_probe=True)
    for model, precision in ((MODEL, "fp8"), ("other", "unknown")):
        assert standing(caught, model=model, precision=precision) == (0, 0)
        praised = report(model=model, precision=precision)
        assert standing(*[praised] * 9, caught, model=model, precision=precision) == (0, 9)
    assert after(caught).standing(ProductKey(BOB.address, MODEL, "unknown")) == UNAUDITED


def test_weight_grows_with_what_others_were_paid() -> None:
    """Half at HALF_WEIGHT, less for each further report on the same product, and a tenth for a conviction."""
    settled = {BOB.address: HALF_WEIGHT}
    assert report_weight(PASS, ANN.address, settled, 0, is_probe=False) == WEIGHT_ONE // 2
    assert report_weight(PASS, ANN.address, settled, 4, is_probe=False) == WEIGHT_ONE // 10
    assert report_weight(CONFIRMED, ANN.address, settled, 0, is_probe=False) == WEIGHT_ONE // 20
    assert report_weight(SUSPECT, ANN.address, {}, 0, is_probe=False) == 0
    assert report_weight(SUSPECT, ANN.address, {BOB.address: Amount(10**18)}, 0, is_probe=False) == WEIGHT_ONE - 1
    assert report_weight(SUSPECT, ANN.address, {}, 9, is_probe=True) == WEIGHT_ONE


def test_a_pass_without_evidence_counts_a_quarter() -> None:
    """Text alone does not show a quantization; what it does show counts in full."""
    settled = {BOB.address: HALF_WEIGHT}
    assert report_weight(PASS, ANN.address, settled, 0, is_probe=False, has_evidence=False) == WEIGHT_ONE // 8
    assert report_weight(SUSPECT, ANN.address, settled, 0, is_probe=False, has_evidence=False) == WEIGHT_ONE // 2
    assert report_weight(PASS, ANN.address, {}, 0, is_probe=True, has_evidence=False) == WEIGHT_ONE // 4
    assert report_weight(CONFIRMED, ANN.address, {}, 0, is_probe=True, has_evidence=False) == WEIGHT_ONE


def test_an_unverifiable_answer_counts_a_quarter_of_a_suspect_one_and_excludes_nobody() -> None:
    """With evidence or without, by a payer or a probe: it proves nothing."""
    settled = {BOB.address: HALF_WEIGHT}
    for has_evidence in (True, False):
        assert report_weight(UNVERIFIABLE, ANN.address, settled, 0, is_probe=False, has_evidence=has_evidence) == WEIGHT_ONE // 8
        assert report_weight(UNVERIFIABLE, ANN.address, {}, 0, is_probe=True, has_evidence=has_evidence) == WEIGHT_ONE // 4
    quarter = [report(UNVERIFIABLE, weight=WEIGHT_ONE // 4, is_probe=True)] * 200
    assert 0 < standing(*quarter).integrity < UNAUDITED.integrity
    assert after(*quarter).record(ProductKey(ANN.address, MODEL, "unknown")).probe_failures == 0
    passed = [report()] * 30
    assert standing(*passed, report(SUSPECT)).integrity < standing(*passed, quarter[0]).integrity < standing(*passed).integrity


def test_nobody_lends_weight_to_its_own_praise() -> None:
    """What a payer paid to the provider counts against it alone."""
    settled = {ANN.address: HALF_WEIGHT}
    assert report_weight(PASS, ANN.address, settled, 0, is_probe=False) == 0
    assert report_weight(SUSPECT, ANN.address, settled, 0, is_probe=False) == WEIGHT_ONE // 2


@pytest.mark.parametrize("payers", [1, 20, 100])
@pytest.mark.parametrize("verdict", list(AuditVerdict))
def test_coins_that_go_round_make_little_in_a_day(payers: int, verdict: AuditVerdict) -> None:
    """However many keys are paid from the same coins, they lift a newcomer and hurt an honest provider by a few audits a day."""
    settled, effect, reports = {BOB.address: HALF_WEIGHT * 9}, 0, [] if verdict is PASS else [report()] * 200
    for _ in range(payers):
        weight = report_weight(verdict, ANN.address, settled, 0, is_probe=False, day_effect=effect)
        effect += effect_of(verdict, weight)
        reports.append(report(verdict, weight=weight))
    assert effect <= DAILY_EFFECT
    assert (effect == DAILY_EFFECT) is (payers > (20 if verdict is UNVERIFIABLE else 1))
    integrity = standing(*reports).integrity
    assert integrity < 420 if verdict is PASS else integrity > 900


def test_the_bound_of_a_day_is_exact_and_not_for_probes() -> None:
    """The last report of a day counts what is left; the coordinator's own always counts in full."""
    settled = {BOB.address: HALF_WEIGHT}
    for verdict, full in ((PASS, WEIGHT_ONE // 2), (SUSPECT, WEIGHT_ONE // 2), (CONFIRMED, WEIGHT_ONE // 20)):
        step = effect_of(verdict, 1)
        for left, weight in ((full * step, full), (full * step - 1, full - 1), (step, 1), (step - 1, 0), (0, 0), (-9, 0)):
            spent = DAILY_EFFECT - left
            assert report_weight(verdict, ANN.address, settled, 0, is_probe=False, day_effect=spent) == weight
        assert report_weight(verdict, ANN.address, {}, 0, is_probe=True, day_effect=DAILY_EFFECT) == WEIGHT_ONE


def test_a_flood_of_products_is_bounded() -> None:
    """A provider's products with the oldest reports are forgotten, and the first ones are unaudited again."""
    records = after(*[report(model=f"m{number}") for number in range(MAX_PRODUCTS + 3)])
    assert len(records.standings(ANN.address)) == MAX_PRODUCTS
    assert records.standing(ProductKey(ANN.address, "m2", "unknown")) == UNAUDITED
    assert records.standing(ProductKey(ANN.address, "m3", "unknown")).audits == 1


@pytest.mark.parametrize("weight", [0, 1, WEIGHT_ONE])
@pytest.mark.parametrize("caught", [SUSPECT, CONFIRMED])
def test_no_flood_of_products_evicts_what_the_coordinator_found(weight: int, caught: AuditVerdict) -> None:
    """Whatever the reports on other products weigh, the record of a failed probe stays, and a provider stays excluded."""
    flood = [report(model=f"m{number}", weight=weight) for number in range(3 * MAX_PRODUCTS)]
    records = after(*[report(caught, is_probe=True)] * 3, *flood)
    assert records.record(PRODUCT).probe_failures == 3
    assert records.standing(PRODUCT) == standing(*[report(caught, is_probe=True)] * 3)
    assert len(records.standings(ANN.address)) <= MAX_PRODUCTS
    assert records.best(ANN.address) == 0


@pytest.mark.parametrize("weight", [0, 1, WEIGHT_ONE])
def test_no_flood_of_light_products_evicts_a_good_record(weight: int) -> None:
    """Products make way by weight: an honest provider keeps what many audits made."""
    records = after(*[report()] * 50, *[report(SUSPECT, model=f"m{number}", weight=weight) for number in range(3 * MAX_PRODUCTS)])
    assert records.standing(PRODUCT) == (882, 50)


def test_a_report_that_counts_nothing_begins_no_record() -> None:
    """Neither one without weight nor one of an unknown verdict; on a known product they leave everything as it is."""
    records = IntegrityRecords()
    for leaf in (report(weight=0), report(SUSPECT, weight=0), replace(report(), verdict=9)):
        assert records.apply(leaf, 1) == RecordChange(PRODUCT, None)
    assert records.standings(ANN.address) == {}
    assert records.apply(report(), 2).record is not None
    assert records.apply(report(weight=0), 3).record == replace(records.record(PRODUCT), leaf=3)
    assert PRODUCT in records.standings(ANN.address)


def test_the_oldest_product_of_all_is_forgotten_except_one_that_the_coordinator_found_false(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The change names what made way, and its provider's ask is ranked as a stranger's at once."""
    monkeypatch.setattr(integrity_records, "MAX_REMEMBERED", 2)
    changed = list[Address]()
    records = IntegrityRecords(changed.append)
    people = [person(f"provider {number}").address for number in range(4)]
    for index, provider in enumerate(people[:3]):
        change = records.apply(report(SUSPECT, provider=provider, is_probe=index == 0), index)
    assert change.forgotten == (ProductKey(people[1], MODEL, "unknown"),)
    assert set(changed[-2:]) == {people[1], people[2]}
    assert records.apply(report(provider=people[3]), 3).forgotten == (ProductKey(people[2], MODEL, "unknown"),)
    assert records.record(ProductKey(people[0], MODEL, "unknown")).probe_failures == 1


def test_a_restart_changes_nothing() -> None:
    """Records that were stored are the same again."""
    reports = [report(), report(SUSPECT), report(model="other"), report(CONFIRMED, is_probe=True, provider=BOB.address)]
    first, second, changed = after(*reports), IntegrityRecords(), list[Address]()
    second.on_change = changed.append
    second.restore((key, first.record(key)) for key in (*first.standings(ANN.address), *first.standings(BOB.address)))
    assert second.standings(ANN.address) == first.standings(ANN.address)
    assert second.standings(BOB.address) == first.standings(BOB.address)
    assert changed == [ANN.address, ANN.address, BOB.address]


def ranking(records: IntegrityRecords, prices: dict[Address, int]) -> list[Address]:
    """The shortlist among ann, bob and eve, who never fail, at these prices (base units per token)."""
    book = AskBook()
    book.standing = lambda ask: records.standing(product_key(ask))
    for key in (ANN, BOB, EVE):
        price = prices[key.address] * 1_000_000
        ask = make_ask(key, input_price=price, cached_input_price=price, output_price=price)
        book.replace(key.address, [ask], Capacity(4, 4), reliability(1.0), quality_bound(1.0, records.best(key.address)))
    return [entry.provider for entry in shortlist(book, Demand(MODEL), START)]


def test_expected_loss_is_added_to_the_price() -> None:
    """An audited provider comes before a cheaper stranger, not before one at a third of its price, and a cheater comes last."""
    records = after(*[report()] * 100, report(CONFIRMED, provider=EVE.address, is_probe=True))
    assert ranking(records, {ANN.address: 4, BOB.address: 3, EVE.address: 1}) == [ANN.address, BOB.address, EVE.address]
    assert ranking(records, {ANN.address: 9, BOB.address: 3, EVE.address: 1}) == [BOB.address, ANN.address, EVE.address]


@pytest.mark.parametrize("score", [0.0, 0.25, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("integrity", [0, 1, 17, 18, 500, 999, 1_000])
def test_the_bound_of_the_index_is_never_below_the_quality(score: float, integrity: int) -> None:
    """Otherwise a search would end before the best provider."""
    assert 64_000 * score + 64 * integrity <= quality_bound(score, integrity) <= 128_000
