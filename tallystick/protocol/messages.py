"""The signed messages of the protocol and the structs in them.

contracts/src/Messages.sol defines Order, Claim, Receipt, Bind and Release for the chain; golden vectors keep both equal.
"""

from __future__ import annotations

from enum import IntEnum

from tallystick.protocol.codecs import U8, U16, U32, U64, U96
from tallystick.protocol.eip712 import Message, message
from tallystick.protocol.types import Address, Hash, JobId

UNKNOWN = "unknown"
"""The value of a spec member that the provider does not know."""


class Outcome(IntEnum):
    """How a job ended. jobs.CHARGES has the charge that each outcome allows."""

    COMPLETED = 0
    LENGTH = 1
    CLIENT_CANCELLED = 2
    PROVIDER_ERROR = 3
    UPSTREAM_ERROR = 4
    TIMED_OUT = 5
    REFUSED = 6


@message()
class Spec(Message):
    """The product that an ask sells. Different precisions are different products. Unknown members are "unknown"."""

    revision: str = UNKNOWN
    tokenizer: str = UNKNOWN
    template: str = UNKNOWN
    precision: str = UNKNOWN
    kv_precision: str = UNKNOWN
    engine: str = UNKNOWN
    engine_version: str = UNKNOWN
    region: str = UNKNOWN
    tier: str = UNKNOWN
    features: tuple[str, ...] = ()


@message(signer="provider")
class Ask(Message):
    """A provider's standing offer for one model. Prices are base units per 1,000,000 tokens, times are Unix seconds."""

    provider: Address
    model: str
    input_price: U64
    cached_input_price: U64
    output_price: U64
    context_tokens: U32
    max_output_tokens: U32
    sealing_suite: str
    sealing_key: bytes
    valid_from: U64
    valid_until: U64
    seq: U64
    spec: Spec


@message()
class Terms(Message):
    """The terms of one job. Its order contains only their hash. `max_cost` is the cap of this job alone, in base units."""

    model: str
    ask: Hash
    input_price: U64
    cached_input_price: U64
    output_price: U64
    max_cost: U96
    max_output_tokens: U32
    job: JobId
    request_commitment: Hash


@message(signer="payer")
class Order(Message):
    """A payer's order on one provider.

    `ceiling` is the cap on the tab's total over its whole life, in base units: the cost of all accepted receipts plus the caps of
    all open orders on this provider. No node starts the job after `deadline`, and no claim pays on the order after `claim_by`;
    both are Unix seconds.
    """

    payer: Address
    provider: Address
    ceiling: U96
    reserve_target: U96
    seq: U64
    deadline: U64
    claim_by: U64
    max_fee_bps: U16
    coordinator: Address
    terms_hash: Hash


@message(signer="provider")
class Receipt(Message):
    """A provider's statement of one job and of the tab's new total, in base units. `seq` counts the tab's receipts from 1."""

    payer: Address
    provider: Address
    seq: U64
    cumulative_cost: U96
    order_hash: Hash
    result_commitment: Hash
    input_tokens: U32
    cached_input_tokens: U32
    output_tokens: U32
    cost: U96
    outcome: U8
    finished_at: U64
    evidence_root: Hash


@message()
class ClaimRow(Message):
    """One tab to collect: its total `cumulative_cost` as of receipt `seq`, on the order with this digest."""

    payer: Address
    order_hash: Hash
    seq: U64
    cumulative_cost: U96


@message(signer="provider")
class Claim(Message):
    """A provider's claim: anyone may collect these rows for it."""

    provider: Address
    rows: tuple[ClaimRow, ...]


@message(signer="key")
class Bind(Message):
    """A signing key's agreement to spend a purse of this owner. A key is bound once."""

    key: Address
    owner: Address


@message(signer="provider")
class Release(Message):
    """A provider's consent, valid until `deadline`, to lower the reservation for it on a tab to `floor` base units at once."""

    payer: Address
    provider: Address
    floor: U96
    deadline: U64


@message(signer="coordinator")
class LogHead(Message):
    """The coordinator's statement of its match log: the root of the first `size` leaves. There is one head for each size.

    `signed_at` is in Unix seconds.
    """

    coordinator: Address
    size: U64
    root: Hash
    signed_at: U64


@message(signer="payer")
class Inquiry(Message):
    """A payer's request for its last receipts from a provider, signed to prove that the caller holds the payer's key.

    `asked_at` is in Unix seconds.
    """

    payer: Address
    provider: Address
    coordinator: Address
    asked_at: U64


@message(signer="provider")
class Connect(Message):
    """A node's answer to a coordinator's challenge, signed to prove that the node holds the provider's key.

    It is valid for one connection. `endpoint` is the host and port that the node dialled, such as "coordinator.example:443": an
    answer forwarded by a relay names the relay's endpoint and is refused.
    """

    provider: Address
    coordinator: Address
    challenge: Hash
    endpoint: str


@message(signer="account")
class Access(Message):
    """A proof that the caller of a coordinator's HTTP API holds this account's key.

    Only this coordinator accepts it, for ACCESS_SECONDS before and after `issued_at` (Unix seconds).
    """

    account: Address
    coordinator: Address
    issued_at: U64


@message(signer="payer")
class AuditReport(Message):
    """A payer's verdict on one job of a provider. `precision`: the class that the ask declared.

    `receipt_hash`: the digest of the paid receipt. `evidence_hash`: the SHA-256 of the evidence file; zero for none.
    `reported_at`: Unix seconds.
    """

    payer: Address
    provider: Address
    coordinator: Address
    job: JobId
    model: str
    precision: str
    verdict: U8
    receipt_hash: Hash
    evidence_hash: Hash
    reported_at: U64
    salt: Hash


@message(signer="coordinator")
class ReportAck(Message):
    """The coordinator's promise that its match log has the report with this digest as leaf `index`, whose hash is `leaf_hash`.

    `accepted_at`: Unix seconds.
    """

    coordinator: Address
    report_hash: Hash
    index: U64
    leaf_hash: Hash
    accepted_at: U64


@message(signer="coordinator")
class ProbeSeal(Message):
    """The coordinator's statement that a report is of a probe of its own, placed with a key that only it knows."""

    coordinator: Address
    report_hash: Hash
