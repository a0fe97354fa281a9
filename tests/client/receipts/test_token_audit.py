"""Recounts of billed tokens with the model's own tokenizer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tallystick.client.config import ClientConfig, TokenAudit
from tallystick.client.ledger.schema import JobState
from tallystick.client.openai.message_text import answer_texts, request_texts
from tallystick.client.receipts.token_audit import PER_CHOICE, AuditFinding, TokenAuditor, _excess, check_audit, recount_with
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, BadReceipt
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.plaintext_heads import RequestHead, ResponseHead, dump_response_head, join_request
from tallystick.protocol.pricing import Usage
from tallystick.protocol.wire import dumps
from tests.client.fake_coordinator import BODY, CHAT, EVENTS, FakeMarket, Session, event
from tests.client.parties import MODEL, bill, place

COMPLETIONS = "/v1/completions"
SAID = "one two three four"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer with one token per word."""
    made = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("billed", "flagged", "refused"),
    [(100, False, False), (104, False, False), (105, True, False), (149, True, False), (150, True, True)],
)
def test_a_recount_flags_and_refuses_from_its_settings_on(billed: int, flagged: bool, refused: bool) -> None:
    """A recount is flagged or refused exactly from the configured percentages on."""
    rule = TokenAudit(model=MODEL, tokenizer=Path("x"), flag_percent=5, refuse_percent=50)
    finding = _excess(rule, "output", billed, 90, 10)
    assert ((finding is not None), finding is not None and finding.refuse) == (flagged, refused)
    never = _excess(replace(rule, refuse_percent=None), "output", 1_000, 90, 10)
    assert never is not None
    assert not never.refuse
    assert _excess(replace(rule, flag_percent=0), "output", 100, 90, 10) is None
    assert _excess(replace(rule, flag_percent=0), "output", 101, 90, 10) is not None
    nothing = _excess(rule, "output", 1, 0, 0)
    assert nothing is not None
    assert nothing.reason.endswith(": 100 % more")


HEAD = dump_response_head(ResponseHead(200, "application/json"))
ASKED = join_request(
    RequestHead(CHAT), dumps({"messages": [{"role": "user", "content": "a b c"}, {"role": "user", "content": "d"}]})
)


def _said(*texts: str) -> bytes:
    return dumps({"choices": [{"index": at, "message": {"content": text}} for at, text in enumerate(texts)]})


def _billed(output: int, input_: int = 4) -> Receipt:
    return bill(place(output=8_000, body=8_000), Usage(input_, 0, output))


def test_allowances_for_tokens_without_text(tokenizer: Path) -> None:
    """Each choice of an answer, each message of a request, and the request itself have an allowance; a finding names it."""
    count = recount_with(tokenizer)
    answer = [HEAD, _said("one two", "three four")]
    assert count(ASKED, answer, _billed(36, 100)) is None
    output = count(ASKED, answer, _billed(44))
    assert output is not None
    assert output.reason.startswith("44 output tokens billed, 4 counted (and 32 allowed for tokens without text): 22 % more")
    input_ = count(ASKED, answer, _billed(36, 120))
    assert input_ is not None
    assert input_.reason.startswith("120 input tokens billed, 4 counted (and 96 allowed for tokens without text): 20 % more")
    assert not input_.refuse, "an opinion refuses nothing"


def test_answers_without_text(tokenizer: Path) -> None:
    """An empty answer and an engine's error give no finding; for a request with an image only the output is counted."""
    count = recount_with(tokenizer)
    assert count(ASKED, [], _billed(500)) is None
    assert count(ASKED, [dump_response_head(ResponseHead(422, "application/json")), _said("one")], _billed(500)) is None
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
    drawn = join_request(RequestHead(CHAT), dumps({"messages": [image]}))
    assert count(drawn, [HEAD, _said("one")], _billed(17, 8_000)) is None
    assert count(drawn, [HEAD, _said("one")], _billed(500, 8_000)) is not None


def test_which_answers_are_kept_for_the_audit(config: ClientConfig, tokenizer: Path) -> None:
    """Only answers of the configured models, on routes whose texts are known, are stored for the audit."""
    auditor = TokenAuditor(replace(config, token_audits=(TokenAudit(model=MODEL, tokenizer=tokenizer),)))
    assert [auditor.counts(MODEL, path) for path in (CHAT, COMPLETIONS, "/v1/embeddings")] == [True, True, False]
    assert not auditor.counts("other", CHAT)


async def test_only_configured_models_are_audited(config: ClientConfig, tokenizer: Path) -> None:
    """Only the configured models are audited; an answer too long to store is flagged and not refused."""
    auditor = TokenAuditor(
        replace(config, token_audits=(TokenAudit(model=MODEL, tokenizer=tokenizer, flag_percent=0, refuse_percent=0),))
    )
    answer = [HEAD, _said("one")]
    assert await auditor.audit("other", ASKED, answer, _billed(500)) is None
    assert await auditor.audit("other", ASKED, None, _billed(500)) is None
    finding, long = await auditor.audit(MODEL, ASKED, answer, _billed(500)), await auditor.audit(MODEL, ASKED, None, _billed(500))
    assert finding is not None
    assert finding.refuse
    assert long is not None
    assert ("too long" in long.reason, long.refuse) == (True, False)


def test_a_tokenizer_needs_its_library(config: ClientConfig, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the library is not installed, the error names the extra to install."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BadMessage, match=r"pip install 'tallystick\[recount\]'"):
        TokenAuditor(replace(config, token_audits=(TokenAudit(model=MODEL, tokenizer=tokenizer),)))


def _bills(output: int, input_: int = 10) -> Any:
    """A provider whose engine reports this many tokens for four words."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event(SAID))
        await session.chunk(b"data: [DONE]\n\n", last=True)
        await session.finish(Usage(input_, 0, output))

    return script


async def _run(market: Market, fake: FakeMarket, script: Any) -> tuple[JobState, str]:
    fake.script = script
    async with await market.submit(CHAT, BODY | {"stream": True}) as job:
        await job.result()
    known = await market.find(job.id)
    assert known is not None
    return known.state, known.reason


async def test_excessive_bills_are_flagged_or_refused(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, tokenizer: Path
) -> None:
    """Within the tolerance a receipt is recorded; above it, recorded and flagged; far above, refused, and its provider
    blocked.
    """
    counts = replace(config, token_audits=(TokenAudit(model=MODEL, tokenizer=tokenizer, flag_percent=10, refuse_percent=100),))
    honest = 4 + PER_CHOICE
    async with Market(fake.url, wallet, counts) as market:
        assert await _run(market, fake, _bills(honest)) == (JobState.COMPLETED, "")
        assert await _run(market, fake, _bills(honest + 1)) == (JobState.COMPLETED, "")
        state, reason = await _run(market, fake, _bills(honest + 4))
        assert state is JobState.COMPLETED
        assert reason.startswith("flagged: 24 output tokens billed, 4 counted (and 16 allowed")
        _, reason = await _run(market, fake, _bills(4, 120))
        assert "120 input tokens billed" in reason
        tab = await market.tab(fake.providers[0].address)
        with pytest.raises(BadReceipt, match="40 output tokens billed"):
            await _run(market, fake, _bills(2 * honest))
        after = await market.tab(fake.providers[0].address)
        assert (after.accepted, bool(after.blocked_reason)) == (tab.accepted, True)
        (evidence,) = await market.evidence()
        assert "tokens billed" in evidence.reason


async def test_uncountable_answers_are_flagged(fake: FakeMarket, wallet: Signer, config: ClientConfig, tokenizer: Path) -> None:
    """An answer in another form, or too long to store, is recorded and flagged, so no provider can avoid the audit."""
    rule = TokenAudit(model=MODEL, tokenizer=tokenizer, refuse_percent=50)

    async def odd(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event(SAID) + b"data: what?\n\n", last=True)
        await session.finish(Usage(10, 0, 90))

    async def fails(session: Session) -> None:
        await session.match()
        await session.answer(422)
        await session.chunk(b'{"error": {"message": "no"}}', last=True)
        await session.finish(Usage(10, 0, 0), Outcome.UPSTREAM_ERROR)

    async with Market(fake.url, wallet, replace(config, token_audits=(rule,))) as market:
        assert await _run(market, fake, fails) == (JobState.FAILED, "upstream_error"), "an engine's error is no doubt"
        assert "whose tokens cannot be recounted" in (await _run(market, fake, odd))[1]
    short = replace(config, token_audits=(rule,), max_answer_bytes=100)
    async with Market(fake.url, wallet, short) as market:
        fake.script = _bills(90)
        async with await market.submit(CHAT, BODY | {"stream": True}) as job:
            async for _ in job:
                pass
        known = await market.find(job.id)
        assert known is not None
        assert "too long to be recounted" in known.reason


async def test_other_models_are_not_counted(fake: FakeMarket, wallet: Signer, config: ClientConfig, tokenizer: Path) -> None:
    """Models that are not configured are not counted; a cut answer proves nothing."""
    counts = replace(config, token_audits=(TokenAudit(model="other", tokenizer=tokenizer, refuse_percent=5),))
    async with Market(fake.url, wallet, counts) as market:
        assert await _run(market, fake, _bills(80)) == (JobState.COMPLETED, "")


def test_missing_tokenizers(config: ClientConfig, tmp_path: Path) -> None:
    """A missing or invalid tokenizer file gives an error that names it."""
    for content in (None, "{}"):
        path = tmp_path / f"{content}.json"
        if content:
            path.write_text(content)
        with pytest.raises(BadMessage, match=path.name):
            TokenAuditor(replace(config, token_audits=(TokenAudit(model="m", tokenizer=path),)))
    for flag, refuse in ((-1, None), (5, 4)):
        with pytest.raises(BadMessage, match="flag_percent"):
            TokenAudit(model="m", tokenizer=tmp_path, flag_percent=flag, refuse_percent=refuse)


CALL = {"function": {"name": "look", "arguments": '{"at": 1}'}}


def test_the_texts_of_an_answer() -> None:
    """All texts that a model wrote are counted: content, reasoning and tool calls of every choice, whole or streamed."""
    whole = {
        "choices": [
            {"index": 1, "message": {"content": "b"}},
            {"index": 0, "message": {"content": None, "reasoning_content": "hm", "tool_calls": [CALL]}},
        ]
    }
    texts = answer_texts("application/json", dumps(whole))
    assert texts is not None
    assert texts.parts == ('hmlook{"at": 1}', "b")
    pieces = (
        dumps({"choices": [{"index": 0, "delta": {"content": "on"}}]}),
        dumps({"choices": [{"index": 0, "delta": {"content": "e"}}], "usage": None}),
        dumps({"choices": [], "usage": {}}),
        b"[DONE]",
    )
    stream = b": comment\n\n" + b"".join(b"data: " + piece + b"\n\n" for piece in pieces)
    texts = answer_texts(EVENTS, stream)
    assert texts is not None
    assert texts.parts == ("one",)
    plain = answer_texts("application/json", dumps({"choices": [{"text": "plain"}]}))
    assert plain is not None
    assert plain.parts == ("plain",)
    for other in (b"", b"[]", b"{", b'{"choices": 5}', b'{"choices": [5]}', b'{"error": "no"}'):
        assert answer_texts("application/json", other) is None
        assert answer_texts(EVENTS, b"data: " + other + b"\n\n") is None


def test_the_texts_of_a_request() -> None:
    """Messages, parts, calls and tools are counted; requests with an image and other routes are not."""
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "look"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ]
    texts = request_texts(CHAT, dumps({"messages": messages, "tools": [{"a": 1}]}))
    assert texts is not None
    assert texts.parts == ("be brief", "look", "look", '{"at": 1}', '[{"a":1}]')
    image = {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {}}]}
    for odd in (image, "nonsense", {"content": 5}):
        assert request_texts(CHAT, dumps({"messages": [*messages, odd]})) is None
    for prompt, parts in (("hi", ("hi",)), (["a", "b"], ("a", "b")), ([1, 2], None), (5, None)):
        texts = request_texts(COMPLETIONS, dumps({"prompt": prompt}))
        assert (texts and texts.parts) == parts
    assert request_texts("/v1/embeddings", b'{"input": "x"}') is None
    assert request_texts(CHAT, b"{") is None
    assert request_texts(CHAT, b"[]") is None


def test_only_a_refusing_finding_refuses() -> None:
    """A flagged receipt is recorded, and a refused one is not."""
    check_audit(None)
    check_audit(AuditFinding("a little much", refuse=False))
    with pytest.raises(BadReceipt, match="far too much"):
        check_audit(AuditFinding("far too much", refuse=True))
