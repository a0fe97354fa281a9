"""Writing the ledger: `take` signs orders, `book` checks a receipt and ends its job, `end` ends a job without one.

Functions of one connection, inside one transaction that holds the file's write lock. They run once or twice for every job, so
their statements are built once: building one costs more than running it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client import spending
from tallystick.client.payer import Delivered, Doubt, Neighbours, Placed, Tab, check_answer, check_doubt, check_place
from tallystick.client.proof import Proof
from tallystick.client.tables import JobState, OrderState, evidence, jobs, orders, receipts, tabs, venue
from tallystick.protocol.eip712 import Domain, Verified, loads_signed
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.jobs import ENDS, Event
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import dumps

Sign = Callable[[Tab, Address, Terms], Placed]

_ENDED: dict[Event, JobState] = {
    Event.FINISH: JobState.COMPLETED,
    Event.CANCEL: JobState.CANCELLED,
    Event.FAIL: JobState.FAILED,
    Event.EXPIRE: JobState.FAILED,
}


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job about to be submitted. `commitment_key` opens its commitments; times are Unix seconds; `label`: its workload."""

    domain: Domain
    payer: Address
    job: JobId
    model: str
    path: str
    commitment_key: bytes = field(repr=False)
    created_at: int
    expires_at: int
    label: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A receipt that came for an order of a job, what the client saw of the answer (None: nobody watched), when, how long after
    the request (None: nobody knows), and what a recount has against it.
    """

    domain: Domain
    job: JobId
    placed: Placed
    receipt: Verified[Receipt]
    delivered: Delivered | None
    now: int
    took_ms: int | None = None
    doubt: Doubt | None = None
    proof: Proof | None = field(default=None, repr=False)
    """With the plaintexts, where they were kept."""

    @property
    def tab(self) -> dict[str, object]:
        """What finds its tab."""
        order = self.placed.order.message
        return {"of_venue": venue(self.domain), "of_payer": order.payer, "of_provider": order.provider}


@dataclass(frozen=True, slots=True)
class Shown:
    """An order of this payer and a receipt for it, both verified, that somebody else kept."""

    order: Verified[Order]
    receipt: Verified[Receipt]


@dataclass(frozen=True, slots=True)
class Found:
    """What came of looking: by how much the tab's total rose (base units), when an order was last signed into another state
    file while this one was in use (Unix seconds; 0: none was), and what the chain paid beyond all that receipts show.
    """

    raised: Amount = Amount(0)
    elsewhere: int = 0
    unexplained: Amount = Amount(0)


# Statements. Bound names begin with `of_` where they find rows, with `to_` where they change them.

_VENUE: sa.BindParameter[str] = bindparam("of_venue")
_PAYER: sa.BindParameter[str] = bindparam("of_payer")
_PROVIDER: sa.BindParameter[str] = bindparam("of_provider")
_PROVIDERS: sa.BindParameter[list[str]] = bindparam("of_providers", expanding=True)
_SEQ: sa.BindParameter[int] = bindparam("of_seq")

_THIS_TAB = (tabs.c.venue == _VENUE) & (tabs.c.payer == _PAYER) & (tabs.c.provider == _PROVIDER)
_TABS = sa.select(tabs).where(tabs.c.venue == _VENUE, tabs.c.payer == _PAYER, tabs.c.provider.in_(_PROVIDERS))
_TAB = sa.select(tabs).where(_THIS_TAB)
_CAPS = (
    sa.select(
        orders.c.provider,
        sa.func.sum(orders.c.cap).label("open"),
        sa.func.sum(sa.case((orders.c.seq <= tabs.c.total_mark, orders.c.cap), else_=0)).label("early"),
    )
    .join(tabs, (tabs.c.venue == orders.c.venue) & (tabs.c.payer == orders.c.payer) & (tabs.c.provider == orders.c.provider))
    .where(
        orders.c.payer == _PAYER,
        orders.c.state == OrderState.OPEN.value,
        orders.c.provider.in_(_PROVIDERS),
        orders.c.venue == _VENUE,
        orders.c.expires_at > bindparam("of_now"),
    )
    .group_by(orders.c.provider)
)
_NEW_TAB = insert(tabs)
_RAISE_TAB = _NEW_TAB.on_conflict_do_update(
    index_elements=[tabs.c.venue, tabs.c.payer, tabs.c.provider],
    set_={"ceiling": sa.func.max(tabs.c.ceiling, _NEW_TAB.excluded.ceiling), "order_seq": _NEW_TAB.excluded.order_seq},
)
_NEW_JOB, _NEW_ORDER, _NEW_RECEIPT, _NEW_EVIDENCE = sa.insert(jobs), sa.insert(orders), sa.insert(receipts), sa.insert(evidence)

_ON_TAB = (receipts.c.venue == _VENUE) & (receipts.c.payer == _PAYER) & (receipts.c.provider == _PROVIDER)
_FROM = sa.select(receipts.c.receipt_doc).where(_ON_TAB, receipts.c.seq >= _SEQ).order_by(receipts.c.seq.asc()).limit(2)
_BELOW = sa.select(receipts.c.receipt_doc).where(_ON_TAB, receipts.c.seq < _SEQ).order_by(receipts.c.seq.desc()).limit(1)
_SAME_ORDER = sa.select(receipts.c.digest, receipts.c.receipt_doc).where(receipts.c.order_digest == bindparam("of_order"))

_ACCEPT = (
    sa.update(tabs)
    .where(_THIS_TAB)
    .values(accepted=bindparam("to_accepted"), total=bindparam("to_total"), total_mark=bindparam("to_mark"))
)
_FREEZE = sa.update(tabs).where(_THIS_TAB, tabs.c.frozen == "").values(frozen=bindparam("to_frozen"))
_MARK_ORDER = sa.update(orders).where(orders.c.digest == bindparam("of_order")).values(state=bindparam("to_state"))
_END_JOB = (
    sa.update(jobs)
    .where(jobs.c.job == bindparam("of_job"))
    .values(
        state=bindparam("to_state"),
        reason=bindparam("to_reason"),
        finished_at=bindparam("to_finished"),
        took_ms=bindparam("to_took"),
    )
)
_LOSE_JOB = _END_JOB.where(jobs.c.state == JobState.OPEN.value)
_CLOSE_ORDERS = (
    sa.update(orders)
    .where(orders.c.job == bindparam("of_job"), orders.c.state == OrderState.OPEN.value)
    .values(state=OrderState.CLOSED.value)
)


def read_tabs(c: Connection, domain: Domain, payer: Address, providers: Sequence[Address], now: int) -> dict[Address, Tab]:
    """The payer's tabs with these providers; orders that expired before `now` no longer count."""
    which = {"of_venue": venue(domain), "of_payer": payer, "of_providers": list(providers)}
    rows = {row.provider: row for row in c.execute(_TABS, which)}
    caps = {row.provider: (row.open, row.early) for row in c.execute(_CAPS, which | {"of_now": now})}
    return {provider: _tab(rows.get(provider), *caps.get(provider, (0, 0))) for provider in providers}


def _tab(row: sa.Row[tuple[object, ...]] | None, open_caps: int = 0, early_caps: int = 0) -> Tab:
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
    where = venue(job.domain)
    c.execute(_NEW_JOB, _job_row(where, job))
    c.execute(_NEW_ORDER, [_order_row(where, job, p) for p in placed])
    c.execute(_RAISE_TAB, [_tab_row(where, p) for p in placed])
    return placed


def _job_row(where: str, job: NewJob) -> dict[str, object]:
    return {
        "job": job.job.hex(),
        "venue": where,
        "payer": job.payer,
        "model": job.model,
        "path": job.path,
        "state": JobState.OPEN.value,
        "reason": "",
        "commitment_key": job.commitment_key,
        "created_at": job.created_at,
        "label": job.label,
    }


def _order_row(where: str, job: NewJob, placed: Placed) -> dict[str, object]:
    order = placed.order.message
    return {
        "digest": placed.order.digest.hex(),
        "job": job.job.hex(),
        "venue": where,
        "payer": order.payer,
        "provider": order.provider,
        "seq": order.seq,
        "cap": int(placed.terms.max_cost),
        "ceiling": int(order.ceiling),
        "expires_at": job.expires_at,
        "state": OrderState.OPEN.value,
        "order_doc": placed.order.dumps(),
        "terms_doc": dumps(placed.terms.to_json()).decode(),
    }


def _tab_row(where: str, placed: Placed) -> dict[str, object]:
    order = placed.order.message
    return {
        "venue": where,
        "payer": order.payer,
        "provider": order.provider,
        "accepted": 0,
        "total": 0,
        "total_mark": 0,
        "ceiling": int(order.ceiling),
        "order_seq": order.seq,
        "frozen": "",
        "unproven": 0,
    }


def book(c: Connection, arrival: Arrival) -> BadReceipt | None:
    """Checks a receipt and ends its job. None if the tab now contains it (or did before), else what is wrong with it."""
    receipt = arrival.receipt.message
    near, docs = Neighbours(), list[str]()
    try:
        check_answer(arrival.placed, receipt, arrival.delivered)
        same_order = c.execute(_SAME_ORDER, {"of_order": receipt.order_hash.hex()}).first()
        if same_order is not None and same_order.digest == arrival.receipt.digest.hex():
            return None
        docs = _around(c, arrival, None if same_order is None else same_order.receipt_doc)
        near = _neighbours(receipt, docs)
        tab = c.execute(_TAB, arrival.tab).first()
        check_place(receipt, near)
        check_doubt(arrival.doubt)
    except BadReceipt as complaint:
        if complaint.fault is Fault.PROVIDER:
            _freeze(c, arrival, docs, str(complaint))
        return complaint
    _accept(c, arrival, tab)
    return None


def _around(c: Connection, arrival: Arrival, same_order: str | None) -> list[str]:
    """The receipts held around a new one, as they were signed: of its order, of its seq, next above and below."""
    which = arrival.tab | {"of_seq": arrival.receipt.message.seq}
    found = [*c.execute(_FROM, which).scalars(), *c.execute(_BELOW, which).scalars()]
    return found if same_order is None or same_order in found else [*found, same_order]


def _neighbours(receipt: Receipt, docs: list[str]) -> Neighbours:
    found = [loads_signed(Receipt, doc).message for doc in docs]
    return Neighbours(
        same_seq=next((r for r in found if r.seq == receipt.seq), None),
        below=max((r for r in found if r.seq < receipt.seq), key=lambda r: r.seq, default=None),
        above=min((r for r in found if r.seq > receipt.seq), key=lambda r: r.seq, default=None),
        same_order=next((r for r in found if r.order_hash == receipt.order_hash), None),
    )


def _accept(c: Connection, arrival: Arrival, row: sa.Row[tuple[object, ...]] | None) -> None:
    receipt, delivered, tab = arrival.receipt.message, arrival.delivered, _tab(row)
    order = arrival.placed.order.digest.hex()
    values = {
        "digest": arrival.receipt.digest.hex(),
        "venue": venue(arrival.domain),
        "payer": receipt.payer,
        "provider": receipt.provider,
        "seq": receipt.seq,
        "order_digest": order,
        "receipt_doc": arrival.receipt.dumps(),
        "whole": delivered is not None and delivered.finished,
        "booked_at": arrival.now,
    }
    c.execute(_NEW_RECEIPT, values)
    total, mark = (tab.total, row.total_mark if row is not None else 0)
    if tab.total <= receipt.cumulative_cost <= tab.ceiling:  # above all that these books know to be signed it says nothing
        total, mark = receipt.cumulative_cost, tab.order_seq
    change = {"to_accepted": int(tab.accepted + receipt.cost), "to_total": int(total), "to_mark": mark}
    c.execute(_ACCEPT, arrival.tab | change)
    c.execute(_MARK_ORDER, {"of_order": order, "to_state": OrderState.BOOKED.value})
    outcome = Outcome(receipt.outcome)
    state = _ENDED[ENDS[outcome]]
    spending.add(c, arrival.job, receipt, arrival.now, failed=state is JobState.FAILED)
    reason = "" if state is JobState.COMPLETED else outcome.name.lower()
    if arrival.doubt is not None:
        reason = f"doubted: {arrival.doubt.reason}"
    _end(c, arrival.job, state, reason, arrival.now, took_ms=arrival.took_ms)


MAX_UNPROVEN = 2
_COUNT_UNPROVEN = sa.update(tabs).where(_THIS_TAB).values(unproven=tabs.c.unproven + 1)
_KNOWN_ORDERS = sa.select(orders.c.digest).where(orders.c.digest.in_(bindparam("of_orders", expanding=True)))
_FIRST_ORDER = sa.select(sa.func.min(orders.c.seq)).where(orders.c.payer == _PAYER, orders.c.venue == _VENUE)
_ADOPT = _NEW_TAB.on_conflict_do_update(
    index_elements=[tabs.c.venue, tabs.c.payer, tabs.c.provider],
    set_={name: _NEW_TAB.excluded[name] for name in ("total", "total_mark", "ceiling", "order_seq")},
)


def adopt(c: Connection, where: dict[str, object], shown: Sequence[Shown], settled: Amount, now: int) -> Found:
    """Takes up what a tab was found to have beyond these books. The total is believed as far as orders that these books lack
    were signed for it: what they do know is settled by `book`.

    What the chain paid within the ceilings that these books know, without a receipt, may be for jobs that the provider did before
    the books were lost, or that it refused and collected all the same. It is taken up MAX_UNPROVEN times on a tab that never
    brought a receipt, so that such books heal; it counts as spent, and no provider climbs far by it.
    """
    digests = [one.order.digest.hex() for one in shown]
    known = set(c.execute(_KNOWN_ORDERS, {"of_orders": digests}).scalars())
    strange = [one for one in shown if one.order.digest.hex() not in known]
    lacking = [one.order.message for one in strange]
    row = c.execute(_TAB, where).first()
    tab = _tab(row)
    told = max((one.receipt.message.cumulative_cost for one in shown), default=0)
    proven = max((one.receipt.message.cumulative_cost for one in strange), default=0)
    unproven = tab.total < settled <= tab.ceiling and proven < settled
    healing = unproven and tab.accepted == 0 and row is not None and row.unproven < MAX_UNPROVEN
    paid = settled if healing or not unproven else tab.total
    ceiling = max([paid, *(order.ceiling for order in lacking)])
    total = max(tab.total, paid, min(told, ceiling))
    if lacking or total > tab.total:
        values = {
            "venue": where["of_venue"],
            "payer": where["of_payer"],
            "provider": where["of_provider"],
            "accepted": 0,
            "total": int(total),
            "total_mark": tab.order_seq if row is None or total > tab.total else row.total_mark,
            "ceiling": int(max(tab.ceiling, ceiling)),
            "order_seq": max([tab.order_seq, *(order.seq for order in lacking)]),
            "frozen": "",
            "unproven": 0,
        }
        c.execute(_ADOPT, values)
    if healing:
        c.execute(_COUNT_UNPROVEN, where)
        spending.add_unproven(c, where, Amount(settled - tab.total), now)
    first = c.execute(_FIRST_ORDER, where).scalar()
    later = max((order.seq for order in lacking), default=0)
    elsewhere = 0 if first is None or later < first else later // 1_000_000_000
    return Found(Amount(total - tab.total), elsewhere, Amount(max(settled - total, 0)))


def _freeze(c: Connection, arrival: Arrival, others: list[str], reason: str) -> None:
    order, delivered = arrival.placed.order, arrival.delivered
    seen = asdict(delivered) | {"commitment": delivered.commitment.hex()} if delivered is not None else None
    values = {
        "venue": venue(arrival.domain),
        "payer": order.message.payer,
        "provider": order.message.provider,
        "job": arrival.job.hex(),
        "reason": reason,
        "receipt_doc": arrival.receipt.dumps(),
        "order_doc": order.dumps(),
        "terms_doc": dumps(arrival.placed.terms.to_json()).decode(),
        "other_doc": f"[{','.join(others)}]",
        "delivered_doc": None if seen is None else dumps(seen).decode(),
        "found_at": arrival.now,
    }
    c.execute(_NEW_EVIDENCE, values)
    c.execute(_FREEZE, arrival.tab | {"to_frozen": reason})
    c.execute(_MARK_ORDER, {"of_order": order.digest.hex(), "to_state": OrderState.DISPUTED.value})
    end(c, arrival.job, JobState.DISPUTED, reason, arrival.now)


def forgive(c: Connection, payer: Address, provider: Address) -> bool:
    """Takes a freeze back."""
    mine = (tabs.c.payer == payer) & (tabs.c.provider == provider) & (tabs.c.frozen != "")
    return c.execute(sa.update(tabs).where(mine).values(frozen="")).rowcount > 0


def end(c: Connection, job: JobId, state: JobState, reason: str, now: int) -> None:
    """Ends a job: its open orders stop counting. If it is lost they count on until they expire or its end is known; a job whose
    end is known is not lost.
    """
    if state in (JobState.FAILED, JobState.DISPUTED):
        spending.add_failed(c, job, now)
    _end(c, job, state, reason, now)


def _end(c: Connection, job: JobId, state: JobState, reason: str, now: int, *, took_ms: int | None = None) -> None:
    which = {"of_job": job.hex()}
    lost = state is JobState.LOST
    told = {"to_state": state.value, "to_reason": reason[:1_000], "to_finished": now, "to_took": took_ms}
    c.execute(_LOSE_JOB if lost else _END_JOB, which | told)
    if not lost:
        c.execute(_CLOSE_ORDERS, which)
