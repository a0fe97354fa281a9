"""Further orders for a job that waits: on asks that the coordinator names because they could take the job now.

A waiting job never becomes dearer: no further order has a higher cap than the highest of its first orders. Each ask must meet the
demand of the request, as those of the shortlist do, and budgets apply. At most MAX_INVITATIONS orders a job are signed, so a
coordinator that names asks in vain gains nothing but that many open orders, each on a provider that the request accepts. They
count as the job's other orders do, until it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.job_stream import JobStream
from tallystick.client.jobs.candidates import draft_orders, wrap_keys
from tallystick.client.jobs.key_sessions import KeySessions
from tallystick.client.jobs.response import JobResponse
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.order_writes import NewJob, SignOrder
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.recovery.lost_state import TabRecovery
from tallystick.client.selection.shortlist import usable_asks
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.link import read_ask
from tallystick.protocol.messages import Ask
from tallystick.protocol.queue_place import MAX_INVITATIONS
from tallystick.protocol.sealing import commit_request
from tallystick.protocol.types import Hash

log = structlog.get_logger()


@dataclass(slots=True)
class FurtherOrders:
    """Signs and posts further orders for one job. `now` is Unix time in seconds."""

    config: ClientConfig
    coordinator: CoordinatorClient
    ledger: Ledger
    recovery: TabRecovery
    request: ApiRequest
    demand: Demand
    job: NewJob
    highest_cap: int
    """Base units."""
    sessions: KeySessions
    signer: Callable[[], SignOrder]
    now: Callable[[], int]
    signed: int = 0

    async def order(self, offered: Sequence[object], response: JobResponse, stream: JobStream) -> None:
        """Orders on those of the offered asks that the request accepts. Whatever fails, the job waits on as before.

        `stream`: the job's.
        """
        try:
            asks = await self._acceptable(offered, {placed.terms.ask for placed in response.candidates})
            if asks:
                await self._order(asks, response, stream)
        except TallyError as error:
            log.info("no further order for a waiting job", job=response.job.hex(), reason=error.public_text)

    async def _acceptable(self, offered: Sequence[object], ordered: Collection[Hash]) -> list[Verified[Ask]]:
        """The offered asks that meet the demand and are not among those `ordered`.

        None for a demand that only the coordinator or the chain can judge: a reputation, an integrity or a stake.
        """
        if self.demand.min_reputation or self.demand.min_integrity or self.demand.min_stake:
            return []
        readable: list[Signed[Ask]] = []
        for raw in offered:
            try:
                readable.append(read_ask(raw))
            except BadMessage as error:
                log.warning("an ask was left out", job=self.job.job.hex(), reason=str(error))
        asks = usable_asks(readable, self.demand, self.job.domain, self.now())
        stale = await self.ledger.stale_asks(self.job.domain, asks, self.now())
        return [ask for ask in asks if ask.digest not in ordered and ask.digest not in stale][: MAX_INVITATIONS - self.signed]

    async def _order(self, asks: Sequence[Verified[Ask]], response: JobResponse, stream: JobStream) -> None:
        job, key = response.job, response.key
        commitment = commit_request(key.commitment_key, job, self.request.plaintext)
        drafts = draft_orders(self.request, asks, job, commitment, self.config.default_max_output_tokens)
        drafts = [(provider, terms) for provider, terms in drafts if terms.max_cost <= self.highest_cap]
        if not drafts:
            return
        self.signed += len(drafts)
        await self.recovery.recover_unknown(provider for provider, _ in drafts)
        placed = await self.ledger.sign_further_orders(self.job, drafts, self.signer(), self.config.budgets)
        if placed:
            response.add_orders(placed)  # before the coordinator has them: a match may follow at once
            candidates = wrap_keys(job, key, placed, asks, self.sessions)
            if not await stream.add_orders(candidates):
                await self.coordinator.add_orders(job, candidates)
            log.info("ordered on further providers for a waiting job", job=job.hex(), orders=len(placed))
