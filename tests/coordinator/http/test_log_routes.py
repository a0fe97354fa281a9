"""The match log over HTTP: head, proofs and entries, as anyone reads them, and what is refused."""

from __future__ import annotations

import pytest

from tallystick.protocol.eip712 import read_signed
from tallystick.protocol.log_monitor import MAX_SPAN
from tallystick.protocol.match_log import Match
from tallystick.protocol.merkle import includes, includes_span, is_prefix
from tallystick.protocol.messages import LogHead
from tests.coordinator.harness import COORDINATOR, DOMAIN
from tests.coordinator.live_server import Served


async def _matched(at: Served, count: int) -> list[Match]:
    """Runs so many jobs on a served market and returns their matches."""
    world = at.world
    await world.market.start()
    node = world.node("ann", slots=64)
    clients = [await world.started(node) for _ in range(count)]
    await world.market.match_log.sign_head()
    return [Match.loads(client.frames[0][1]) for client in clients]


async def test_a_reader_checks_everything_itself(at: Served) -> None:
    """From the routes alone, a reader gets the signed head, proves a leaf's place, and that the log only grew."""
    matches = await _matched(at, 5)
    head = read_signed(LogHead, (await at.http.get("/v1/log/head")).json()).verify(DOMAIN).message
    assert (head.coordinator, head.size) == (COORDINATOR.address, 6)
    proven = (await at.http.get("/v1/log/inclusion", params={"index": matches[2].index})).json()
    assert includes(head.root, proven["size"], proven["index"], matches[2].leaf_hash, [bytes.fromhex(p) for p in proven["path"]])
    assert bytes.fromhex(proven["leaf"]) == matches[2].leaf
    earlier = (await at.http.get("/v1/log/inclusion", params={"index": 1, "size": 2})).json()
    assert earlier["size"] == 2
    first_root = bytes.fromhex((await at.http.get("/v1/log/inclusion", params={"index": 0, "size": 1})).json()["hash"])
    grown = (await at.http.get("/v1/log/consistency", params={"first": 1})).json()
    assert (grown["first"], grown["second"]) == (1, 6)
    assert is_prefix(1, first_root, 6, head.root, [bytes.fromhex(part) for part in grown["path"]])
    listed = (await at.http.get("/v1/log/entries", params={"start": 1, "limit": 2})).json()
    assert [entry["hash"] for entry in listed["entries"]] == [match.leaf_hash.hex() for match in matches[:2]]
    assert listed["next"] == 3
    both = (await at.http.get("/v1/log/proof", params={"since": [0, 1], "index": [1, 2, 99]})).json()
    assert (set(both["consistency"]), set(both["inclusion"]), both["epoch"]) == ({"0", "1"}, {"1", "2"}, 0)
    row = (await at.http.get("/v1/log/proof", params={"start": 1, "end": 6})).json()["span"]
    hashes, beside = [match.leaf_hash for match in matches], [bytes.fromhex(part) for part in row["path"]]
    assert (row["hashes"], includes_span(head.root, 6, 1, hashes, beside)) == (b"".join(hashes).hex(), True)
    for start, end in ((1, 7), (1, 1), (0, MAX_SPAN + 1)):
        assert (await at.http.get("/v1/log/proof", params={"start": start, "end": end})).json()["span"] is None


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("inclusion?index=6", 404, "unknown_leaf"),
        ("inclusion?index=2&size=2", 404, "unknown_leaf"),
        ("inclusion", 400, "bad_message"),
        ("inclusion?index=-1", 400, "bad_message"),
        (f"inclusion?index={1 << 63}", 400, "bad_message"),
        ("consistency?first=7", 404, "unknown_leaf"),
        ("consistency?first=3&second=2", 404, "unknown_leaf"),
        ("entries?limit=257", 400, "bad_message"),
        ("entries?start=-1", 400, "bad_message"),
        ("proof?" + "&".join(f"index={number}" for number in range(17)), 400, "bad_message"),
        ("proof?since=x", 400, "bad_message"),
    ],
)
async def test_what_is_not_there_is_said(at: Served, path: str, status: int, code: str) -> None:
    """A leaf or a size beyond the head, or too many of them, get an error that says so."""
    await _matched(at, 5)
    response = await at.http.get(f"/v1/log/{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_before_the_first_head_the_log_is_unavailable(at: Served) -> None:
    """A coordinator that has signed nothing yet says so."""
    response = await at.http.get("/v1/log/head")
    assert (response.status_code, "no signed head yet" in response.text) == (503, True)
