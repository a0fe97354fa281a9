from __future__ import annotations

import random

import pytest

from tallystick.audit.verdicts import WINDOW, Audit, Finding, Verdict, judge, judge_provider

PASS, SUSPECT, INCONCLUSIVE = Verdict.PASS, Verdict.SUSPECT, Verdict.INCONCLUSIVE
A, B = b"referee a", b"referee b"


def audits(*verdicts: Verdict, referees: tuple[bytes, ...] = (A, B), first: int = 0) -> list[Audit]:
    """One audit a job, by the referees in turn."""
    return [Audit(b"job %d" % (first + n), referees[n % len(referees)], verdict) for n, verdict in enumerate(verdicts)]


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


def test_two_suspect_jobs_by_two_referees_confirm() -> None:
    """Two suspect jobs by two referees confirm."""
    assert judge_provider(audits(SUSPECT, SUSPECT)) is Verdict.CONFIRMED


def test_one_audit_or_one_referee_never_confirms() -> None:
    """One audit or one referee never confirms."""
    assert judge_provider(audits(SUSPECT)) is SUSPECT
    assert judge_provider(audits(*[SUSPECT] * 50, referees=(A,))) is SUSPECT
    same_job = [Audit(b"job", A, SUSPECT), Audit(b"job", B, SUSPECT)]
    assert judge_provider(same_job) is SUSPECT


def test_referees_that_disagree_on_a_job_convict_nobody() -> None:
    """A referee that always convicts a rival counts nothing where others audit the same job."""
    disputed = [audit for n in range(50) for audit in (Audit(b"%d" % n, A, SUSPECT), Audit(b"%d" % n, B, PASS))]
    assert judge_provider(disputed) is PASS


def test_a_referee_that_accuses_alone_does_not_confirm_with_passes_of_others() -> None:
    """A referee that accuses alone does not confirm with passes of others."""
    mixed = [Audit(b"%d" % n, A, SUSPECT) if n % 2 else Audit(b"%d" % n, B, PASS) for n in range(100)]
    assert judge_provider(mixed) is SUSPECT


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
    assert judge_provider(history[:-1]) is SUSPECT


def test_a_cheater_on_a_fifth_of_its_jobs_is_confirmed() -> None:
    """A cheater on a fifth of its jobs is confirmed."""
    draws, history = random.Random(3), list[Audit]()
    while judge_provider(history) is not Verdict.CONFIRMED:
        history += audits(SUSPECT if draws.random() < 0.2 else PASS, first=len(history), referees=((A, B)[len(history) % 2],))
        assert len(history) < 60


def test_honest_providers_are_not_confirmed() -> None:
    """10,000 audits of honest providers of which one in 1,000 is suspect by chance."""
    draws = random.Random(4)
    for provider in range(20):
        history = audits(*(SUSPECT if draws.random() < 1e-3 else PASS for _ in range(500)))
        assert all(judge_provider(history[:end]) is not Verdict.CONFIRMED for end in range(10, 501, 10)), provider


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_the_share_of_false_suspects_is_a_probability(share: float) -> None:
    """The share of false suspects is a probability."""
    with pytest.raises(ValueError, match="false_suspect"):
        judge_provider([], false_suspect=share)
