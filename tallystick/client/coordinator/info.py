"""What a coordinator tells of itself, and of a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tallystick.client.coordinator.model_offers import MAX_NUMBER
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.jobs import State
from tallystick.protocol.json_members import read_count, read_text
from tallystick.protocol.link import MAX_CHAIN_ID
from tallystick.protocol.messages import Receipt
from tallystick.protocol.replicas import Replica, read_replicas
from tallystick.protocol.types import Address, parse_address
from tallystick.protocol.versions import check_protocol


@dataclass(frozen=True, slots=True)
class CoordinatorInfo:
    """The coordinator's account and fee (basis points), and the deployment on which it settles.

    `block` is the block of the contract's creation, 0 if it was not told. `rpc` is the chain's endpoint if that is on the
    coordinator's own machine. `replicas`: the processes that serve this coordinator; empty if it is alone.
    """

    coordinator: Address
    domain: Domain
    token: Address | None
    token_decimals: int
    fee_bps: int
    block: int = 0
    rpc: str | None = None
    replicas: tuple[Replica, ...] = field(default=(), compare=False)

    @classmethod
    def from_json(cls, raw: object) -> CoordinatorInfo:
        """Reads GET /v1/info. Raises BadMessage, also for a coordinator of another protocol."""
        if not isinstance(raw, dict):
            raise BadMessage("info: expected a JSON object")
        check_protocol(raw.get("protocol"), "info", "the coordinator")
        token = raw.get("token")
        chain = read_count(raw.get("chainId"), "info.chainId", high=MAX_CHAIN_ID)
        return cls(
            coordinator=parse_address(raw.get("coordinator"), "info.coordinator"),
            domain=Domain(chain, parse_address(raw.get("contract"), "info.contract")),
            token=None if token is None else parse_address(token, "info.token"),
            token_decimals=read_count(raw.get("tokenDecimals"), "info.tokenDecimals", high=255),
            fee_bps=read_count(raw.get("feeBps"), "info.feeBps", high=10_000),
            block=read_count(raw.get("block", 0), "info.block", high=MAX_NUMBER),
            rpc=None if raw.get("rpc") is None else read_text(raw["rpc"], "info.rpc"),
            replicas=read_replicas(raw.get("replicas", []), "info.replicas"),
        )


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A job as the coordinator reports it."""

    state: State
    receipt: Signed[Receipt] | None
    raw: dict[str, Any]
