from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.client.config import ClientConfig
from tallystick.client.receipts.evidence import read_evidence
from tallystick.client.receipts.file_store import ProofStore
from tallystick.client.receipts.proof import FORMAT, Finding, Proof, describe, read_proof
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, BadReceipt, BadSignature
from tallystick.protocol.token_evidence import EvidenceRow, evidence_root, pack_evidence
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import dumps
from tests.client.fake_coordinator import BODY, CHAT, EVENTS, STREAM, FakeMarket, Session, event, run, until_cancelled
from tests.client.parties import MODEL


@pytest.fixture
async def proof(market: Market, fake: FakeMarket) -> Proof:
    """A proof of an answer that was streamed in three pieces."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("one "))
        await session.chunk(event("two", "stop"), last=True)
        await session.finish()

    fake.script = script
    async with await market.submit(CHAT, STREAM, keep=True) as job:
        assert job.proof is None
        result = await job.result()
    assert result.proof is not None
    assert result.proof == job.proof
    return result.proof


async def test_a_proof_survives_its_file(proof: Proof) -> None:
    """A proof that is written and read again is equal, and all its claims are verified."""
    again = read_proof(proof.dumps())
    assert again == proof
    findings = {finding.check: finding.found for finding in again.check()}
    assert list(findings) == ["order", "terms", "request", "receipt", "price", "transcript"]
    assert findings["transcript"].startswith("the whole answer with status 200: 3 chunks")
    request, answer = again.text()
    assert json.loads(request) == STREAM
    assert "one " in answer
    described = describe(again, again.check())
    assert (described["valid"], described["whole"], described["outcome"], described["model"]) == (True, True, "completed", MODEL)


async def test_nothing_is_kept_unasked(market: Market, fake: FakeMarket) -> None:
    """Unless it is requested, a job stores no plaintext."""
    async with await market.submit(CHAT, BODY) as job:
        assert (await job.result()).proof is None


def _flip(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


def _altered(raw: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Yields the file with each of its values changed, one at a time."""
    made: list[tuple[str, dict[str, Any]]] = []

    def walk(value: Any, put: Any, name: str) -> None:
        if isinstance(value, dict):
            for key in value:
                walk(value[key], lambda new, k=key: put(value | {k: new}), f"{name}.{key}")
        elif isinstance(value, list):
            for n, item in enumerate(value):
                walk(item, lambda new, n=n: put([*value[:n], new, *value[n + 1 :]]), f"{name}[{n}]")
            made.append((f"{name} shorter", put(value[:-1])))
            made.append((f"{name} longer", put([*value, base64.b64encode(b"more").decode()])))
        elif isinstance(value, int):
            made.append((name, put(value + 1)))
        elif name.endswith("request") or "response[" in name:
            plain = base64.b64decode(value)
            made.append((name, put(base64.b64encode(plain[:-1] + bytes([plain[-1] ^ 1])).decode())))
        else:
            made.append((name, put(_flip(value))))

    walk(raw, lambda new: new, "proof")
    return made


def _refused(raw: dict[str, Any]) -> bool:
    try:
        read_proof(json.dumps(raw).encode()).check()
    except (BadMessage, BadReceipt, BadSignature):
        return True
    return False


async def test_every_alteration_is_found(proof: Proof) -> None:
    """A file with any single value changed proves nothing."""
    altered = _altered(json.loads(proof.dumps()))
    assert len(altered) > 40
    for name, raw in altered:
        assert _refused(raw), name


async def test_a_partial_answer_is_proved_too(market: Market, fake: FakeMarket) -> None:
    """The answer before a cancellation is provable, and marked as partial."""
    fake.script = until_cancelled
    job = await market.submit(CHAT, STREAM, keep=True)
    await anext(aiter(job))
    assert await job.cancel() is not None
    assert job.proof is not None
    described = describe(job.proof, job.proof.check())
    assert (described["whole"], described["outcome"]) == (False, "client_cancelled")
    with pytest.raises(BadReceipt, match="lacks its end"):
        replace(job.proof, response=job.proof.response[:-1]).check()


async def test_a_stolen_answer_proves_nothing(proof: Proof, wallet: Signer) -> None:
    """A receipt proves nothing with another job's order."""
    other = wallet.sign(replace(proof.order.message, seq=proof.order.message.seq + 1), proof.domain)
    with pytest.raises(BadReceipt):
        replace(proof, order=other).check()


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b"\xff", json.dumps({"tallystick": FORMAT}).encode(), b'{"tallystick": "proof/9"}', b"[" * 100_000],
)
def test_files_that_are_no_proof(data: bytes) -> None:
    """A file that is not a proof is refused with an error."""
    with pytest.raises(BadMessage, match="proof"):
        read_proof(data)


@given(
    st.binary(max_size=300) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_garbage_is_refused(data: bytes) -> None:
    """No file causes any other error."""
    with pytest.raises(BadMessage):
        read_proof(data)


async def test_a_folder_of_proofs(fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path) -> None:
    """A client with a proof folder writes a file for each job, readable only by its owner."""
    folder = tmp_path / "deep" / "proofs"
    async with Market(fake.url, wallet, replace(config, proof_folder=folder)) as market:
        await run(market)
        await run(market)
    assert len(_files(folder)) == 2
    for name in _files(folder):
        file = folder / f"{name}.json"
        assert file.stat().st_mode & 0o777 == 0o600
        assert read_proof(file.read_bytes()).check()


def _files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*")}


async def test_the_oldest_proofs_are_deleted(proof: Proof, tmp_path: Path) -> None:
    """A folder never exceeds its limit of bytes, also after a restart; a larger proof is not written."""
    path = tmp_path / "proofs"
    size = len(proof.dumps())
    ids = [JobId(bytes([n]) * 16) for n in range(4)]
    folder = ProofStore(path, 2 * size)
    for n, job in enumerate(ids[:3]):
        await folder.put(job, proof)
        if n:
            os.utime(path / f"{job.hex()}.json", (n, n))
    assert _files(path) == {job.hex() for job in ids[1:3]}
    await ProofStore(path, 2 * size).put(ids[3], proof)
    assert _files(path) == {job.hex() for job in ids[2:]}
    await ProofStore(tmp_path / "small", size - 1).put(ids[0], proof)
    assert _files(tmp_path / "small") == set()


async def test_a_disk_that_fails_costs_no_job(proof: Proof, tmp_path: Path) -> None:
    """If the folder cannot be created, only the proof is missing."""
    (tmp_path / "file").write_text("in the way")
    await ProofStore(tmp_path / "file" / "proofs", 1 << 20).put(JobId(bytes(16)), proof)


async def test_too_long_an_answer(market: Market, fake: FakeMarket, config: ClientConfig, wallet: Signer) -> None:
    """An answer above the limit is not stored and uses no memory."""
    async with Market(fake.url, wallet, replace(config, max_answer_bytes=200)) as small:
        async with await small.submit(CHAT, STREAM, keep=True) as job:
            async for _ in job:
                pass
        assert job.proof is None


async def test_rows_of_evidence_are_part_of_a_proof(market: Market, fake: FakeMarket) -> None:
    """They are judged offline with the rest: those of the receipt, none where the receipt commits to some, and altered ones."""
    rows = [EvidenceRow.of(token, [(token, -0.5), (token + 1, -1.0)]) for token in range(5)]

    async def script(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.evidence(pack_evidence(rows))
        await session.chunk(b'{"choices": []}', last=True)
        await session.finish(evidence_root=evidence_root(rows))

    fake.script = script
    result = await (await market.submit(CHAT, BODY, keep=True)).result()
    assert result.proof is not None
    again = read_proof(result.proof.dumps())
    assert again == result.proof
    assert again.check()[-1] == Finding("evidence", "rows of 5 tokens, as the provider signed")
    without = read_proof(replace(again, evidence=b"").dumps())
    assert "evidence" not in json.loads(without.dumps())
    assert without.check()[-1] == Finding("evidence", "the receipt commits to rows that are not in this file")
    for false in (pack_evidence(rows[:4]), pack_evidence(rows) + b"\0"):
        with pytest.raises(BadReceipt, match=r"^proof\.evidence: the provider sent false evidence"):
            replace(again, evidence=false).check()
    with pytest.raises(BadMessage, match=r"^proof\.evidence: expected base64"):
        read_proof(dumps(json.loads(again.dumps()) | {"evidence": 7}))


async def test_false_rows_are_in_the_evidence_file(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Whoever reads the file sees what the provider sealed, and that it rests on this client's word."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.evidence(b"\x05\x00")
        await session.chunk(b'{"choices": []}', last=True)
        await session.finish()

    fake.script = script
    async with Market(fake.url, wallet, config) as market:
        with pytest.raises(BadReceipt, match="false evidence"):
            await (await market.submit(CHAT, BODY, keep=True)).result()
        (known,) = await market.evidence()
        path = market.config.ledger_path(market.address).parent / "evidence" / f"{known.job.hex()}.json"
    file = read_evidence(path.read_bytes())
    assert file.proof is not None
    assert file.proof.evidence == b"\x05\x00"
    assert not file.convinces
    with pytest.raises(BadReceipt, match="nothing in this file proves to others: receipt: the provider sent false evidence"):
        file.check()
