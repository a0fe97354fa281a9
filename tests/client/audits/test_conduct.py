from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.audit.verdicts import Verdict
from tallystick.client.audit_settings import PromptConsent
from tallystick.client.audits.conduct import NoReferee
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.records import KnownAudit, NewAudit
from tallystick.client.audits.schema import AuditKind, AuditState, Origin
from tallystick.client.audits.store import AuditStore
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse, ScoreRow
from tallystick.protocol.types import ZERO_ADDRESS
from tests.client.audits.parties import ALICE, HONEST, Bench, Referees, build_bench, seller, shown_prompt, sold
from tests.client.audits.toy_model import ToyModel, completion_tokens
from tests.client.parties import NOW_S

OTHER_MODEL, COARSER = ToyModel(2), ToyModel(1, noise=0.3)


async def plan(store: AuditStore, kept: KeptJob, kind: AuditKind = AuditKind.JOB) -> KnownAudit:
    """Plans an audit of a kept job."""
    job = "" if kind is AuditKind.SYNTHETIC else kept.job.hex()
    new = NewAudit(kind, Origin.DRAWN, kept.provider, kept.model, kept.precision, job, kept.pack())
    number = await store.add(new, NOW_S)
    assert number is not None
    audit = await store.get(number)
    assert audit is not None
    return audit


async def conduct(bench: Bench, kept: KeptJob) -> Verdict:
    """Audits a job, and returns the verdict on it."""
    return (await bench.conductor.conduct(await plan(bench.store, kept))).verdict


def honest_market(count: int = 3) -> Referees:
    """Referees that have the model."""
    market = Referees()
    for number in range(count):
        market.add(f"referee{number}", HONEST.score)
    return market


async def test_an_honest_answer_passes_with_one_referee(store: AuditStore) -> None:
    """The prompt, the tokens and positions are what a referee sees, and nothing of the provider's numbers."""
    market = honest_market()
    kept = sold(ALICE, HONEST)
    assert await conduct(build_bench(store, market), kept) is Verdict.PASS
    assert len(market.asked) == 1
    _, request = market.asked[0]
    assert set(request.to_json()) == {"model", "messages", "completion", "positions", "top"}
    assert shown_prompt(request) == {"messages": [{"role": "user", "content": "What is a tally?"}]}
    assert request.completion in (tuple(row.token for row in kept.rows), " ".join(str(row.token) for row in kept.rows))


@pytest.mark.parametrize("cheap", [OTHER_MODEL, COARSER])
async def test_another_model_is_suspect_to_three_referees(store: AuditStore, cheap: ToyModel) -> None:
    """A suspect job is shown to further referees until three agree."""
    market = honest_market(5)
    bench = build_bench(store, market)
    assert await conduct(bench, sold(ALICE, cheap)) is Verdict.SUSPECT
    assert len({name for name, _ in market.asked}) == 3
    conclusion, _ = bench.conclusions[0]
    assert conclusion.provider is Verdict.SUSPECT


async def test_one_model_writes_what_the_other_scores(store: AuditStore) -> None:
    """The provider's numbers are right, and the text is not drawn from the model: the surprisal shows it."""
    bench = build_bench(store, honest_market())
    assert await conduct(bench, sold(ALICE, HONEST, writer=OTHER_MODEL)) is Verdict.SUSPECT
    assert {finding.test for finding in bench.conclusions[0][0].opinions[0].findings if finding.verdict is Verdict.SUSPECT} == {
        "surprisal"
    }


async def test_two_suspect_jobs_confirm_a_provider(store: AuditStore) -> None:
    """Never one audit, never one referee."""
    bench = build_bench(store, honest_market())
    for _ in range(2):
        await conduct(bench, sold(ALICE, OTHER_MODEL))
    assert [conclusion.provider for conclusion, _ in bench.conclusions] == [Verdict.SUSPECT, Verdict.CONFIRMED]


async def test_one_referee_never_confirms(store: AuditStore) -> None:
    """With a single referee, suspect jobs stay inconclusive, however many there are."""
    bench = build_bench(store, honest_market(1))
    for _ in range(5):
        await conduct(bench, sold(ALICE, OTHER_MODEL))
    assert {conclusion.provider for conclusion, _ in bench.conclusions} == {Verdict.SUSPECT}


async def test_a_referee_that_accuses_alone_loses_the_dispute(store: AuditStore) -> None:
    """It convicts a rival whatever it wrote: the others pass the answer, and it is not asked again."""
    market = honest_market(4)

    def convict(request: ScoreRequest) -> ScoreResponse:
        return OTHER_MODEL.score(request)

    market.scores["referee0"] = convict
    bench = build_bench(store, market, opinions=2)
    for _ in range(40):
        await conduct(bench, sold(ALICE, HONEST))
    records = await store.referee_records()
    liar = market.providers["referee0"].address
    assert not records[liar].trusted
    assert all(record.trusted for name, record in records.items() if name != liar)
    assert {conclusion.provider for conclusion, _ in bench.conclusions} <= {Verdict.PASS, Verdict.INCONCLUSIVE}
    asked = [name for name, _ in market.asked]
    await conduct(bench, sold(ALICE, HONEST))
    assert [name for name, _ in market.asked[len(asked) :]] != ["referee0"]


async def test_a_referee_never_judges_itself_or_twice(store: AuditStore) -> None:
    """The provider sells scoring too, and is the only other one."""
    market = Referees()
    market.providers["alice"], market.scores["alice"] = ALICE, HONEST.score
    with pytest.raises(NoReferee, match="no other provider"):
        await conduct(build_bench(store, market), sold(ALICE, HONEST))


@pytest.mark.parametrize("precision", ["fp8", "unknown"])
async def test_other_classes_do_not_judge(store: AuditStore, precision: str) -> None:
    """A precision class is a product of its own."""
    market = Referees()
    spec = replace(ALICE.ask.message.spec, precision=precision)
    market.add("other", HONEST.score, spec=spec)
    with pytest.raises(NoReferee):
        await conduct(build_bench(store, market), sold(ALICE, HONEST))


@pytest.mark.parametrize("consent", [PromptConsent(), PromptConsent(may_share=True, private=True)])
async def test_without_consent_nobody_sees_the_prompt(store: AuditStore, consent: PromptConsent) -> None:
    """Not even if nobody else can judge the answer."""
    market = honest_market()
    with pytest.raises(NoReferee, match="share_prompts"):
        await conduct(build_bench(store, market), sold(ALICE, HONEST, consent=consent))
    assert market.asked == []


async def test_a_made_up_request_is_shown_in_its_place(store: AuditStore) -> None:
    """It is ordered like any other job. Whoever answers it is audited."""
    market = honest_market()
    market.served, market.seller = OTHER_MODEL, seller("mallory")
    bench = build_bench(store, market)
    like = sold(ALICE, OTHER_MODEL, consent=PromptConsent())
    audit = await plan(store, like, AuditKind.SYNTHETIC)
    conclusion = await bench.conductor.conduct(audit)
    assert conclusion.verdict is Verdict.SUSPECT
    assert len(market.placed) == 1
    assert conclusion.audit.provider == market.seller.address
    assert len(await store.history(market.seller.address, like.model, like.precision)) == 3
    assert all("tally" not in repr(shown_prompt(request)) for _, request in market.asked)
    assert conclusion.audit.job not in ("", like.job.hex())
    assert conclusion.audit.cost > sum(opinion.cost for opinion in conclusion.opinions)


async def test_referees_that_cost_much_more_are_not_asked(store: AuditStore) -> None:
    """Nobody gets rich by judging others: three times the price of the answer is the most."""
    market = Referees()
    market.add("dear", HONEST.score, input_price=1_200_001)
    with pytest.raises(NoReferee):
        await conduct(build_bench(store, market), sold(ALICE, HONEST))
    market.add("fair", HONEST.score, input_price=1_200_000, output_price=0)
    assert await conduct(build_bench(store, market), sold(ALICE, HONEST)) is Verdict.PASS
    assert {name for name, _ in market.asked} == {"fair"}


def nothing(request: ScoreRequest) -> ScoreResponse:
    """A referee that has no row to offer."""
    return ScoreResponse(request.model, 1, completion_tokens(request), tuple(None for _ in request.positions))


async def test_missing_rows_are_nobodys_guilt(store: AuditStore) -> None:
    """A referee without rows is inconclusive, and so is an audit in which all are."""
    market = Referees()
    for number in range(6):
        market.add(f"silent{number}", nothing)
    bench = build_bench(store, market)
    assert await conduct(bench, sold(ALICE, OTHER_MODEL)) is Verdict.INCONCLUSIVE
    assert len(market.asked) == 3


async def test_rows_of_other_tokens_are_nobodys_guilt(store: AuditStore) -> None:
    """A referee that scored other tokens than it was asked about is a bad referee, and says nothing of the provider."""

    def shifted(request: ScoreRequest) -> ScoreResponse:
        response = HONEST.score(request)
        rows = [row and ScoreRow(row.position, (row.token or 0) + 1, row.logprob, row.top) for row in response.rows]
        return replace(response, rows=tuple(rows))

    market = Referees()
    market.add("shifted", shifted)
    bench = build_bench(store, market)
    assert await conduct(bench, sold(ALICE, HONEST)) is Verdict.INCONCLUSIVE
    assert (await store.referee_records())[market.providers["shifted"].address].lost == 1


async def test_an_answer_without_evidence_is_judged_by_its_text(store: AuditStore) -> None:
    """Text alone shows another model, at the declared temperature."""
    market = honest_market()
    bench = build_bench(store, market)
    assert await conduct(bench, sold(ALICE, HONEST, evidence=False)) is Verdict.PASS
    assert await conduct(bench, sold(ALICE, OTHER_MODEL, evidence=False, length=128)) is Verdict.SUSPECT


async def test_planted_bad_answers_find_referees_that_invent_numbers(store: AuditStore) -> None:
    """An honest referee finds swapped tokens unlikely; one that passes everything does not know where they are."""

    def invents(request: ScoreRequest) -> ScoreResponse:
        tokens = completion_tokens(request)
        rows = [
            ScoreRow(at, tokens[at], -0.1, ((tokens[at], -0.1), (99, -3.0))) if at < len(tokens) else None
            for at in request.positions
        ]
        return ScoreResponse(request.model, 5, tokens, tuple(rows))

    market = Referees()
    honest, liar = market.add("honest", HONEST.score), market.add("liar", invents)
    kept = sold(ALICE, HONEST)
    bench = build_bench(store, market)
    for referee, expected in ((honest, Verdict.PASS), (liar, Verdict.SUSPECT)):
        new = NewAudit(
            AuditKind.PLANTED_BAD, Origin.DRAWN, referee.address, kept.model, kept.precision, kept.job.hex(), kept.pack()
        )
        number = await store.add(new, NOW_S)
        audit = await store.get(number or 0)
        assert audit is not None
        assert (await bench.conductor.conduct(audit)).verdict is expected
    records = await store.referee_records()
    assert (records[honest.address].won, records[liar.address].lost) == (1, 1)
    assert (await store.history(honest.address, kept.model, kept.precision)) == []


async def test_referees_that_disagree_are_both_checked(store: AuditStore) -> None:
    """A planted audit for each of them follows, whatever the share of planted audits."""
    market = Referees()
    market.add("right", HONEST.score)
    market.add("wrong", OTHER_MODEL.score)
    bench = build_bench(store, market)
    for _ in range(12):
        kept = sold(ALICE, HONEST)
        await conduct(bench, kept)
    planted = [audit for audit in await store.latest(1_000) if audit.kind is AuditKind.PLANTED_BAD]
    assert {audit.provider for audit in planted} == {party.address for party in market.providers.values()}


async def test_a_check_waits_for_a_good_answer(store: AuditStore) -> None:
    """A cheater's answer is no measure of a referee: an honest one would find all of it unlikely."""
    market = honest_market(1)
    bench = build_bench(store, market, planted_percent=100)
    await conduct(bench, sold(ALICE, OTHER_MODEL))
    (waiting, _) = await store.latest(2)
    assert (waiting.kind, waiting.kept) == (AuditKind.PLANTED_BAD, None)
    assert waiting not in await store.due(NOW_S, 10)
    good = sold(ALICE, HONEST)
    await conduct(bench, good)
    due = [audit for audit in await store.due(NOW_S, 10) if audit.kind is AuditKind.PLANTED_BAD]
    assert {audit.job for audit in due} == {good.job.hex()}
    for audit in due:
        assert (await bench.conductor.conduct(audit)).verdict is Verdict.PASS
    assert {record.lost for record in (await store.referee_records()).values()} == {0}


async def test_planted_good_answers_find_referees_that_convict(store: AuditStore) -> None:
    """Another referee than those that passed the answer is shown it, whichever has not seen it."""
    market = Referees()
    liar = market.add("liar", OTHER_MODEL.score)
    kept = sold(ALICE, HONEST)
    new = NewAudit(AuditKind.PLANTED_GOOD, Origin.DRAWN, ZERO_ADDRESS, kept.model, kept.precision, kept.job.hex(), kept.pack())
    audit = await store.get(await store.add(new, NOW_S) or 0)
    assert audit is not None
    assert (await build_bench(store, market).conductor.conduct(audit)).verdict is Verdict.SUSPECT
    assert (await store.referee_records())[liar.address].lost == 1


async def test_what_was_passed_is_not_kept_and_what_is_suspect_is(store: AuditStore) -> None:
    """Contents of suspect answers are evidence."""
    bench = build_bench(store, honest_market())
    await conduct(bench, sold(ALICE, HONEST))
    await conduct(bench, sold(ALICE, OTHER_MODEL))
    suspect, passed = await store.latest(2)
    assert (suspect.kept is not None, passed.kept) == (True, None)
    assert all(opinion.scores for opinion in await store.opinions(suspect.id))
    assert not any(opinion.scores for opinion in await store.opinions(passed.id))
    assert suspect.state is AuditState.DONE


async def test_evidence_that_did_not_come_is_fetched(store: AuditStore) -> None:
    """Its provider keeps it for a day; the audit uses it as if it had come with the answer."""
    market = honest_market()
    kept = sold(ALICE, COARSER)
    market.evidence = kept.evidence
    bench = build_bench(store, market)
    assert await conduct(bench, replace(kept, evidence=b"")) is Verdict.SUSPECT
    assert market.fetched == [kept.job]


async def test_withheld_evidence_clears_nobody(store: AuditStore) -> None:
    """A provider that commits to evidence and keeps it back gains no integrity by its text, which may still accuse it."""
    market = honest_market()
    bench = build_bench(store, market)
    kept = replace(sold(ALICE, COARSER), evidence=b"")
    assert await conduct(bench, kept) is Verdict.INCONCLUSIVE
    assert "did not hand it over" in bench.conclusions[0][0].reason
    assert (await store.integrity(ALICE.address, kept.model, kept.precision)).audits == 0
    assert await conduct(bench, replace(sold(ALICE, OTHER_MODEL), evidence=b"")) is Verdict.SUSPECT


async def test_a_pass_by_the_text_alone_counts_a_quarter(store: AuditStore) -> None:
    """It does not show a quantization. Nothing is fetched where nothing was committed to."""
    market = honest_market()
    bench = build_bench(store, market)
    kept = sold(ALICE, HONEST, evidence=False)
    assert await conduct(bench, kept) is Verdict.PASS
    assert not market.fetched
    assert (await store.integrity(ALICE.address, kept.model, kept.precision)).passes == 0.25
    await conduct(bench, sold(ALICE, HONEST))
    assert 1.24 < (await store.integrity(ALICE.address, kept.model, kept.precision)).passes < 1.25
