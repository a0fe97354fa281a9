"""What the ledger does to its tables, as functions of one connection inside one transaction.

`take` signs orders, `book` checks a receipt and ends its job, `end` ends a job without one; the rest reads. The caller holds the
write lock of the file for the first three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.payer import Delivered, Neighbours, Placed, Tab, check_answer, check_place
from tallystick.client.tables import JobState, OrderState, evidence, jobs, orders, receipts, tabs
from tallystick.protocol.eip712 import Domain, Signed, Verified, loads_signed
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.jobs import ENDS, Event
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import dumps, loads

Sign = Callable[[Tab, Address, Terms], Placed]

_ENDED: dict[Event, JobState] = {
    Event.FINISH: JobState.COMPLETED,
    Event.CANCEL: JobState.CANCELLED,
    Event.FAIL: JobState.FAILED,
    Event.EXPIRE: JobState.FAILED,
}


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job about to be submitted. `commitment_key` opens its commitments; times are Unix seconds."""

    domain: Domain
    payer: Address
    job: JobId
    model: str
    path: str
    commitment_key: bytes
    created_at: int
    expires_at: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A receipt that came for an order of a job, what the client saw of the answer (None: nobody watched), and when."""

    domain: Domain
    job: JobId
    placed: Placed
    receipt: Verified[Receipt]
    delivered: Delivered | None
    now: int


@dataclass(frozen=True, slots=True)
class KnownOrder:
    """An order as the ledger has it."""

    order: Signed[Order]
    terms: Terms
    digest: Hash
    state: OrderState


@dataclass(frozen=True, slots=True)
class KnownJob:
    """A job as the ledger has it: its orders in the shortlist's order, and its receipt once it came."""

    job: JobId
    domain: Domain
    model: str
    path: str
    state: JobState
    reason: str
    created_at: int
    finished_at: int | None
    orders: tuple[KnownOrder, ...]
    receipt: Signed[Receipt] | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """A dishonest receipt, and what shows that it is one."""

    provider: Address
    job: JobId
    reason: str
    receipt: Signed[Receipt]
    order: Signed[Order]
    terms: Terms
    found_at: int


def venue(domain: Domain) -> str:
    """What keeps the tabs of one deployment apart from those of another."""
    return f"{domain.chain_id}:{domain.contract}"


def _domain(text: str) -> Domain:
    chain, _, contract = text.partition(":")
    return Domain(int(chain), Address(contract))


def read_tabs(c: Connection, domain: Domain, payer: Address, providers: Sequence[Address], now: int) -> dict[Address, Tab]:
    """The payer's tabs with these providers; orders that expired before `now` no longer count."""
    where = venue(domain)
    mine = (tabs.c.venue == where) & (tabs.c.payer == payer)
    rows = {row.provider: row for row in c.execute(sa.select(tabs).where(mine, tabs.c.provider.in_(providers)))}
    early = sa.case((orders.c.seq <= tabs.c.total_mark, orders.c.cap), else_=0)
    same_tab = (tabs.c.venue == orders.c.venue) & (tabs.c.payer == orders.c.payer) & (tabs.c.provider == orders.c.provider)
    live = (orders.c.payer == payer) & (orders.c.state == OrderState.OPEN) & orders.c.provider.in_(providers)
    sums = c.execute(
        sa.select(orders.c.provider, sa.func.sum(orders.c.cap).label("open"), sa.func.sum(early).label("early"))
        .join(tabs, same_tab)
        .where(live, orders.c.venue == where, orders.c.expires_at > now)
        .group_by(orders.c.provider)
    )
    caps = {row.provider: (row.open, row.early) for row in sums}
    return {provider: _tab(rows.get(provider), *caps.get(provider, (0, 0))) for provider in providers}


def _tab(row: sa.Row[tuple[object, ...]] | None, open_caps: int, early_caps: int) -> Tab:
    if row is None:
        return Tab()
    return Tab(
        accepted=Amount(row.accepted),
        total=Amount(row.total),
        open_caps=Amount(open_caps),
        early_caps=Amount(early_caps),
        ceiling=Amount(row.ceiling),
        order_seq=row.order_seq,
        frozen=row.frozen,
    )


def take(c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: Sign) -> list[Placed]:
    """Signs an order for each draft whose provider's tab is not frozen, and remembers them as open."""
    found = read_tabs(c, job.domain, job.payer, [provider for provider, _ in drafts], job.created_at)
    placed = [sign(found[provider], provider, terms) for provider, terms in drafts if not found[provider].frozen]
    if not placed:
        return []
    c.execute(sa.insert(jobs).values(_job_row(job)))
    c.execute(sa.insert(orders), [_order_row(job, p) for p in placed])
    fresh = insert(tabs)
    raised = fresh.on_conflict_do_update(
        index_elements=[tabs.c.venue, tabs.c.payer, tabs.c.provider],
        set_={"ceiling": sa.func.max(tabs.c.ceiling, fresh.excluded.ceiling), "order_seq": fresh.excluded.order_seq},
    )
    c.execute(raised, [_tab_row(job, p) for p in placed])
    return placed


def _job_row(job: NewJob) -> dict[str, object]:
    return {
        "job": job.job.hex(),
        "venue": venue(job.domain),
        "payer": job.payer,
        "model": job.model,
        "path": job.path,
        "state": JobState.OPEN,
        "reason": "",
        "commitment_key": job.commitment_key,
        "created_at": job.created_at,
    }


def _order_row(job: NewJob, placed: Placed) -> dict[str, object]:
    order = placed.order.message
    return {
        "digest": placed.order.digest.hex(),
        "job": job.job.hex(),
        "venue": venue(job.domain),
        "payer": order.payer,
        "provider": order.provider,
        "seq": order.seq,
        "cap": int(placed.terms.max_cost),
        "ceiling": int(order.ceiling),
        "expires_at": job.expires_at,
        "state": OrderState.OPEN,
        "order_doc": placed.order.dumps(),
        "terms_doc": dumps(placed.terms.to_json()).decode(),
    }


def _tab_row(job: NewJob, placed: Placed) -> dict[str, object]:
    order = placed.order.message
    return {
        "venue": venue(job.domain),
        "payer": order.payer,
        "provider": order.provider,
        "accepted": 0,
        "total": 0,
        "total_mark": 0,
        "ceiling": int(order.ceiling),
        "order_seq": order.seq,
        "frozen": "",
    }


def book(c: Connection, arrival: Arrival) -> BadReceipt | None:
    """Checks a receipt and ends its job. None if the tab now contains it (or did before), else what is wrong with it."""
    receipt, order = arrival.receipt.message, arrival.placed.order.message
    near = Neighbours()
    try:
        check_answer(arrival.placed, receipt, arrival.delivered)
        if c.execute(sa.select(receipts.c.seq).where(receipts.c.digest == arrival.receipt.digest.hex())).first():
            return None
        near = _neighbours(c, venue(arrival.domain), receipt)
        tab = read_tabs(c, arrival.domain, order.payer, [order.provider], arrival.now)[order.provider]
        check_place(receipt, near, tab.ceiling)
    except BadReceipt as complaint:
        if complaint.fault is Fault.PROVIDER:
            _freeze(c, arrival, near.same_seq or near.same_order, str(complaint))
        return complaint
    _accept(c, arrival, tab)
    return None


def _neighbours(c: Connection, where: str, receipt: Receipt) -> Neighbours:
    tab = (receipts.c.venue == where) & (receipts.c.payer == receipt.payer) & (receipts.c.provider == receipt.provider)
    query = sa.select(receipts.c.receipt_doc).limit(1)

    def one(condition: sa.ColumnElement[bool], *order: sa.ColumnElement[int]) -> Receipt | None:
        row = c.execute(query.where(condition).order_by(*order)).scalar()
        return None if row is None else loads_signed(Receipt, row).message

    return Neighbours(
        same_seq=one(tab & (receipts.c.seq == receipt.seq)),
        below=one(tab & (receipts.c.seq < receipt.seq), receipts.c.seq.desc()),
        above=one(tab & (receipts.c.seq > receipt.seq), receipts.c.seq.asc()),
        same_order=one(receipts.c.order_digest == receipt.order_hash.hex()),
    )


def _tab_of(arrival: Arrival) -> sa.ColumnElement[bool]:
    order = arrival.placed.order.message
    return (tabs.c.venue == venue(arrival.domain)) & (tabs.c.payer == order.payer) & (tabs.c.provider == order.provider)


def _mark_order(c: Connection, arrival: Arrival, state: OrderState) -> None:
    c.execute(sa.update(orders).where(orders.c.digest == arrival.placed.order.digest.hex()).values(state=state))


def _accept(c: Connection, arrival: Arrival, tab: Tab) -> None:
    receipt, delivered = arrival.receipt.message, arrival.delivered
    c.execute(
        sa.insert(receipts).values(
            digest=arrival.receipt.digest.hex(),
            venue=venue(arrival.domain),
            payer=receipt.payer,
            provider=receipt.provider,
            seq=receipt.seq,
            order_digest=arrival.placed.order.digest.hex(),
            receipt_doc=arrival.receipt.dumps(),
            whole=delivered is not None and delivered.finished,
            booked_at=arrival.now,
        )
    )
    change = {"accepted": int(tab.accepted + receipt.cost)}
    if receipt.cumulative_cost >= tab.total:
        change |= {"total": int(receipt.cumulative_cost), "total_mark": tab.order_seq}
    c.execute(sa.update(tabs).where(_tab_of(arrival)).values(change))
    _mark_order(c, arrival, OrderState.BOOKED)
    outcome = Outcome(receipt.outcome)
    state = _ENDED[ENDS[outcome]]
    end(c, arrival.job, state, "" if state is JobState.COMPLETED else outcome.name.lower(), arrival.now)


def _freeze(c: Connection, arrival: Arrival, other: Receipt | None, reason: str) -> None:
    order, delivered = arrival.placed.order.message, arrival.delivered
    seen = asdict(delivered) | {"commitment": delivered.commitment.hex()} if delivered is not None else None
    c.execute(
        sa.insert(evidence).values(
            venue=venue(arrival.domain),
            payer=order.payer,
            provider=order.provider,
            job=arrival.job.hex(),
            reason=reason,
            receipt_doc=arrival.receipt.dumps(),
            order_doc=arrival.placed.order.dumps(),
            terms_doc=dumps(arrival.placed.terms.to_json()).decode(),
            other_doc=None if other is None else dumps(other.to_json()).decode(),
            delivered_doc=None if seen is None else dumps(seen).decode(),
            found_at=arrival.now,
        )
    )
    c.execute(sa.update(tabs).where(_tab_of(arrival), tabs.c.frozen == "").values(frozen=reason))
    _mark_order(c, arrival, OrderState.DISPUTED)
    end(c, arrival.job, JobState.DISPUTED, reason, arrival.now)


def end(c: Connection, job: JobId, state: JobState, reason: str, now: int) -> None:
    """Ends a job: its open orders stop counting. Those of a lost one count on until they expire, or until its end is known."""
    here = jobs.c.job == job.hex()
    c.execute(sa.update(jobs).where(here).values(state=state, reason=reason[:1_000], finished_at=now))
    if state is not JobState.LOST:
        still_open = (orders.c.job == job.hex()) & (orders.c.state == OrderState.OPEN)
        c.execute(sa.update(orders).where(still_open).values(state=OrderState.CLOSED))


def frozen(c: Connection, domain: Domain, payer: Address) -> dict[Address, str]:
    """The providers that get no more orders, and why."""
    query = sa.select(tabs.c.provider, tabs.c.frozen)
    rows = c.execute(query.where(tabs.c.venue == venue(domain), tabs.c.payer == payer, tabs.c.frozen != ""))
    return {Address(row.provider): row.frozen for row in rows}


def unresolved(c: Connection, payer: Address, before: int, limit: int) -> list[JobId]:
    """Jobs made until that time whose end is not known, oldest first."""
    pending = jobs.c.state.in_([JobState.OPEN, JobState.LOST])
    query = sa.select(jobs.c.job).where(jobs.c.payer == payer, pending, jobs.c.created_at <= before)
    return [JobId(bytes.fromhex(row)) for row in c.execute(query.order_by(jobs.c.created_at).limit(limit)).scalars()]


def read_evidence(c: Connection, payer: Address) -> list[Evidence]:
    """Every dishonest receipt, oldest first."""
    rows = c.execute(sa.select(evidence).where(evidence.c.payer == payer).order_by(evidence.c.id))
    return [
        Evidence(
            provider=Address(row.provider),
            job=JobId(bytes.fromhex(row.job)),
            reason=row.reason,
            receipt=loads_signed(Receipt, row.receipt_doc),
            order=loads_signed(Order, row.order_doc),
            terms=Terms.from_json(loads(row.terms_doc, "terms")),
            found_at=row.found_at,
        )
        for row in rows
    ]


def find(c: Connection, payer: Address, job: JobId) -> KnownJob | None:
    """What is known of a job."""
    row = c.execute(sa.select(jobs).where(jobs.c.job == job.hex(), jobs.c.payer == payer)).first()
    if row is None:
        return None
    listed = c.execute(sa.select(orders).where(orders.c.job == job.hex()).order_by(orders.c.seq)).all()
    digests = [entry.digest for entry in listed]
    receipt = c.execute(sa.select(receipts.c.receipt_doc).where(receipts.c.order_digest.in_(digests))).scalar()
    return KnownJob(
        job=job,
        domain=_domain(row.venue),
        model=row.model,
        path=row.path,
        state=JobState(row.state),
        reason=row.reason,
        created_at=row.created_at,
        finished_at=row.finished_at,
        orders=tuple(_known_order(entry) for entry in listed),
        receipt=None if receipt is None else loads_signed(Receipt, receipt),
    )


def _known_order(row: sa.Row[tuple[object, ...]]) -> KnownOrder:
    return KnownOrder(
        loads_signed(Order, row.order_doc),
        Terms.from_json(loads(row.terms_doc, "terms")),
        Hash(bytes.fromhex(row.digest)),
        OrderState(row.state),
    )
