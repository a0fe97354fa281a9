"""Counting again what a provider billed, where the model's tokenizer is on this machine.

The output's text is counted as its tokenizer would cut it (a model may cut it into a few more), with what no text shows, end
marks and the frame of a tool call, allowed for.
Of the input the text is counted, and what a chat template adds to each message allowed for. A receipt beyond that, by more than
the config's tolerance, is doubted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tallystick.client.config import ClientConfig, TokenAudit
from tallystick.client.openai.message_text import COUNTABLE_ROUTES, Texts, answer_texts, request_texts
from tallystick.protocol.errors import BadMessage, BadReceipt
from tallystick.protocol.messages import Receipt
from tallystick.protocol.wire import load_response_head, split_request

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PER_CHOICE = 16
"""Tokens of a choice that its text does not show."""
PER_MESSAGE = 16
"""Tokens that a chat template may add to a message."""
THIRD_PARTY_TOLERANCE = 20
"""Percent beyond which a count speaks against a receipt: a text can be cut into tokens in more than one way."""
PER_REQUEST = 64
"""Tokens that it may add once."""


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """An objection to a receipt that keeps every rule: the reason in words, and whether this payer refuses such a receipt."""

    reason: str
    refuse: bool


def check_audit(finding: AuditFinding | None) -> None:
    """Raises BadReceipt if the audit's finding says that this payer refuses the receipt."""
    if finding is not None and finding.refuse:
        raise BadReceipt(f"receipt: {finding.reason}")


@cache
def load_tokenizer(path: Path) -> Tokenizer:
    """A model's tokenizer.json. Raises BadMessage where it, or the library for it, is missing."""
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - an extra, which few need
    except ImportError:
        raise BadMessage("config: token_audits: this needs one more package: pip install 'tallystick[recount]'") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception  # noqa: BLE001
        raise BadMessage(f"config: token_audits: {path}: {error}") from None


class TokenAuditor:
    """Recounts the jobs of the models that the config names. Raises BadMessage for tokenizers that cannot be loaded."""

    def __init__(self, config: ClientConfig) -> None:
        self._rules = {rule.model: (rule, load_tokenizer(rule.tokenizer)) for rule in config.token_audits}

    def counts(self, model: str, path: str) -> bool:
        """Whether the answers of such a request are counted again: then they must be kept until their end."""
        return model in self._rules and path in COUNTABLE_ROUTES

    async def audit(self, model: str, request: bytes, response: Sequence[bytes] | None, receipt: Receipt) -> AuditFinding | None:
        """What is to be said against a receipt, by the plaintext of request and response (its head first; None: too long to
        be kept).
        """
        if model not in self._rules:
            return None
        if response is None:
            return AuditFinding("the answer is too long to be counted again", refuse=False)
        return await asyncio.to_thread(_doubt, *self._rules[model], request, response, receipt)


def recount_with(path: Path) -> Callable[[bytes, Sequence[bytes], Receipt], AuditFinding | None]:
    """Counts with one tokenizer, as who was not there does. Raises BadMessage."""
    return partial(_doubt, TokenAudit(model="", tokenizer=path, flag_percent=THIRD_PARTY_TOLERANCE), load_tokenizer(path))


def _doubt(
    rule: TokenAudit, tokenizer: Tokenizer, request: bytes, response: Sequence[bytes], receipt: Receipt
) -> AuditFinding | None:
    if not response or load_response_head(response[0]).status != 200:
        return None  # an engine's own error says no text, and costs nothing
    head, body = split_request(request)
    said = answer_texts(load_response_head(response[0]).content_type, b"".join(response[1:]))
    if said is None:
        return AuditFinding("the answer is in no form in which its tokens could be counted again", refuse=False)
    found = _excess(rule, "output", receipt.output_tokens, _count(tokenizer, said), PER_CHOICE * len(said.parts))
    if found is not None:
        return found
    asked = request_texts(head.path, body)
    if asked is None:
        return None
    allowed = PER_MESSAGE * len(asked.parts) + PER_REQUEST
    return _excess(rule, "input", receipt.input_tokens, _count(tokenizer, asked), allowed)


def _excess(rule: TokenAudit, what: str, billed: int, counted: int, allowed: int) -> AuditFinding | None:
    percent = (billed - counted - allowed) * 100 // max(counted + allowed, 1)
    if percent < rule.flag_percent or billed <= counted + allowed:
        return None
    reason = f"{billed} {what} tokens billed, {counted} counted (and {allowed} allowed for what no text shows): {percent} % more"
    return AuditFinding(reason, refuse=rule.refuse_percent is not None and percent >= rule.refuse_percent)


def _count(tokenizer: Tokenizer, texts: Texts) -> int:
    return sum(len(one.ids) for one in tokenizer.encode_batch(list(texts.parts), add_special_tokens=False))
