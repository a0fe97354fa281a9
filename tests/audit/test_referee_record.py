from __future__ import annotations

from tallystick.audit.referee_record import MIN_LOST, RefereeRecord, dispute_losers
from tallystick.audit.verdicts import Audit, Verdict

PASS, SUSPECT = Verdict.PASS, Verdict.SUSPECT


def votes(**verdicts: Verdict) -> list[Audit]:
    """One job, seen by these referees."""
    return [Audit(b"job", name.encode(), verdict) for name, verdict in verdicts.items()]


def test_the_minority_of_a_dispute_loses() -> None:
    """Whichever side it is on."""
    liar = votes(a=SUSPECT, b=PASS, c=PASS, d=PASS)
    assert dispute_losers(liar) == {b"a": True, b"b": False, b"c": False, b"d": False}
    friend = votes(a=SUSPECT, b=PASS, c=SUSPECT, d=SUSPECT)
    assert dispute_losers(friend) == {b"a": False, b"b": True, b"c": False, b"d": False}


def test_nobody_loses_where_all_agree_or_while_it_is_open() -> None:
    """Agreement is no dispute; neither is a referee that could not decide."""
    assert dispute_losers(votes(a=SUSPECT, b=SUSPECT, c=SUSPECT)) == {}
    assert dispute_losers(votes(a=SUSPECT, b=PASS)) == {}
    assert dispute_losers(votes(a=PASS, b=Verdict.INCONCLUSIVE)) == {}
    assert dispute_losers([]) == {}


def test_a_referee_that_loses_its_disputes_is_not_asked_again() -> None:
    """One lost dispute may be bad luck; as many won ones restore trust."""
    record = RefereeRecord()
    for _ in range(MIN_LOST - 1):
        record = record.after(lost=True)
    assert record.trusted
    record = record.after(lost=True)
    assert not record.trusted
    for _ in range(MIN_LOST):
        record = record.after(lost=False)
    assert record.trusted
