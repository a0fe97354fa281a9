"""Audits billed tokens: recounts the text of a job with the model's tokenizer, if that is on this machine.

The output's text is counted as the tokenizer splits it; a model may split it into a few more tokens. An allowance covers tokens
without text, such as end marks and the frame of a tool call. The input's text is counted in the same way, with an allowance for
what a chat template adds to each message. A receipt that exceeds the count by more than the config's tolerance is flagged.
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
from tallystick.protocol.plaintext_heads import load_response_head, split_request

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PER_CHOICE = 16
"""Allowance for tokens of a choice without text."""
PER_MESSAGE = 16
"""Allowance for tokens that a chat template adds to a message."""
THIRD_PARTY_TOLERANCE = 20
"""Percent by which a receipt may exceed a recount by a third party, because a text can be split in more than one way."""
PER_REQUEST = 64
"""Allowance for tokens that a chat template adds once."""


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
    """Loads a model's tokenizer.json. Raises BadMessage if the file or the tokenizers library is missing."""
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - an extra, which few need
    except ImportError:
        raise BadMessage(
            "config: token_audits: the tokenizers package is missing; install it with: pip install 'tallystick[recount]'"
        ) from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception  # noqa: BLE001
        raise BadMessage(f"config: token_audits: {path}: {error}") from None


class TokenAuditor:
    """Audits the jobs of the models that the config names. Raises BadMessage if a tokenizer cannot be loaded."""

    def __init__(self, config: ClientConfig) -> None:
        self._rules = {rule.model: (rule, load_tokenizer(rule.tokenizer)) for rule in config.token_audits}

    def counts(self, model: str, path: str) -> bool:
        """Whether the answers of such a request are recounted. If so, they must be kept until they end."""
        return model in self._rules and path in COUNTABLE_ROUTES

    async def audit(self, model: str, request: bytes, response: Sequence[bytes] | None, receipt: Receipt) -> AuditFinding | None:
        """Returns the objection to a receipt, if any, by the plaintext of its job.

        `response` starts with the response head; it is None if the answer was too long to be kept.
        """
        if model not in self._rules:
            return None
        if response is None:
            return AuditFinding("the answer is too long to be recounted", refuse=False)
        return await asyncio.to_thread(_audit, *self._rules[model], request, response, receipt)


def recount_with(path: Path) -> Callable[[bytes, Sequence[bytes], Receipt], AuditFinding | None]:
    """Returns a recount with one tokenizer, for a third party that checks evidence. Raises BadMessage."""
    return partial(_audit, TokenAudit(model="", tokenizer=path, flag_percent=THIRD_PARTY_TOLERANCE), load_tokenizer(path))


def _audit(
    rule: TokenAudit, tokenizer: Tokenizer, request: bytes, response: Sequence[bytes], receipt: Receipt
) -> AuditFinding | None:
    if not response or load_response_head(response[0]).status != 200:
        return None  # an error of the engine has no text and costs nothing
    head, body = split_request(request)
    output = answer_texts(load_response_head(response[0]).content_type, b"".join(response[1:]))
    if output is None:
        return AuditFinding("the answer has a form whose tokens cannot be recounted", refuse=False)
    finding = _excess(rule, "output", receipt.output_tokens, _count(tokenizer, output), PER_CHOICE * len(output.parts))
    if finding is not None:
        return finding
    prompt = request_texts(head.path, body)
    if prompt is None:
        return None
    allowed = PER_MESSAGE * len(prompt.parts) + PER_REQUEST
    return _excess(rule, "input", receipt.input_tokens, _count(tokenizer, prompt), allowed)


def _excess(rule: TokenAudit, kind: str, billed: int, counted: int, allowed: int) -> AuditFinding | None:
    percent = (billed - counted - allowed) * 100 // max(counted + allowed, 1)
    if percent < rule.flag_percent or billed <= counted + allowed:
        return None
    reason = f"{billed} {kind} tokens billed, {counted} counted (and {allowed} allowed for tokens without text): {percent} % more"
    return AuditFinding(reason, refuse=rule.refuse_percent is not None and percent >= rule.refuse_percent)


def _count(tokenizer: Tokenizer, texts: Texts) -> int:
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts.parts), add_special_tokens=False))
