"""Checks that the coordinator settles on the expected deployment: every signature binds chain and contract.

A client can pin chain, contract and coordinator in its config or by a deployment file.
"""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.chain.deployment import Deployment
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal
from tallystick.protocol.types import Address


def load_deployment(config: ClientConfig) -> Deployment | None:
    """Loads the deployment file that a config names; None if it names none. Raises BadMessage if it cannot be read."""
    if config.deployment is None:
        return None
    try:
        return Deployment.load(config.deployment)
    except OSError as error:
        raise BadMessage(f"deployment file {config.deployment}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class DeploymentPin:
    """The chain, contract and coordinator that a client insists on; None accepts any."""

    chain_id: int | None = None
    contract: Address | None = None
    coordinator: Address | None = None

    @classmethod
    def of(cls, config: ClientConfig) -> DeploymentPin:
        """Combines the settings with the deployment file that they name. Raises BadMessage if they disagree or the file is
        invalid.
        """
        stated = cls(config.chain_id, config.contract, config.coordinator_address)
        deployment = load_deployment(config)
        if deployment is None:
            return stated
        if config.chain_id not in (None, deployment.chain_id) or config.contract not in (None, deployment.escrow):
            raise BadMessage(
                f"config: chain_id and contract: expected {deployment.chain_id} and {deployment.escrow} "
                f"from {config.deployment}, got {config.chain_id} and {config.contract}"
            )
        return cls(deployment.chain_id, deployment.escrow, config.coordinator_address)

    def check(self, info: CoordinatorInfo, max_fee_bps: int) -> None:
        """Raises Refusal if chain, contract or coordinator differ from the pinned ones, or the fee is above `max_fee_bps`."""
        members = (
            ("chain", self.chain_id, info.domain.chain_id),
            ("contract", self.contract, info.domain.contract),
            ("coordinator", self.coordinator, info.coordinator),
        )
        for name, pinned, announced in members:
            if pinned not in (None, announced):
                text = f"the coordinator announces {name} {announced}, but this client is pinned to {pinned}"
                raise Refusal(Code.ORDER_MISDIRECTED, text, fault=Fault.COORDINATOR)
        if info.fee_bps > max_fee_bps:
            text = f"the coordinator charges a fee of {info.fee_bps} bps, above the setting max_fee_bps = {max_fee_bps}"
            raise Refusal(Code.PRICE_ABOVE_CAP, text)
