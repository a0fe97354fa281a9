from __future__ import annotations

import pytest

from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import Audit, Referees, Verdict
from tallystick.client.audits.provider_verdict import judge_counts, judge_provider_and_counts

RULES = Referees(2)
PADDED, HONEST, FEW = PooledCounts(10_500, 10_000), PooledCounts(10_000, 10_000), PooledCounts(105, 100)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, Verdict.INCONCLUSIVE),
        ({"a": FEW, "b": FEW}, Verdict.INCONCLUSIVE),
        ({"a": HONEST, "b": HONEST}, Verdict.PASS),
        ({"a": PADDED, "b": PADDED}, Verdict.CONFIRMED),
        ({"a": PooledCounts(30_000, 25_000), "b": HONEST}, Verdict.SUSPECT),
        ({"own:desk": PooledCounts(21_000, 20_000)}, Verdict.CONFIRMED),
        ({"a": PooledCounts(21_000, 20_000)}, Verdict.SUSPECT),
        ({"a": PooledCounts(10_150, 10_000), "b": PooledCounts(10_150, 10_000)}, Verdict.SUSPECT),
    ],
)
def test_counts(counts: dict[str, PooledCounts], expected: Verdict) -> None:
    """Padding is confirmed by as many referees as must agree; one that counts as it likes is not believed."""
    assert judge_counts(counts, RULES) is expected


def test_the_worst_verdict_counts() -> None:
    """Good answers do not excuse padded counts, nor the other way round."""
    passed = [Audit(b"1", b"a", Verdict.PASS)]
    assert judge_provider_and_counts(passed, {"a": HONEST, "b": HONEST}, RULES) is Verdict.PASS
    assert judge_provider_and_counts(passed, {"a": PADDED, "b": PADDED}, RULES) is Verdict.CONFIRMED
    bad = [Audit(bytes([job]), referee, Verdict.SUSPECT) for job in range(4) for referee in (b"a", b"b")]
    assert judge_provider_and_counts(bad, {"a": HONEST, "b": HONEST}, RULES) is Verdict.CONFIRMED
    assert judge_provider_and_counts([], {}, RULES) is Verdict.INCONCLUSIVE
