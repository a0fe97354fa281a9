from __future__ import annotations

from typing import Any

import pytest

from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import Escrow
from tests.cli.conftest import Tally


@pytest.fixture
def market(tally: Tally, chain_url: str) -> Tally:
    """A market, an owner with money, and the purse of `old` with ten dollars, three of them reserved."""
    for name in ("owner", "old", "new", "node"):
        tally.wallet(name)
    tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", "--fund", "owner")
    tally("deposit", "10", "--wallet", "old", "--owner", "owner")
    tally("reserve", "node", "3", "--wallet", "old", "--owner", "owner")
    return tally


def _rotate(market: Tally, **options: Any) -> Any:
    return market("wallet", "rotate", "old", "new", "--owner", "owner", **options)


def _advance(market: Tally) -> None:
    market("chain", "advance", "1m", "--rpc", Deployment.load(market.home / "deployment.json").rpc)


def _free(market: Tally, name: str) -> str:
    return str(market("contract", "inspect", "purse", name)["purse"]["free"])


def test_hot_key_is_rotated(market: Tally) -> None:
    """The command, repeated after each wait, moves all money including reservations; the owner stays, and no unit is lost."""
    first = _rotate(market)
    assert (first["finished"], [text.split()[0] for text in first["done"]]) == (False, ["bound", "announced", "announced"])
    assert first["continueAt"]
    early = _rotate(market)
    assert (early["done"], early["finished"]) == ([], False)
    assert "repeat the command in" in market.says("wallet", "rotate", "old", "new", "--owner", "owner")
    _advance(market)
    second = _rotate(market)
    assert [text.split()[0] for text in second["done"]] == ["released", "withdrew", "announced", "deposited"]
    assert (_free(market, "new"), second["moved"]) == ("7000000", "7000000")
    _advance(market)
    last = _rotate(market)
    assert (last["finished"], last["moved"], last["continueAt"]) == (True, "10000000", None)
    assert (_free(market, "old"), _free(market, "new")) == ("0", "10000000")
    assert not list((market.home / "rotations").iterdir())


def test_interrupted_rotation_continues(market: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """Money that was withdrawn before an interruption is deposited by the next run, once."""
    _rotate(market)
    _advance(market)
    with monkeypatch.context() as patch:
        patch.setattr(Escrow, "deposit_with_permit", _cut)
        market.says("wallet", "rotate", "old", "new", "--owner", "owner", code=130)
    assert _free(market, "new") == "0"
    assert [text.split()[0] for text in _rotate(market)["done"]] == ["deposited"]
    assert _rotate(market)["done"] == []
    assert _free(market, "new") == "7000000"


def _cut(*_: object) -> None:
    raise KeyboardInterrupt


def test_rotation_is_refused(market: Tally) -> None:
    """Another owner's purse, a purse that owns itself, a key without a purse, and the same key are refused."""
    rotate = ("wallet", "rotate")
    assert "belongs to" in market(*rotate, "old", "new", "--owner", "node", fails=True)["message"]
    assert "no purse" in market(*rotate, "node", "new", "--owner", "owner", fails=True)["message"]
    assert "the same key" in market(*rotate, "old", "old", "--owner", "owner", fails=True)["message"]
    market("deposit", "1", "--wallet", "owner")
    assert "owns its own purse" in market(*rotate, "owner", "new", "--owner", "owner", fails=True)["message"]


def test_deposit_top_up_to(market: Tally) -> None:
    """--top-up-to deposits exactly what is missing, reservations included, or nothing; it excludes AMOUNT."""
    of = ("--wallet", "old", "--owner", "owner")
    assert market("deposit", "--top-up-to", "12.5", *of)["deposited"] == "2500000"
    again = market("deposit", "--top-up-to", "12.5", *of)
    assert (again["deposited"], again["tx"]) == ("0", None)
    assert market("deposit", "--top-up-to", "5", *of)["deposited"] == "0"
    market("thaw", "1", *of)
    assert market("deposit", "--top-up-to", "12.5", *of)["deposited"] == "1000000"
    assert market("deposit", "--top-up-to", "2", "--wallet", "new", "--owner", "owner")["free"] == "2000000"
    for wrong in ((), ("1", "--top-up-to", "2")):
        assert "--top-up-to" in market("deposit", *wrong, fails=True)["message"]
