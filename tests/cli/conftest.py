from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.deployment import Deployment
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc, Sender
from tallystick.cli.main import main
from tallystick.runtime.keystore import create_keystore
from tests.chain.conftest import anvil_url, chain_url, either_url, proxies, proxy
from tests.chain.harness import World, person
from tests.client.fake_coordinator import FakeMarket

__all__ = ["anvil_url", "chain_url", "either_url", "proxies", "proxy"]

PASSWORD = "a password"
CHEAP = 1 << 12


@dataclass
class Tally:
    """`tally` in this process, with a home folder of its own."""

    home: Path
    run_main: Callable[[tuple[str, ...]], tuple[int, str, str]]

    def __call__(self, *arguments: str, fails: bool = False) -> Any:
        """Its JSON; with `fails`, the error in it. Exit codes are checked."""
        code, out, err = self.run_main((*arguments, "--json"))
        assert code == int(fails), out + err
        answer = json.loads(out)
        return answer["error"] if fails else answer

    def says(self, *arguments: str, code: int = 0) -> str:
        """What people see, in one line."""
        found, out, err = self.run_main(arguments)
        assert found == code, out + err
        return " ".join((out + err).split())

    def wallet(self, name: str) -> str:
        """Makes a wallet whose key follows from its name; its address."""
        signer = person(f"wallet {name}")
        create_keystore(self.home / "keys" / f"{name}.json", PASSWORD, signer.secret, cost=CHEAP)
        return signer.address


def on_chain(market: Tally, act: Callable[[World], Awaitable[object]]) -> None:
    """Something that no command does, on the market's contracts."""

    async def run() -> None:
        deployment = Deployment.load(market.home / "deployment.json")
        rpc = Rpc(deployment.rpc)
        try:
            await act(World(rpc, deployment, Escrow(rpc, deployment), Sender(rpc, dev_accounts()[0], poll=0.001)))
        finally:
            await rpc.close()

    asyncio.run(run())


@pytest.fixture
def tally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tally:
    """Runs commands as `tally …` would, in an environment without settings of anybody's."""
    for name, value in {"TALLYSTICK_HOME": str(tmp_path), "TALLYSTICK_PASSWORD": PASSWORD, "COLUMNS": "300"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TALLYSTICK_PASSWORD_FILE", raising=False)

    def run_main(arguments: tuple[str, ...]) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tally", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return Tally(tmp_path, run_main)


@pytest.fixture
def payer(tally: Tally) -> Tally:
    """With a wallet."""
    tally.wallet("default")
    return tally


@pytest.fixture
def fake() -> Iterator[FakeMarket]:
    """A market that serves from another thread."""
    ready, over, made = threading.Event(), asyncio.Event(), list[FakeMarket]()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        market = FakeMarket()
        async with market.serve():
            made.append(market)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield made[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(10)
    loop.close()


@pytest.fixture
def url(fake: FakeMarket) -> str:
    """Where that market is."""
    return fake.url
