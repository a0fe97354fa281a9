"""Every message that somebody signs. The Solidity side of Order, Claim, Receipt, Bind and Release is
contracts/src/Messages.sol; golden vectors keep the two equal.
"""

from __future__ import annotations

from enum import IntEnum

from tallystick.protocol.codecs import U8, U16, U32, U64, U96
from tallystick.protocol.eip712 import Message, message
from tallystick.protocol.types import Address, Hash, JobId

UNKNOWN = "unknown"
"""What a spec says of a thing that its provider does not know."""


class Outcome(IntEnum):
    """How a job ended; jobs.CHARGES says what each outcome may charge."""

    COMPLETED = 0
    LENGTH = 1
    CLIENT_CANCELLED = 2
    PROVIDER_ERROR = 3
    UPSTREAM_ERROR = 4
    TIMED_OUT = 5
    REFUSED = 6


@message()
class Spec(Message):
    """What exactly is being sold. Precision classes are different products. Unknown things say "unknown"."""

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
    """A provider's standing offer for one model. Prices are base units per 1,000,000 tokens; times are Unix seconds."""

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
    """What one job buys: hashed into its order, off chain. `max_cost` is the cap of this job alone, in base units."""

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
    """A payer's signed demand on one provider.

    `ceiling` is cumulative over the life of the tab: the cost of all receipts accepted so far plus the caps of every order
    signed for it and not yet ended or expired. `deadline`: no node starts it later. `claim_by`: no claim pays on it later.
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
    """A provider's signed evidence of one job and of the tab's new total. `seq` is one more than the tab's last."""

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
    """One tab to collect: `cumulative_cost` as of receipt `seq`, on the strength of the order with this digest."""

    payer: Address
    order_hash: Hash
    seq: U64
    cumulative_cost: U96


@message(signer="provider")
class Claim(Message):
    """A provider's request that anyone collect these rows for it."""

    provider: Address
    rows: tuple[ClaimRow, ...]


@message(signer="key")
class Bind(Message):
    """Proof that a signing key agrees to spend a purse of this owner; bound once."""

    key: Address
    owner: Address


@message(signer="provider")
class Release(Message):
    """A provider's consent that what is reserved for it on a tab may drop to `floor` at once, until `deadline`."""

    payer: Address
    provider: Address
    floor: U96
    deadline: U64


@message(signer="coordinator")
class Match(Message):
    """The coordinator's choice of one order of a job's shortlist. `attempt` counts from 0."""

    coordinator: Address
    job: JobId
    provider: Address
    order_hash: Hash
    attempt: U32
    matched_at: U64


@message(signer="payer")
class Inquiry(Message):
    """A payer's question to a coordinator for its own last receipts of a provider, asked at this Unix time: proof that whoever
    asks holds the payer's key.
    """

    payer: Address
    provider: Address
    coordinator: Address
    asked_at: U64


@message(signer="provider")
class Connect(Message):
    """A node's answer to a coordinator's challenge: proof that it holds the provider's key, for this connection only.

    `endpoint` is the host and port that the node dialled, such as "coordinator.example:443". A relay in between was dialled under
    another name, so the answer that it passes on is refused.
    """

    provider: Address
    coordinator: Address
    challenge: Hash
    endpoint: str


@message(signer="account")
class Access(Message):
    """Proof that the caller of a coordinator's HTTP API holds this account's key. It is accepted for a few minutes around
    `issued_at` (Unix seconds), by this coordinator only.
    """

    account: Address
    coordinator: Address
    issued_at: U64
