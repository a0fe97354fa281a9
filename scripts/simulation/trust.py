"""Agents in a market whose answers are audited: what cheating earns against honest work.

Time runs in rounds. In each, payers send jobs to the providers that are cheapest with their expected loss, up to their capacity,
and a share to newcomers. The coordinator probes providers that have few audits, or any, by the rule of `tally coordinator probe`.
Verdicts and integrity are those of `tallystick.audit`; its tests are represented by their error rates.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tallystick.audit.integrity import NEWCOMER_JOBS, Integrity, audit_rate
from tallystick.audit.referee_record import RefereeRecord, dispute_losers
from tallystick.audit.verdicts import FALSE_SUSPECT, Audit, Referees, Verdict, judge_job, judge_provider, needs_opinion
from tallystick.client.audits.probes import ProbeTarget, choose_target
from tallystick.protocol.types import Address


@dataclass(frozen=True, slots=True)
class TrustScenario:
    """A market. Money is in prices of a job.

    `cheaters`, `captured`: shares of the providers that cheat, and of those that collude as referees: they pass each other's jobs
    and accuse others with the probability `accuse`. `cheat_rate`: the share of its jobs on which a cheater cheats. `power`: the
    probability that an audit sees that. `cost`, `cheap_cost`: of an honest job and of a cheated one. `new_key`: what a cheater
    pays to return under a new key, when its integrity is ruined. `demand`: jobs a round as a share of capacity. `audit_price`:
    of one referee's opinion. `second_look`: the share of first opinions that another referee checks. `exploration`: the share of
    jobs that newcomers get. `probes`: the coordinator's jobs, as a share of those of payers, each of which it audits. `aversion`:
    how much of a job's price an expected bad answer costs.
    """

    providers: int = 100
    payers: int = 10
    rounds: int = 400
    capacity: int = 5
    demand: float = 0.6
    cheaters: float = 0.2
    cheat_rate: float = 1.0
    captured: float = 0.0
    accuse: float = 0.2
    power: float = 0.95
    cost: float = 0.7
    cheap_cost: float = 0.4
    new_key: float = 5.0
    audit_price: float = 0.3
    second_look: float = 0.1
    exploration: float = 0.05
    probes: float = 0.01
    aversion: float = 2.0
    seed: int = 1


@dataclass(slots=True, eq=False)
class Provider:
    """An owner with its current key."""

    number: int
    cheats: bool
    colludes: bool
    key: int = 0
    integrity: Integrity = field(default_factory=Integrity)
    income: float = 0.0
    jobs: int = 0
    confirmed_after: list[int] = field(default_factory=list)

    @property
    def name(self) -> bytes:
        """The key as referees and payers know it."""
        return b"%d/%d" % (self.number, self.key)


@dataclass(slots=True)
class Payer:
    """What a payer knows: its audits of each key, the keys that it blocks, its jobs of each, and referees."""

    audits: dict[bytes, list[Audit]] = field(default_factory=dict)
    blocked: set[bytes] = field(default_factory=set)
    jobs: dict[bytes, int] = field(default_factory=dict)
    referees: dict[bytes, RefereeRecord] = field(default_factory=dict)


class TrustSimulation:
    """One run. The same scenario gives the same figures."""

    def __init__(self, scenario: TrustScenario) -> None:
        self._scenario, self._draws = scenario, random.Random(scenario.seed)
        count, share = scenario.providers, self._draws.sample(range(scenario.providers), scenario.providers)
        cheaters = set(share[: round(scenario.cheaters * count)])
        # Who colludes is first of all those who have something to hide.
        ring = set(share[: round(scenario.captured * count)])
        self.providers = [Provider(number, number in cheaters, number in ring) for number in range(count)]
        self.payers = [Payer() for _ in range(scenario.payers)]
        self._coordinator = Payer()
        self._referees = Referees(captured=max(scenario.captured, 0.1))
        self.spent = self.audit_cost = 0.0
        self.honest_confirmed = 0
        self._job = 0

    def run(self) -> None:
        """Runs all rounds."""
        demand = round(self._scenario.demand * self._scenario.capacity * len(self.providers))
        for _ in range(self._scenario.rounds):
            room = {provider.number: self._scenario.capacity for provider in self.providers}
            for _ in range(round(self._scenario.probes * demand)):
                self._probe(room)
            ranked = sorted(self.providers, key=lambda provider: (self._expected_price(provider), self._draws.random()))
            for _ in range(demand):
                payer = self._draws.choice(self.payers)
                provider = self._choose(payer, ranked, room)
                if provider is not None:
                    room[provider.number] -= 1
                    self._serve(payer, provider)
            for provider in self.providers:
                self._consider_new_key(provider)

    def _expected_price(self, provider: Provider) -> float:
        return 1 + self._scenario.aversion * (1 - provider.integrity.lower)

    def _choose(self, payer: Payer, ranked: list[Provider], room: dict[int, int]) -> Provider | None:
        if self._draws.random() < self._scenario.exploration:
            newcomers = [
                provider
                for provider in ranked
                if provider.integrity.audits < NEWCOMER_JOBS and room[provider.number] and provider.name not in payer.blocked
            ]
            if newcomers:
                return self._draws.choice(newcomers)
        return next((provider for provider in ranked if room[provider.number] and provider.name not in payer.blocked), None)

    def _serve(self, payer: Payer, provider: Provider) -> None:
        name, cheated = provider.name, self._do_job(provider)
        self.spent += 1
        payer.jobs[name] = payer.jobs.get(name, 0) + 1
        if self._draws.random() < audit_rate(provider.integrity, payer.jobs[name]):
            self._audit(payer, provider, cheated=cheated)

    def _probe(self, room: dict[int, int]) -> None:
        """The coordinator's job at a provider, which cannot tell it from others. It is audited like those of payers."""
        targets = [
            ProbeTarget(Address(f"{provider.number}"), "", provider.integrity.audits, room[provider.number])
            for provider in self.providers
            if room[provider.number] and provider.name not in self._coordinator.blocked
        ]
        target = choose_target(targets, self._draws.randbytes)
        if target is not None:
            provider = self.providers[int(target.provider)]
            room[provider.number] -= 1
            self.audit_cost += 1
            self._audit(self._coordinator, provider, cheated=self._do_job(provider))

    def _do_job(self, provider: Provider) -> bool:
        """Pays a provider for a job. Returns whether it cheats on it."""
        cheated = provider.cheats and self._draws.random() < self._scenario.cheat_rate
        provider.jobs += 1
        provider.income += 1 - (self._scenario.cheap_cost if cheated else self._scenario.cost)
        return cheated

    def _audit(self, payer: Payer, provider: Provider, *, cheated: bool) -> None:
        """Audits a job by one referee, and by further ones while it is suspect by too few."""
        self._job += 1
        job, opinions = b"%d" % self._job, list[Audit]()
        for referee in self._draw_referees(payer, provider):
            self.audit_cost += self._scenario.audit_price
            opinions.append(Audit(job, referee.name, self._opinion(referee, provider, cheated=cheated)))
            again = len(opinions) == 1 and self._draws.random() < self._scenario.second_look
            if not (again or needs_opinion(opinions, self._referees)):
                break
        for referee_name, lost in dispute_losers(opinions, self._referees).items():
            payer.referees[referee_name] = payer.referees.get(referee_name, RefereeRecord()).after(lost=lost)
        history = payer.audits.setdefault(provider.name, [])
        history += opinions
        verdict = judge_job(opinions, self._referees)
        provider.integrity = provider.integrity.after(verdict)
        if verdict is Verdict.SUSPECT and judge_provider(history, self._referees) is Verdict.CONFIRMED:
            payer.blocked.add(provider.name)
            provider.integrity = provider.integrity.after(Verdict.CONFIRMED)
            provider.confirmed_after.append(len({audit.job for audit in history}))
            self.honest_confirmed += not provider.cheats

    def _draw_referees(self, payer: Payer, provider: Provider) -> list[Provider]:
        """Providers of the same spec in random order; enough of them for a majority of OPINIONS."""
        least = 2 * self._referees.opinions - 1
        drawn = self._draws.sample(self.providers, min(len(self.providers), 3 * least))
        return [
            referee for referee in drawn if referee is not provider and payer.referees.get(referee.name, RefereeRecord()).trusted
        ][:least]

    def _opinion(self, referee: Provider, provider: Provider, *, cheated: bool) -> Verdict:
        """A colluding referee knows the answers of its ring, since it wrote them. It cannot tell whose the others are."""
        if referee.colludes:
            suspect = not provider.colludes and self._draws.random() < self._scenario.accuse
        else:
            suspect = self._draws.random() < (self._scenario.power if cheated else FALSE_SUSPECT)
        return Verdict.SUSPECT if suspect else Verdict.PASS

    def _consider_new_key(self, provider: Provider) -> None:
        """A cheater whose name is ruined starts again; what its new key costs is gone."""
        if provider.cheats and provider.integrity.failures > 3 * (provider.integrity.passes + 1):
            provider.key += 1
            provider.integrity = Integrity()
            provider.income -= self._scenario.new_key

    def report(self) -> dict[str, float]:
        """Incomes are of an owner, in prices of a job. `cheater_income_max`: of the most successful cheater."""
        honest = [provider.income for provider in self.providers if not provider.cheats]
        cheaters = [provider.income for provider in self.providers if provider.cheats]
        jobs = sorted(count for provider in self.providers if provider.cheats for count in provider.confirmed_after)
        return {
            "honest_income_mean": sum(honest) / len(honest),
            "cheater_income_mean": sum(cheaters) / max(len(cheaters), 1),
            "cheater_income_max": max(cheaters, default=0.0),
            "new_keys": sum(provider.key for provider in self.providers),
            "audited_jobs_to_confirm_p50": jobs[len(jobs) // 2] if jobs else float("nan"),
            "honest_confirmed": self.honest_confirmed,
            "audit_cost_share": self.audit_cost / max(self.spent, 1),
        }
