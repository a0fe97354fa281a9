from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from tallystick import ClientConfig, SyncMarket
from tallystick.client.tables import JobState
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tests.client.fake import CHAT, MESSAGES, STREAM, WORDS, FakeMarket, event, until_cancelled
from tests.client.parties import MODEL


async def test_everything_without_async(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Models, chat, streaming and what is remembered work without async, also beside a running loop."""

    def use() -> None:
        with SyncMarket(fake.url, wallet, config) as market:
            assert [model.id for model in market.models()] == [MODEL]
            result = market.chat(MODEL, MESSAGES)
            assert result.text == "".join(WORDS)
            with market.submit(CHAT, STREAM) as job:
                assert job.start().status == 200
                assert list(job) == [*map(event, WORDS), b"data: [DONE]\n\n"]
                assert job.result().cost == 3
            known = market.find(result.job)
            assert known is not None
            assert known.state is JobState.COMPLETED
            with pytest.raises(Refusal) as caught:
                market.chat("nothing", MESSAGES)
            assert caught.value.code is Code.UNKNOWN_MODEL

    await asyncio.to_thread(use)


async def test_leaving_cancels(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A job that is left before its end is cancelled."""
    fake.script = until_cancelled

    def use() -> None:
        with SyncMarket(fake.url, wallet, config) as market, market.submit(CHAT, STREAM) as job:
            assert next(iter(job)) == event("on and on ")

    await asyncio.to_thread(use)
    assert len(fake.cancels) == 1


def test_unusable_state_file(wallet: Signer, config: ClientConfig) -> None:
    """A market that can't be opened leaves no thread behind."""
    assert config.state is not None
    config.state.mkdir()
    with pytest.raises(Unavailable, match="state file"), SyncMarket("http://127.0.0.1:1", wallet, config):
        pass


def test_the_package_is_light() -> None:
    """Importing the package or its protocol loads none of the client; asking for Market does."""
    code = (
        "import sys, tallystick, tallystick.protocol.messages as m; assert not any(n in sys.modules for n in"
        " ('aiohttp', 'sqlalchemy', 'tallystick.client')); from tallystick import Market; assert 'aiohttp' in sys.modules;"
        " assert not hasattr(tallystick, 'Nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
