"""Access tokens: who may read and cancel at a coordinator."""

from __future__ import annotations

import pytest

from tallystick.protocol.access import ACCESS_SECONDS, MAX_TOKEN, dump_access, load_access
from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.errors import BadMessage, BadSignature, Code, Refusal, TallyError
from tallystick.protocol.messages import Access
from tallystick.protocol.types import Address

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
PAYER, OTHER, COORDINATOR = (Signer(bytes([number]) * 32) for number in (1, 2, 3))
NOW = 1_800_000_000


def _token(signer: Signer = PAYER, domain: Domain = DOMAIN, coordinator: Address = COORDINATOR.address, at: int = NOW) -> str:
    return dump_access(signer.sign(Access(account=signer.address, coordinator=coordinator, issued_at=at), domain))


def _read(header: str | None, now: float = NOW) -> Address:
    return load_access(header, DOMAIN, COORDINATOR.address, now)


def test_a_token_names_its_account() -> None:
    """A token's signer is the caller."""
    assert _read(_token()) == PAYER.address
    assert _read(_token(OTHER)) == OTHER.address


@pytest.mark.parametrize("header", [None, "", "Tally", "Tally ", "Bearer abc", "tally abc"])
def test_without_a_token(header: str | None) -> None:
    """A request without a token, or with another scheme, is refused with an explanation of how to get one."""
    with pytest.raises(Refusal, match="signed access token") as caught:
        _read(header)
    assert caught.value.code is Code.UNAUTHENTICATED


@pytest.mark.parametrize("header", ["Tally ***", "Tally " + "A" * (MAX_TOKEN + 1), "Tally e30", "Tally \u00e9", "Tally W10"])
def test_a_malformed_token(header: str) -> None:
    """A malformed token is a bad message and never crashes."""
    with pytest.raises(BadMessage, match="access"):
        _read(header)


def test_a_token_for_another_coordinator_or_chain() -> None:
    """A token for one coordinator is invalid at another one."""
    with pytest.raises(Refusal, match=r"access\.coordinator"):
        _read(_token(coordinator=OTHER.address))
    with pytest.raises(BadSignature):
        _read(_token(domain=Domain(1, DOMAIN.contract)))


@pytest.mark.parametrize("shift", [-ACCESS_SECONDS, ACCESS_SECONDS])
def test_a_token_lasts_for_minutes(shift: int) -> None:
    """A token is valid up to and including its last second."""
    assert _read(_token(at=NOW + shift)) == PAYER.address
    error_type: type[TallyError] = Refusal
    with pytest.raises(error_type, match="clock"):
        _read(_token(at=NOW + shift + (1 if shift > 0 else -1)))
