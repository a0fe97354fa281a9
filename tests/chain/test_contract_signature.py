"""Signatures of smart accounts (EIP-1271) on both chains."""

from __future__ import annotations

import pytest

from tallystick.chain.contract_signature import is_contract_signature
from tallystick.chain.rpc import Rpc
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.sign_in import text_digest
from tallystick.protocol.types import Hash
from tests.chain.harness import World, person
from tests.chain.smart_account import BOASTING, REVERTING, SPINNING, code_of, create_account

OWNER = person("owner of a smart account")
DIGEST = text_digest("sign in")


async def test_the_contract_decides(either: World) -> None:
    """The owner's signature is the account's; that of another key, of another text, or a cut one is not."""
    account = await create_account(either.deployer, code_of(OWNER.address))
    signature = OWNER.sign_digest(DIGEST)

    assert await is_contract_signature(either.rpc, account, DIGEST, signature)
    assert not await is_contract_signature(either.rpc, account, text_digest("another"), signature)
    assert not await is_contract_signature(either.rpc, account, DIGEST, person("another key").sign_digest(DIGEST))
    assert not await is_contract_signature(either.rpc, account, DIGEST, signature[:40])


@pytest.mark.parametrize("code", [REVERTING, SPINNING, BOASTING])
async def test_strange_contracts(either: World, code: bytes) -> None:
    """A contract that reverts, burns all gas or returns another value signs nothing."""
    account = await create_account(either.deployer, code)

    assert not await is_contract_signature(either.rpc, account, DIGEST, OWNER.sign_digest(DIGEST))


async def test_an_account_without_code(either: World) -> None:
    """A key's account, which has no code, signs nothing this way."""
    assert not await is_contract_signature(either.rpc, OWNER.address, DIGEST, OWNER.sign_digest(DIGEST))


async def test_no_chain() -> None:
    """Without an answer of the chain, nothing is said of the signature."""
    rpc = Rpc("http://127.0.0.1:9", attempts=1)
    with pytest.raises(Unavailable):
        await is_contract_signature(rpc, OWNER.address, Hash(DIGEST), b"x")
    await rpc.close()
