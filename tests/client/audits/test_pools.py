from __future__ import annotations

import math
import random

from tallystick.audit.surprisal import TILTS, Surprisal
from tallystick.audit.verdicts import Referees, Verdict
from tallystick.client.audits.pools import NO_POOL, SUSPECT, Pool, bounded, judge_pools, pool_answers
from tallystick.client.audits.store import AuditStore
from tallystick.client.audits.subject import Subject
from tests.client.audits.parties import ALICE, HONEST, REQUEST, build_bench, sold
from tests.client.audits.test_conduct import conduct, honest_market
from tests.client.audits.toy_model import prompt_text

RULES = Referees(3)


def pools_of(declared: float, actual: float, answers: int, seed: int, **sampling: float) -> list[tuple[str, Pool]]:
    """The evidence of answers that were drawn at another temperature than the request declares, by three referees."""
    request = REQUEST | {"temperature": declared} | sampling
    draw = random.Random(seed)
    pools = list[tuple[str, Pool]]()
    for number in range(answers):
        subject = Subject.of(sold(ALICE, HONEST, request=request, tokens=range(16)))
        question = subject.question(64, draw.randbytes)
        tokens = HONEST.answer(prompt_text(question), 64, actual, draw)
        subject = Subject.of(sold(ALICE, HONEST, request=request, tokens=tokens))
        question = subject.question(64, draw.randbytes)
        name = f"referee{number % 3}"
        pools.append((name, bounded(subject.pool(question, HONEST.score(question)))))
    return pools


def test_a_temperature_off_by_0_3_adds_up() -> None:
    """No single answer shows it to be sure; twenty do."""
    assert judge_pools(pools_of(0.7, 1.0, 20, 1), RULES) is Verdict.CONFIRMED


def test_a_lower_temperature_shows_if_nothing_is_truncated() -> None:
    """Otherwise the engine's own truncation might have made the answer likelier, which is honest."""
    assert judge_pools(pools_of(1.0, 0.7, 20, 2), RULES) is Verdict.PASS
    assert judge_pools(pools_of(1.0, 0.7, 20, 2, top_p=1, top_k=0, min_p=0), RULES) is Verdict.CONFIRMED


def test_honest_answers_add_up_to_nothing() -> None:
    """Whatever is declared."""
    for seed in range(8):
        assert judge_pools(pools_of(0.7, 0.7, 12, seed), RULES) is Verdict.PASS
        assert judge_pools(pools_of(1.0, 1.0, 12, seed, top_p=1, top_k=-1, min_p=0), RULES) is Verdict.PASS


def test_one_referee_cannot_confirm_by_what_it_invents() -> None:
    """As many as must agree on a job; an engine of the user's own is enough."""
    pools = [pool for _, pool in pools_of(0.7, 1.3, 12, 3)]
    assert judge_pools([("liar", pool) for pool in pools], RULES) is Verdict.SUSPECT
    assert judge_pools([*(("liar", pool) for pool in pools), ("other", NO_POOL), ("third", NO_POOL)], RULES) is Verdict.SUSPECT
    assert judge_pools([("own:desk", pool) for pool in pools], RULES) is Verdict.CONFIRMED
    assert judge_pools([], RULES) is Verdict.INCONCLUSIVE


def test_an_honest_past_excuses_nothing() -> None:
    """Two hundred honest answers, then another temperature: it is found about as soon as without them."""
    past = [(f"referee{number % 3}", pool) for number, (_, pool) in enumerate(10 * pools_of(0.7, 0.7, 20, 7))]
    assert judge_pools(past, RULES) is Verdict.PASS
    assert judge_pools(past + pools_of(0.7, 1.0, 30, 1), RULES) is Verdict.CONFIRMED


def test_captured_referees_do_not_convict_by_small_lies() -> None:
    """Three of thirty referees say what stays below suspicion, always against the same honest provider."""
    draw = random.Random(9)
    honest = pools_of(0.7, 0.7, 60, 11)
    lie = Pool(Surprisal((SUSPECT - 0.1,) * len(TILTS), 64))
    answers = list[tuple[str, Pool]]()
    for _ in range(300):
        number = draw.randrange(30)
        answers.append((f"referee{number}", lie if number < 3 else draw.choice(honest)[1]))
        assert judge_pools(answers, RULES) is not Verdict.CONFIRMED


def test_a_fair_bet_stays_fair() -> None:
    """The mean of the evidence of many honest providers is at most 1: half of the bets double, half of them are lost."""
    draw, means = random.Random(3), list[float]()
    for _ in range(2_000):
        won = [draw.random() < 0.5 for _ in range(12)]
        answers = [("a", Pool(Surprisal((math.log(1.5) if win else math.log(0.5),) * len(TILTS), 1))) for win in won]
        means.append(math.exp(pool_answers(answers).log_evidence))
    assert sum(means) / len(means) < 1.1


async def test_a_provider_is_confirmed_by_what_adds_up(store: AuditStore) -> None:
    """The opinions in the file are enough; most single answers pass."""
    bench = build_bench(store, honest_market(), opinions=2)
    draw = random.Random(5)
    for _ in range(24):
        prompt = repr(sorted({"messages": REQUEST["messages"]}.items()))
        await conduct(bench, sold(ALICE, HONEST, tokens=HONEST.answer(prompt, 64, 1.0, draw)))
    verdicts = [conclusion.verdict for conclusion, _ in bench.conclusions]
    assert verdicts.count(Verdict.PASS) > 12
    assert bench.conclusions[-1][0].provider is Verdict.CONFIRMED
