"""Detects stale asks: a coordinator could keep showing a provider's older, more expensive ask while that ask is still valid.

The ledger remembers the newest ask of each provider for each product. A product is a model in one precision class, region and
tier, for batch jobs alone or for all, and for some payers or for all: a node with several engines sells each of them under an ask
of its own. An ask with a lower seq is refused if one of its prices is higher or its sealing key differs. Engines that sell the
same product at the same price may each keep their ask. An ask with the newest seq but other content is always refused. Functions
of one connection, except `find_stale`, which is pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger.schema import asks as asks_table
from tallystick.client.ledger.schema import deployment_id, tabs
from tallystick.protocol.criteria import is_batch_only
from tallystick.protocol.eip712 import Domain, Verified
from tallystick.protocol.features import BATCH_ONLY
from tallystick.protocol.messages import Ask
from tallystick.protocol.payer_rules import rule_features
from tallystick.protocol.types import Address, Hash
from tallystick.protocol.wire import dumps, loads

MAX_REMEMBERED = 4_096
"""Products remembered, of all providers and deployments. Beyond it, products of providers without a tab are deleted first, so
that keys invented by a coordinator displace only each other; then the products that were not seen for the longest time.
"""
TOUCH_SECONDS = 86_400
"""Resolution of the time at which an ask was last seen."""

ProductKey = tuple[Address, str]


@dataclass(frozen=True, slots=True)
class NewestAsk:
    """What is remembered of an ask: seq, digest, prices (base units per 1,000,000 tokens), and a hash of its sealing key."""

    seq: int
    digest: str
    prices: tuple[int, int, int]
    sealing: str

    @classmethod
    def of(cls, ask: Verified[Ask]) -> NewestAsk:
        """Extracts it from a verified ask."""
        message = ask.message
        sealing = hashlib.sha256(message.sealing_suite.encode() + b"\0" + message.sealing_key).hexdigest()
        prices = (message.input_price, message.cached_input_price, message.output_price)
        return cls(message.seq, ask.digest.hex(), prices, sealing)

    def objection(self, other: NewestAsk) -> str | None:
        """Returns why another ask for the same product must not be ordered on, or None."""
        if other.seq > self.seq or other.digest == self.digest:
            return None
        if other.seq == self.seq:
            return f"its provider signed another ask with the same seq {self.seq}"
        more_expensive = any(own < theirs for own, theirs in zip(self.prices, other.prices, strict=True))
        if not more_expensive and other.sealing == self.sealing:
            return None
        return f"it is stale: its seq is {other.seq}, and its provider's newest ask, with seq {self.seq}, differs"

    def dumps(self) -> str:
        """The form in which the ledger stores it."""
        return dumps([str(self.seq), self.digest, [str(price) for price in self.prices], self.sealing]).decode()

    @classmethod
    def loads(cls, text: str) -> NewestAsk:
        """The inverse of `dumps`."""
        seq, digest, (input_price, cached_price, output_price), sealing = loads(text, "asks.newest_doc")
        return cls(int(seq), digest, (int(input_price), int(cached_price), int(output_price)), sealing)


def product_of(ask: Ask) -> ProductKey:
    """The provider and a hash of the product that an ask sells; asks with the same key replace each other."""
    spec = ask.spec
    members = [ask.model, spec.precision, spec.kv_precision, spec.region, spec.tier]
    members += [BATCH_ONLY] if is_batch_only(ask) else []  # a discount makes no other ask stale
    product = dumps([*members, *rule_features(spec.features)])
    return ask.provider, hashlib.sha256(product).hexdigest()


def find_stale(
    asks: Sequence[Verified[Ask]], known: Mapping[ProductKey, NewestAsk]
) -> tuple[dict[Hash, str], dict[ProductKey, NewestAsk]]:
    """Returns why some of these asks must not be ordered on, by digest, and the newest ask of each product that `known` lacks."""
    newest: dict[ProductKey, NewestAsk] = {}
    for ask in asks:
        product, candidate = product_of(ask.message), NewestAsk.of(ask)
        before = newest.get(product) or known.get(product)
        if before is None or candidate.seq > before.seq:
            newest[product] = candidate
    reasons: dict[Hash, str] = {}
    for ask in asks:
        product = product_of(ask.message)
        reason = (newest.get(product) or known[product]).objection(NewestAsk.of(ask))
        if reason is not None:
            reasons[ask.digest] = reason
    return reasons, newest


def read_newest(
    c: Connection, domain: Domain, products: Iterable[ProductKey], now: int
) -> tuple[dict[ProductKey, NewestAsk], bool]:
    """Returns the remembered asks of these products, and whether their last-seen time is due for an update.

    `now` is Unix seconds.
    """
    wanted = set(products)
    by_provider = asks_table.c.provider.in_([provider for provider, _ in wanted])
    query = sa.select(asks_table).where(asks_table.c.deployment_id == deployment_id(domain), by_provider)
    rows = [row for row in c.execute(query) if (row.provider, row.product) in wanted]
    known = {(Address(row.provider), str(row.product)): NewestAsk.loads(row.newest_doc) for row in rows}
    return known, any(now - row.seen_at >= TOUCH_SECONDS for row in rows)


def remember_asks(c: Connection, domain: Domain, asks: Sequence[Verified[Ask]], now: int) -> None:
    """Stores the newest ask of each product, and `now` (Unix seconds) as the time at which these products were last seen."""
    known, _ = read_newest(c, domain, map(product_of, (ask.message for ask in asks)), now)
    _, newer = find_stale(asks, known)
    deployment = deployment_id(domain)
    for (provider, product), newest in (known | newer).items():
        row = {
            "deployment_id": deployment,
            "provider": provider,
            "product": product,
            "newest_doc": newest.dumps(),
            "seen_at": now,
        }
        statement = insert(asks_table).values(row)
        changed = {"newest_doc": statement.excluded.newest_doc, "seen_at": statement.excluded.seen_at}
        primary_key = [asks_table.c.deployment_id, asks_table.c.provider, asks_table.c.product]
        c.execute(statement.on_conflict_do_update(index_elements=primary_key, set_=changed))
    _delete_excess(c)


def _delete_excess(c: Connection) -> None:
    count = c.execute(sa.select(sa.func.count()).select_from(asks_table)).scalar_one()
    if count > MAX_REMEMBERED:
        row_id: sa.ColumnElement[int] = sa.literal_column("asks.rowid")
        has_tab = sa.exists().where(tabs.c.deployment_id == asks_table.c.deployment_id, tabs.c.provider == asks_table.c.provider)
        oldest = sa.select(row_id).select_from(asks_table).order_by(has_tab, asks_table.c.seen_at).limit(count - MAX_REMEMBERED)
        c.execute(sa.delete(asks_table).where(sa.literal_column("rowid").in_(oldest)))
