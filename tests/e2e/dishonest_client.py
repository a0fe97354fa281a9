"""A client that can be dishonest: it builds submissions from the protocol alone and posts them to a real coordinator."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx
import orjson

from tallystick.protocol.eip712 import Domain, Signed, Signer, read_signed
from tallystick.protocol.messages import Ask, Order, Terms
from tallystick.protocol.plaintext_heads import RequestHead, join_request
from tallystick.protocol.sealing import ContentKey, commit_request, wrap_key
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import Candidate, FrameReader, Kind, Submission
from tests.builders import build_order

CAP = Amount(1_000)


@dataclass(frozen=True)
class Buyer:
    """One payer at one coordinator."""

    url: str
    signer: Signer
    domain: Domain
    coordinator: Address

    @classmethod
    def at(cls, url: str, signer: Signer) -> Buyer:
        """Makes a buyer that has read the coordinator's info."""
        info = httpx.get(f"{url}/v1/info").raise_for_status().json()
        return cls(url, signer, Domain(info["chainId"], info["contract"]), info["coordinator"])

    def ask(self, model: str) -> Signed[Ask]:
        """Returns the best ask for a model."""
        request = {"model": model, "payer": self.signer.address, "limit": 1}
        answer = httpx.post(f"{self.url}/v1/shortlist", json=request).raise_for_status().json()
        return read_signed(Ask, answer["asks"][0]["ask"])

    def order(self, ask: Ask, terms: Terms, **changes: Any) -> Order:
        """Makes an honest order with the given changes."""
        now = int(time.time())
        values: dict[str, Any] = {
            "seq": time.time_ns(),
            "deadline": now + 60,
            "claim_by": now + 7 * 86_400,
            "max_fee_bps": 500,
            "coordinator": self.coordinator,
            "terms_hash": terms.struct_hash(),
        }
        return build_order(self.signer.address, ask.provider, CAP, **(values | changes))

    def prepare(self, model: str, *, terms: dict[str, Any] | None = None, order: dict[str, Any] | None = None) -> Submission:
        """Makes a submission for one short chat, honest except for the given changes to terms and order, which precede the
        signature.
        """
        ask = self.ask(model)
        body = orjson.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16})
        plain, job, key = (
            join_request(RequestHead("/v1/chat/completions"), body),
            JobId(secrets.token_bytes(16)),
            ContentKey.new(),
        )
        honest = Terms(
            model=model,
            ask=ask.message.digest(self.domain),
            input_price=ask.message.input_price,
            cached_input_price=ask.message.cached_input_price,
            output_price=ask.message.output_price,
            max_cost=CAP,
            max_output_tokens=16,
            job=job,
            request_commitment=commit_request(key.commitment_key, job, plain),
        )
        agreed = replace(honest, **(terms or {}))
        signed = self.signer.sign(self.order(ask.message, agreed, **(order or {})), self.domain)
        wrapped = wrap_key(
            key,
            ask.message.sealing_suite,
            ask.message.sealing_key,
            job=job,
            order_hash=signed.digest,
            provider=ask.message.provider,
        )
        return Submission(job, (Candidate(signed, agreed, wrapped),), key.seal_request(job, plain))

    def post(self, submission: Submission | bytes) -> httpx.Response:
        """Posts a submission and returns the coordinator's response."""
        data = submission if isinstance(submission, bytes) else submission.dumps()
        return httpx.post(f"{self.url}/v1/jobs", content=data, timeout=60)


def frames(response: httpx.Response) -> list[tuple[Kind, bytes]]:
    """Returns the frames of an admitted job."""
    return list(FrameReader().feed(response.content))
