"""Which deployment and coordinator a client insists on: every signature binds chain and contract, so they must be right."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.chain.deployment import Deployment
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorInfo
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal
from tallystick.protocol.types import Address


def load_deployment(config: ClientConfig) -> Deployment | None:
    """The deployment file that a config names, if it does. Raises BadMessage if it cannot be read."""
    if config.deployment is None:
        return None
    try:
        return Deployment.load(config.deployment)
    except OSError as error:
        raise BadMessage(f"deployment file {config.deployment}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class DeploymentPin:
    """What must hold of a coordinator; None: anything."""

    chain_id: int | None = None
    contract: Address | None = None
    coordinator: Address | None = None

    @classmethod
    def of(cls, config: ClientConfig) -> DeploymentPin:
        """From the settings and the deployment file that they name. Raises BadMessage if these can't be read or disagree."""
        stated = cls(config.chain_id, config.contract, config.coordinator_address)
        deployment = load_deployment(config)
        if deployment is None:
            return stated
        if config.chain_id not in (None, deployment.chain_id) or config.contract not in (None, deployment.escrow):
            raise BadMessage(f"config: chain_id and contract are not those of {config.deployment}")
        return cls(deployment.chain_id, deployment.escrow, config.coordinator_address)

    def check(self, info: CoordinatorInfo, max_fee_bps: int) -> None:
        """Raises Refusal if this is not the coordinator, contract or chain insisted on, or its fee is above the maximum."""
        found = (
            ("chain", self.chain_id, info.domain.chain_id),
            ("contract", self.contract, info.domain.contract),
            ("coordinator", self.coordinator, info.coordinator),
        )
        for name, wanted, told in found:
            if wanted not in (None, told):
                text = f"the coordinator names {name} {told}, but this client insists on {wanted}"
                raise Refusal(Code.ORDER_MISDIRECTED, text, fault=Fault.COORDINATOR)
        if info.fee_bps > max_fee_bps:
            text = f"the coordinator keeps {info.fee_bps} bps of payments, above max_fee_bps {max_fee_bps}"
            raise Refusal(Code.PRICE_ABOVE_CAP, text)
