"""Which asks are stale: a coordinator may keep a provider's older, dearer ask and show it as long as it is valid.

Remembered is the newest ask of each provider for each product: a model in one precision class, region and tier, since a node with
several engines sells each under an ask of its own. An ask with a lower seq is refused where it is dearer in any price or has
another sealing key; of engines that sell the same at the same price, each keeps its ask. An ask that has the seq of the newest
and says something else is refused, whatever it says. Functions of one connection, but for `judge`, which is pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger.schema import asks as table
from tallystick.client.ledger.schema import deployment_id, tabs
from tallystick.protocol.eip712 import Domain, Verified
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address, Hash
from tallystick.protocol.wire import dumps, loads

MAX_REMEMBERED = 4_096
"""Products that are remembered, of all providers and deployments. Beyond it those go first whose provider has no tab here, so
that keys made up by a coordinator push out each other; then those that were not seen for the longest time."""
TOUCH_SECONDS = 86_400
"""How exactly it is known when an ask was last seen."""

ProductKey = tuple[Address, str]


@dataclass(frozen=True, slots=True)
class NewestAsk:
    """What is remembered of an ask: its seq and digest, its prices (base units per 1,000,000 tokens), and its sealing key."""

    seq: int
    digest: str
    prices: tuple[int, int, int]
    sealing: str

    @classmethod
    def of(cls, ask: Verified[Ask]) -> NewestAsk:
        """Of an ask that its provider signed."""
        message = ask.message
        sealing = hashlib.sha256(message.sealing_suite.encode() + b"\0" + message.sealing_key).hexdigest()
        prices = (message.input_price, message.cached_input_price, message.output_price)
        return cls(message.seq, ask.digest.hex(), prices, sealing)

    def objection(self, other: NewestAsk) -> str | None:
        """Why another ask for the same product is not to be ordered on, or None."""
        if other.seq > self.seq or other.digest == self.digest:
            return None
        if other.seq == self.seq:
            return f"its provider signed another one with the same seq {self.seq}"
        dearer = any(mine < theirs for mine, theirs in zip(self.prices, other.prices, strict=True))
        if not dearer and other.sealing == self.sealing:
            return None
        return f"it is stale: its seq is {other.seq}, its provider's newest is {self.seq} and says otherwise"

    def dumps(self) -> str:
        """As the ledger keeps it."""
        return dumps([str(self.seq), self.digest, [str(price) for price in self.prices], self.sealing]).decode()

    @classmethod
    def loads(cls, text: str) -> NewestAsk:
        """The inverse."""
        seq, digest, (first, second, third), sealing = loads(text, "asks.newest_doc")
        return cls(int(seq), digest, (int(first), int(second), int(third)), sealing)


def product_of(ask: Ask) -> ProductKey:
    """What an ask sells, and who: asks with the same one replace each other."""
    spec = ask.spec
    sold = dumps([ask.model, spec.precision, spec.kv_precision, spec.region, spec.tier])
    return ask.provider, hashlib.sha256(sold).hexdigest()


def find_stale(
    found: Sequence[Verified[Ask]], known: Mapping[ProductKey, NewestAsk]
) -> tuple[dict[Hash, str], dict[ProductKey, NewestAsk]]:
    """Why some of these asks are not to be ordered on, by digest; and the newest of each product, as far as it was not known."""
    newest: dict[ProductKey, NewestAsk] = {}
    for ask in found:
        product, this = product_of(ask.message), NewestAsk.of(ask)
        before = newest.get(product) or known.get(product)
        if before is None or this.seq > before.seq:
            newest[product] = this
    reasons: dict[Hash, str] = {}
    for ask in found:
        product = product_of(ask.message)
        reason = (newest.get(product) or known[product]).objection(NewestAsk.of(ask))
        if reason is not None:
            reasons[ask.digest] = reason
    return reasons, newest


def read_newest(
    c: Connection, domain: Domain, products: Iterable[ProductKey], now: int
) -> tuple[dict[ProductKey, NewestAsk], bool]:
    """What is remembered of these products, and whether it should be noted again that they were seen. `now` is Unix seconds."""
    wanted = set(products)
    mine = (table.c.deployment_id == deployment_id(domain), table.c.provider.in_([provider for provider, _ in wanted]))
    rows = [row for row in c.execute(sa.select(table).where(*mine)) if (row.provider, row.product) in wanted]
    known = {(Address(row.provider), str(row.product)): NewestAsk.loads(row.newest_doc) for row in rows}
    return known, any(now - row.seen_at >= TOUCH_SECONDS for row in rows)


def remember_asks(c: Connection, domain: Domain, found: Sequence[Verified[Ask]], now: int) -> None:
    """Remembers the newest ask of each product, and that the others were seen. `now` is Unix seconds."""
    known, _ = read_newest(c, domain, map(product_of, (ask.message for ask in found)), now)
    _, newer = find_stale(found, known)
    for (provider, product), newest in (known | newer).items():
        row = {
            "deployment_id": deployment_id(domain),
            "provider": provider,
            "product": product,
            "newest_doc": newest.dumps(),
            "seen_at": now,
        }
        written = insert(table).values(row)
        changed = {"newest_doc": written.excluded.newest_doc, "seen_at": written.excluded.seen_at}
        c.execute(
            written.on_conflict_do_update(index_elements=[table.c.deployment_id, table.c.provider, table.c.product], set_=changed)
        )
    _forget(c)


def _forget(c: Connection) -> None:
    count = c.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
    if count > MAX_REMEMBERED:
        row: sa.ColumnElement[int] = sa.literal_column("asks.rowid")
        traded = sa.exists().where(tabs.c.deployment_id == table.c.deployment_id, tabs.c.provider == table.c.provider)
        oldest = sa.select(row).select_from(table).order_by(traded, table.c.seen_at).limit(count - MAX_REMEMBERED)
        c.execute(sa.delete(table).where(sa.literal_column("rowid").in_(oldest)))
