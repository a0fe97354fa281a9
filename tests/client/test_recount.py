"""Counting again what was billed, with the model's own tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tallystick.client.config import ClientConfig, Recount
from tallystick.client.recount import PER_CHOICE, Auditor
from tallystick.client.sdk import Market
from tallystick.client.tables import JobState
from tallystick.client.texts import answer_texts, request_texts
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, BadReceipt
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.wire import dumps
from tests.client.fake import BODY, CHAT, EVENTS, FakeMarket, Session, event
from tests.client.parties import MODEL

COMPLETIONS = "/v1/completions"
SAID = "one two three four"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A token for each word."""
    made = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def _bills(output: int, input_: int = 10) -> Any:
    """A provider whose engine claims so many tokens for four words."""

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


async def test_what_is_too_much_is_flagged_or_refused(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, tokenizer: Path
) -> None:
    """Within the tolerance a receipt is booked; beyond it, booked and marked; far beyond, refused with its provider."""
    counts = replace(config, recounts=(Recount(model=MODEL, tokenizer=tokenizer, flag_above=10, refuse_above=100),))
    honest = 4 + PER_CHOICE
    async with Market(fake.url, wallet, counts) as market:
        assert await _run(market, fake, _bills(honest)) == (JobState.COMPLETED, "")
        assert await _run(market, fake, _bills(honest + 1)) == (JobState.COMPLETED, "")
        state, reason = await _run(market, fake, _bills(honest + 4))
        assert state is JobState.COMPLETED
        assert reason.startswith("doubted: 24 output tokens billed, 4 counted (and 16 allowed")
        _, reason = await _run(market, fake, _bills(4, 120))
        assert "120 input tokens billed" in reason
        tab = await market.tab(fake.providers[0].address)
        with pytest.raises(BadReceipt, match="40 output tokens billed"):
            await _run(market, fake, _bills(2 * honest))
        after = await market.tab(fake.providers[0].address)
        assert (after.accepted, bool(after.frozen)) == (tab.accepted, True)
        (evidence,) = await market.evidence()
        assert "tokens billed" in evidence.reason


async def test_what_cannot_be_counted_is_said(fake: FakeMarket, wallet: Signer, config: ClientConfig, tokenizer: Path) -> None:
    """An answer in another form, or too long to be kept, is booked and flagged: no provider switches its recount off."""
    rule = Recount(model=MODEL, tokenizer=tokenizer, refuse_above=50)

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

    async with Market(fake.url, wallet, replace(config, recounts=(rule,))) as market:
        assert await _run(market, fake, fails) == (JobState.FAILED, "upstream_error"), "an engine's error is no doubt"
        assert "no form in which its tokens" in (await _run(market, fake, odd))[1]
    short = replace(config, recounts=(rule,), max_answer_bytes=100)
    async with Market(fake.url, wallet, short) as market:
        fake.script = _bills(90)
        async with await market.submit(CHAT, BODY | {"stream": True}) as job:
            async for _ in job:
                pass
        known = await market.find(job.id)
        assert known is not None
        assert "too long to be counted" in known.reason


async def test_other_models_are_not_counted(fake: FakeMarket, wallet: Signer, config: ClientConfig, tokenizer: Path) -> None:
    """Only what the config names; a cut answer proves nothing."""
    counts = replace(config, recounts=(Recount(model="other", tokenizer=tokenizer, refuse_above=5),))
    async with Market(fake.url, wallet, counts) as market:
        assert await _run(market, fake, _bills(80)) == (JobState.COMPLETED, "")
    auditor = Auditor(replace(config, recounts=(Recount(model=MODEL, tokenizer=tokenizer),)))
    assert [auditor.counts(MODEL, path) for path in (CHAT, COMPLETIONS, "/v1/embeddings")] == [True, True, False]


def test_tokenizers_that_are_not_there(config: ClientConfig, tmp_path: Path) -> None:
    """The file is named; so is what makes no sense."""
    for content in (None, "{}"):
        path = tmp_path / f"{content}.json"
        if content:
            path.write_text(content)
        with pytest.raises(BadMessage, match=path.name):
            Auditor(replace(config, recounts=(Recount(model="m", tokenizer=path),)))
    for flag, refuse in ((-1, None), (5, 4)):
        with pytest.raises(BadMessage, match="flag_above"):
            Recount(model="m", tokenizer=tmp_path, flag_above=flag, refuse_above=refuse)


CALL = {"function": {"name": "look", "arguments": '{"at": 1}'}}


def test_the_texts_of_an_answer() -> None:
    """All that a model wrote: content, reasoning, tool calls, of every choice, whole or in pieces."""
    whole = {
        "choices": [
            {"index": 1, "message": {"content": "b"}},
            {"index": 0, "message": {"content": None, "reasoning_content": "hm", "tool_calls": [CALL]}},
        ]
    }
    found = answer_texts("application/json", dumps(whole))
    assert found is not None
    assert found.parts == ('hmlook{"at": 1}', "b")
    pieces = (
        dumps({"choices": [{"index": 0, "delta": {"content": "on"}}]}),
        dumps({"choices": [{"index": 0, "delta": {"content": "e"}}], "usage": None}),
        dumps({"choices": [], "usage": {}}),
        b"[DONE]",
    )
    stream = b": comment\n\n" + b"".join(b"data: " + piece + b"\n\n" for piece in pieces)
    found = answer_texts(EVENTS, stream)
    assert found is not None
    assert found.parts == ("one",)
    plain = answer_texts("application/json", dumps({"choices": [{"text": "plain"}]}))
    assert plain is not None
    assert plain.parts == ("plain",)
    for other in (b"", b"[]", b"{", b'{"choices": 5}', b'{"choices": [5]}', b'{"error": "no"}'):
        assert answer_texts("application/json", other) is None
        assert answer_texts(EVENTS, b"data: " + other + b"\n\n") is None


def test_the_texts_of_a_request() -> None:
    """Messages, parts, calls and tools; with an image it cannot be counted, nor can other routes."""
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "look"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ]
    found = request_texts(CHAT, dumps({"messages": messages, "tools": [{"a": 1}]}))
    assert found is not None
    assert found.parts == ("be brief", "look", "look", '{"at": 1}', '[{"a":1}]')
    image = {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {}}]}
    for odd in (image, "nonsense", {"content": 5}):
        assert request_texts(CHAT, dumps({"messages": [*messages, odd]})) is None
    for prompt, parts in (("hi", ("hi",)), (["a", "b"], ("a", "b")), ([1, 2], None), (5, None)):
        found = request_texts(COMPLETIONS, dumps({"prompt": prompt}))
        assert (found and found.parts) == parts
    assert request_texts("/v1/embeddings", b'{"input": "x"}') is None
    assert request_texts(CHAT, b"{") is None
    assert request_texts(CHAT, b"[]") is None
