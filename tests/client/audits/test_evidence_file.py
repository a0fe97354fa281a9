from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest

from tallystick.audit.thresholds import Thresholds
from tallystick.client.audits.consequences import read_opinion
from tallystick.client.audits.evidence_file import AuditEvidence, Case, read_audit_evidence
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.store import AuditStore
from tallystick.protocol.errors import BadMessage, BadReceipt, TallyError
from tallystick.protocol.messages import Spec
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.routes import SCORES
from tallystick.protocol.token_evidence import pack_evidence
from tests.client.audits.parties import ALICE, HONEST, REQUEST, Referees, build_bench, seller, sold
from tests.client.audits.test_conduct import OTHER_MODEL, conduct, honest_market
from tests.client.audits.toy_model import ToyModel
from tests.client.parties import Provider

OTHER_REQUEST = REQUEST | {"messages": [{"role": "user", "content": "Another question"}]}


async def gather(
    store: AuditStore, served: ToyModel, jobs: int = 3, market: Referees | None = None, provider: Provider = ALICE
) -> AuditEvidence:
    """The evidence after audits of a provider that serves this model."""
    bench = build_bench(store, market or honest_market())
    cases: list[Case] = []
    for _ in range(jobs):
        kept = sold(provider, served)
        await conduct(bench, kept)
        conclusion, _ = bench.conclusions[-1]
        signed = tuple(read_opinion(opinion.scores) for opinion in conclusion.opinions if opinion.scores is not None)
        cases.append(Case(kept, signed))
    return AuditEvidence(ALICE.address, REQUEST["model"], "bf16", jobs, Thresholds(), tuple(cases))


async def test_anyone_can_judge_it_offline(store: AuditStore) -> None:
    """Signatures, roots, rows, the referees' numbers: all of it is computed again from the bytes."""
    evidence = await gather(store, OTHER_MODEL)
    read = read_audit_evidence(evidence.dumps())
    assert read.dumps() == evidence.dumps()
    findings = read.check()
    assert findings[-1].check == "verdict"
    assert ALICE.address in findings[-1].found
    assert sum("suspect" in finding.found for finding in findings) == 9


@pytest.mark.parametrize("spelled", ["bf16", "BF16", "bfloat16", " BFloat16 ", "fp16", "half", "F16", "float32", "fp32"])
async def test_a_class_has_many_spellings(store: AuditStore, spelled: str) -> None:
    """That of the seller's ask, those of the referees' asks, and that in the file may differ."""
    spec = Spec(precision=spelled, features=(SCORES,))
    product = precision_class(spelled)
    market = Referees()
    for number, other in enumerate((spelled, product, spelled.upper())):
        market.add(f"referee{number}", HONEST.score, spec=Spec(precision=other, features=(SCORES,)))
    evidence = await gather(store, OTHER_MODEL, market=market, provider=seller("alice", spec=spec))
    for written in (product, spelled):
        findings = read_audit_evidence(replace(evidence, precision=written).dumps()).check()
        assert findings[-1].check == "verdict"
    with pytest.raises(BadMessage, match="expected an ask for the class"):
        replace(evidence, precision="int4").check()


async def test_honest_answers_convict_nobody(store: AuditStore) -> None:
    """Whatever the payer writes beside them."""
    evidence = await gather(store, HONEST)
    with pytest.raises(BadReceipt, match="0 of 3"):
        evidence.check()


async def test_few_suspects_among_many_audits_convict_nobody(store: AuditStore) -> None:
    """Chance finds somebody, sooner or later."""
    evidence = replace(await gather(store, OTHER_MODEL, 2), audits=5_000)
    with pytest.raises(BadReceipt, match="too few"):
        evidence.check()


async def test_one_referee_is_too_few(store: AuditStore) -> None:
    """However many answers it finds suspect."""
    evidence = await gather(store, OTHER_MODEL, 6, honest_market(1))
    with pytest.raises(BadReceipt, match="too few"):
        evidence.check()


async def test_the_payers_thresholds_cannot_convict(store: AuditStore) -> None:
    """A reader uses its own where they are higher; a calibrated higher one counts."""
    slightly = ToyModel(1, noise=0.0005)
    evidence = replace(await gather(store, slightly), thresholds=Thresholds(divergence=1e-9))
    with pytest.raises(BadReceipt):
        evidence.check()
    cheated = replace(await gather(store, OTHER_MODEL), thresholds=Thresholds(divergence=50.0, surprisal=1e9))
    with pytest.raises(BadReceipt):
        cheated.check()


def other_prompt(evidence: AuditEvidence) -> AuditEvidence:
    """The payer shows referees another prompt than it ordered an answer to."""
    lie = sold(ALICE, HONEST, request=OTHER_REQUEST)
    tokens = tuple(row.token for row in lie.rows)
    told = sold(ALICE, HONEST, tokens=tokens)
    return replace(evidence, cases=(replace(evidence.cases[0], kept=told), *evidence.cases[1:]))


def other_rows(evidence: AuditEvidence) -> AuditEvidence:
    """The payer puts rows under the provider's name that it never signed."""
    case = evidence.cases[0]
    forged = replace(case.kept, evidence=pack_evidence(case.kept.rows[:-1]))
    return replace(evidence, cases=(replace(case, kept=forged), *evidence.cases[1:]))


def other_provider(evidence: AuditEvidence) -> AuditEvidence:
    """The answers are of somebody else."""
    return replace(evidence, provider=seller("bob").address)


def other_class(evidence: AuditEvidence) -> AuditEvidence:
    """The model was sold in another precision than the payer says."""
    return replace(evidence, precision="fp32")


def without_ask(evidence: AuditEvidence) -> AuditEvidence:
    """The class that was sold cannot be seen."""
    case = evidence.cases[0]
    return replace(evidence, cases=(replace(case, kept=replace(case.kept, ask=None)),))


def other_ask(evidence: AuditEvidence) -> AuditEvidence:
    """An ask that the order is not on."""
    case = evidence.cases[0]
    ask = seller("alice", output_price=1).ask
    return replace(evidence, cases=(replace(case, kept=replace(case.kept, ask=ask)),))


def other_numbers(evidence: AuditEvidence) -> AuditEvidence:
    """The payer changes what a referee signed."""
    case = evidence.cases[0]
    opinion = case.opinions[0]
    body = opinion.proof.response[1].replace(b"-1", b"-2", 1)
    forged = replace(opinion, proof=replace(opinion.proof, response=(opinion.proof.response[0], body)))
    return replace(evidence, cases=(replace(case, opinions=(forged, *case.opinions[1:])),))


def own_word(evidence: AuditEvidence) -> AuditEvidence:
    """The provider's own scoring."""
    case = evidence.cases[0]
    opinion = replace(case.opinions[0], proof=case.kept.proof)
    return replace(evidence, cases=(replace(case, opinions=(opinion,)),))


@pytest.mark.parametrize(
    "forge", [other_prompt, other_rows, other_provider, other_class, without_ask, other_ask, other_numbers, own_word]
)
async def test_forgeries_are_refused(store: AuditStore, forge: Callable[[AuditEvidence], AuditEvidence]) -> None:
    """Each names what is wrong."""
    evidence = forge(await gather(store, OTHER_MODEL))
    with pytest.raises((BadMessage, BadReceipt)) as caught:
        read_audit_evidence(evidence.dumps()).check()
    assert str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"provider": 1},
        {"audits": -1},
        {"audits": True},
        {"cases": {}},
        {"cases": [1]},
        {"cases": [{}]},
        {"thresholds": {"divergence": 1.0}},
        {"thresholds": {"divergence": "nan"}},
        {"thresholds": {"divergence": "x"}},
        {"thresholds": {"other": "1"}},
        {"tallystick": "proof/1"},
    ],
)
async def test_malformed_files_are_refused(store: AuditStore, change: dict[str, Any]) -> None:
    """With an error that names the member."""
    raw = orjson.loads((await gather(store, OTHER_MODEL, 1)).dumps()) | change
    with pytest.raises(TallyError):
        read_audit_evidence(orjson.dumps(raw)).check()


def test_kept_jobs_of_any_bytes_are_refused() -> None:
    """A damaged file of kept jobs is an error of its own kind."""
    good = sold(ALICE, HONEST).pack()
    for data in (b"", good[:100], good[:-1], b"\xff" * 64, good.replace(b'"share"', b'"shar3"', 1)):
        with pytest.raises(BadMessage):
            KeptJob.unpack(data)
