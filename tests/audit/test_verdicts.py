from __future__ import annotations

import random

import pytest

from tallystick.audit.verdicts import WINDOW, Audit, Finding, Referees, Verdict, judge, judge_job, judge_provider, needs_opinion

PASS, SUSPECT, INCONCLUSIVE = Verdict.PASS, Verdict.SUSPECT, Verdict.INCONCLUSIVE
REFEREES = (b"a", b"b", b"c")


def audits(*verdicts: Verdict, referees: tuple[bytes, ...] = REFEREES, first: int = 0) -> list[Audit]:
    """One job a verdict, seen by all these referees."""
    return [Audit(b"job %d" % number, referee, verdict) for number, verdict in enumerate(verdicts, first) for referee in referees]


def test_a_finding_is_suspect_above_its_threshold() -> None:
    """A finding is suspect above its threshold."""
    assert Finding("divergence", 0.005, 0.004).verdict is SUSPECT
    assert Finding("divergence", 0.004, 0.004).verdict is PASS
    assert Finding("divergence", 9.0, 0.004, conclusive=False).verdict is INCONCLUSIVE
    assert Finding("divergence", float("nan"), 0.004).verdict is INCONCLUSIVE


def test_one_suspect_test_makes_an_audit_suspect() -> None:
    """One suspect test makes an audit suspect."""
    good, bad, unknown = Finding("a", 0, 1), Finding("b", 2, 1), Finding("c", 2, 1, conclusive=False)
    assert judge([good, unknown, bad]) is SUSPECT
    assert judge([unknown, good]) is PASS
    assert judge([unknown]) is INCONCLUSIVE
    assert judge([]) is INCONCLUSIVE


def test_two_suspect_jobs_by_three_referees_confirm() -> None:
    """Two suspect jobs by three referees confirm."""
    assert judge_provider(audits(SUSPECT, SUSPECT)) is Verdict.CONFIRMED


def test_one_job_or_too_few_referees_never_confirm() -> None:
    """One job or too few referees never confirm."""
    assert judge_provider(audits(SUSPECT)) is SUSPECT
    assert judge_provider(audits(*[SUSPECT] * 50, referees=(b"a",))) is SUSPECT
    assert judge_provider(audits(*[SUSPECT] * 50, referees=(b"a", b"b"))) is SUSPECT
    assert judge_provider(audits(*[SUSPECT] * 50, referees=(b"a", b"a", b"a"))) is SUSPECT
    assert judge_provider(audits(*[SUSPECT] * 50, referees=(b"a", b"b")), Referees(opinions=2)) is Verdict.CONFIRMED


def test_referees_that_disagree_on_a_job_convict_nobody() -> None:
    """A referee that always convicts a rival counts nothing where another one sees the same job."""
    disputed = [*audits(*[SUSPECT] * 50), *audits(*[PASS] * 50, referees=(b"z",))]
    assert judge_provider(disputed) is SUSPECT
    assert judge_provider([*disputed, *audits(*[PASS] * 50, referees=(b"d", b"e", b"f"))]) is PASS


def test_a_disputed_job_is_judged_by_the_first_three_that_agree() -> None:
    """A disputed job is judged by the first three that agree."""
    votes = [*audits(SUSPECT, referees=(b"a", b"b")), *audits(PASS, referees=(b"c", b"d"))]
    assert judge_job(votes) is INCONCLUSIVE
    assert judge_job([*votes, *audits(SUSPECT, referees=(b"e",))]) is SUSPECT
    assert judge_job([*votes, *audits(PASS, referees=(b"e",))]) is PASS
    assert [judge_job(audits(verdict)) for verdict in Verdict] == [PASS, INCONCLUSIVE, SUSPECT, SUSPECT]
    assert judge_job([]) is INCONCLUSIVE


def test_a_suspect_job_needs_further_opinions_until_there_are_enough_or_one_disagrees() -> None:
    """A suspect job needs further opinions until there are enough or one disagrees."""
    job = audits(SUSPECT)
    assert [needs_opinion(job[:count]) for count in range(4)] == [False, True, True, False]
    disputed = [*job[:1], *audits(PASS, referees=(b"d", b"e", b"f"))]
    assert [needs_opinion(disputed[:count]) for count in range(5)] == [False, True, True, True, False]
    assert not needs_opinion([Audit(b"job 0", b"a", PASS)])
    assert needs_opinion([*job[:2], Audit(b"job 0", b"c", INCONCLUSIVE)])
    assert needs_opinion([*job[:2], Audit(b"job 0", b"b", SUSPECT)])  # the same referee again


def test_more_jobs_are_needed_where_more_referees_may_be_captured() -> None:
    """Where nearly a third of the referees may accuse together, four suspect jobs in a row are needed, not two."""
    wary = Referees(captured=0.3)
    assert [judge_provider(audits(*[SUSPECT] * count), wary) for count in (3, 5)] == [SUSPECT, Verdict.CONFIRMED]
    assert wary.false_suspect == pytest.approx(0.028)


def test_inconclusive_audits_count_nothing() -> None:
    """Inconclusive audits count nothing."""
    assert judge_provider(audits(*[INCONCLUSIVE] * 9)) is INCONCLUSIVE
    assert judge_provider([]) is INCONCLUSIVE
    assert judge_provider(audits(PASS, INCONCLUSIVE)) is PASS


def test_few_suspects_among_many_passes_are_chance() -> None:
    """Few suspects among many passes are chance."""
    assert judge_provider(audits(*[PASS] * 200, SUSPECT, SUSPECT)) is SUSPECT
    assert judge_provider(audits(*[PASS] * 200, *[SUSPECT] * 6)) is Verdict.CONFIRMED


def test_what_is_older_than_the_window_is_forgotten() -> None:
    """What is older than the window is forgotten."""
    history = audits(*[SUSPECT] * 9, *[PASS] * WINDOW)
    assert judge_provider(history) is PASS
    assert judge_provider(history[: -len(REFEREES)]) is SUSPECT


def test_a_cheater_on_a_fifth_of_its_jobs_is_confirmed() -> None:
    """A cheater on a fifth of its jobs is confirmed."""
    draws, history = random.Random(3), list[Audit]()
    while judge_provider(history) is not Verdict.CONFIRMED:
        history += audits(SUSPECT if draws.random() < 0.2 else PASS, first=len(history))
        assert len(history) < 60 * len(REFEREES)


def test_honest_providers_are_not_confirmed() -> None:
    """10,000 audits of honest providers of which one in 1,000 is suspect by chance."""
    draws = random.Random(4)
    for provider in range(20):
        history = audits(*(SUSPECT if draws.random() < 1e-3 else PASS for _ in range(500)))
        assert all(judge_provider(history[:end]) is not Verdict.CONFIRMED for end in range(30, 1_501, 30)), provider


@pytest.mark.parametrize(("opinions", "captured"), [(1, 0.1), (3, 1.0), (3, -0.1)])
def test_trust_in_referees_has_bounds(opinions: int, captured: float) -> None:
    """One opinion never convicts, and a share is a share."""
    with pytest.raises(ValueError, match="referees"):
        Referees(opinions, captured)
