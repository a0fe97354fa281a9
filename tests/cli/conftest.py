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
    """Runs `tally` in this process, with its own home folder."""

    home: Path
    run_main: Callable[[tuple[str, ...]], tuple[int, str, str]]

    def __call__(self, *arguments: str, fails: bool = False) -> Any:
        """Returns a command's JSON, or with `fails` its error. Checks the exit code."""
        code, out, err = self.run_main((*arguments, "--json"))
        assert code == int(fails), out + err
        answer = json.loads(out)
        return answer["error"] if fails else answer

    def says(self, *arguments: str, code: int = 0) -> str:
        """Returns the text that a command prints, in one line. Checks the exit code."""
        exit_code, out, err = self.run_main(arguments)
        assert exit_code == code, out + err
        return " ".join((out + err).split())

    def wallet(self, name: str) -> str:
        """Makes a wallet with a key derived from its name. Returns its address."""
        signer = person(f"wallet {name}")
        create_keystore(self.home / "keys" / f"{name}.json", PASSWORD, signer.secret, cost=CHEAP)
        return signer.address


def on_chain(market: Tally, act: Callable[[World], Awaitable[object]]) -> None:
    """Acts on the market's contracts in a way that no command does."""

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
    """Runs commands as `tally …` does, in an environment without the user's settings."""
    for name, value in {"TALLYSTICK_HOME": str(tmp_path), "TALLYSTICK_PASSWORD": PASSWORD, "COLUMNS": "300"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TALLYSTICK_PASSWORD_FILE", raising=False)

    def run_main(arguments: tuple[str, ...]) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tally", *arguments])
        capsys.readouterr()  # what this process wrote before, such as the SDK's log
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return Tally(tmp_path, run_main)


@pytest.fixture
def payer(tally: Tally) -> Tally:
    """A `tally` with a wallet named `default`."""
    tally.wallet("default")
    return tally


@pytest.fixture
def fake() -> Iterator[FakeMarket]:
    """A fake market that serves from another thread."""
    ready, stop, markets = threading.Event(), asyncio.Event(), list[FakeMarket]()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        market = FakeMarket()
        async with market.serve():
            markets.append(market)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(120)
    yield markets[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


@pytest.fixture
def url(fake: FakeMarket) -> str:
    """The URL of the fake market."""
    return fake.url
