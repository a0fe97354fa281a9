"""The trace of one job, from the OpenAI SDK's request to the payment on chain, with what each party signed and holds."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tallystick.cli.local.job_audit import audit_words
from tallystick.cli.output import show_fields
from tallystick.cli.progress import activity
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import Address, Amount, format_amount, parse_address, parse_job_id

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.protocol.eip712 import Signer

ANSWER_SECONDS = 300


@dataclass(frozen=True, slots=True)
class JobTracer:
    """Runs a job and observes it through the gateway's API, the coordinator's API and the chain."""

    escrow: Escrow
    gateway: str
    coordinator: str
    payer: Signer
    """The coordinator shows the job to this key only."""
    settle_seconds: float
    """Longest wait for the settlement."""

    async def run(self, model: str, prompt: str, providers: Mapping[str, Address], *, quiet: bool) -> dict[str, Any]:
        """Runs one streamed chat and returns its trace. Amounts are base units as text. Raises Unavailable."""
        from openai import OpenAIError

        payer = self.payer.address
        purse_before = await self._purse_total(payer, providers)
        credit_before = {address: (await self.escrow.provider(address)).credit for address in providers.values()}
        try:
            job, text = await self._chat(model, prompt, quiet=quiet)
        except OpenAIError as error:
            raise Unavailable(Code.PROVIDER_FAILED, f"the chat failed: {error}") from error
        record = await self._get_json(f"{self.gateway}/tally/jobs/{job}")
        order, signed_receipt = record["order"], record["receipt"]
        receipt = signed_receipt["typedData"]["message"]
        provider = parse_address(receipt["provider"])
        with activity("waiting until the chain has paid the job"):
            settlement = await self._settlement(job)
        return {
            "model": model,
            "text": text,
            "job": job,
            "usage": record["usage"],
            "cost": receipt["cost"],
            "order": order["typedData"],
            "order_signature": order["signature"],
            "order_hash": order["digest"],
            "receipt": signed_receipt["typedData"],
            "receipt_signature": signed_receipt["signature"],
            "receipt_hash": signed_receipt["digest"],
            "payer": payer,
            "provider": provider,
            "provider_name": next((name for name, address in providers.items() if address == provider), "?"),
            "chain_id": self.escrow.deployment.chain_id,
            "contract": self.escrow.deployment.escrow,
            "purse_before": str(int(purse_before)),
            "purse_after": str(int(await self._purse_total(payer, providers))),
            "provider_credit_before": str(int(credit_before[provider])),
            "provider_credit_after": str(int((await self.escrow.provider(provider)).credit)),
            "settle_tx": settlement["tx"],
        }

    async def _purse_total(self, payer: Address, providers: Mapping[str, Address]) -> Amount:
        """The free money of the purse and what is reserved for these providers."""
        purse = await self.escrow.purse(payer)
        tabs = [await self.escrow.tab(payer, provider) for provider in providers.values()]
        return purse.free + sum(tab.reserved for tab in tabs)

    async def _chat(self, model: str, prompt: str, *, quiet: bool) -> tuple[str, str]:
        from openai import AsyncOpenAI

        async with AsyncOpenAI(base_url=f"{self.gateway}/v1", api_key="unused", timeout=ANSWER_SECONDS, max_retries=0) as client:
            raw = await client.chat.completions.with_raw_response.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                stream=True,
                stream_options={"include_usage": True},
                max_tokens=512,
                temperature=0.7,
            )
            parts: list[str] = []
            if not quiet:
                sys.stdout.write(f"\nyou > {prompt}\n{model} > ")
            async for chunk in raw.parse():
                for choice in chunk.choices:
                    parts.append(choice.delta.content or "")
                    if not quiet:
                        sys.stdout.write(parts[-1])
                        sys.stdout.flush()
            if not quiet:
                sys.stdout.write("\n\n")
            return str(raw.headers["x-tally-job"]), "".join(parts)

    async def _settlement(self, job: str) -> Any:
        from tallystick.client.config import ClientConfig
        from tallystick.client.coordinator.access_tokens import AccessTokens
        from tallystick.client.coordinator.http_client import CoordinatorClient

        try:
            async with asyncio.timeout(self.settle_seconds), CoordinatorClient(self.coordinator, ClientConfig()) as coordinator:
                coordinator.authorize = AccessTokens(self.payer, coordinator.info, lambda: int(time.time()))
                while True:
                    status = (await coordinator.job(parse_job_id(job))).raw
                    if status["settlement"] is not None:
                        return status["settlement"]
                    await asyncio.sleep(0.1)
        except TimeoutError:
            text = f"job {job} was not settled within {self.settle_seconds:g} s; see the coordinator's log"
            raise Unavailable(Code.CHAIN_UNAVAILABLE, text) from None

    async def _get_json(self, url: str) -> Any:
        import httpx

        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            response = await client.get(url)
        if response.status_code != 200:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{url} answered {response.status_code}: {response.text[:300]}")
        return response.json()


def show_trace(trace: Mapping[str, Any]) -> None:
    """Prints a trace as a table."""
    usage, receipt = trace["usage"], trace["receipt"]["message"]

    def amount(name: str) -> str:
        return format_amount(int(trace[name]))

    show_fields(
        [
            ("job", trace["job"]),
            ("model", trace["model"]),
            ("order signed by", f"{trace['payer']} (payer)"),
            ("order signature", _short(trace["order_signature"])),
            ("ceiling signed, dollars", format_amount(int(trace["order"]["message"]["ceiling"]))),
            ("provider", f"{trace['provider']} ({trace['provider_name']})"),
            ("tokens", f"{usage['inputTokens']} in ({usage['cachedInputTokens']} cached), {usage['outputTokens']} out"),
            ("cost, test dollars", amount("cost")),
            ("order hash", trace["order_hash"]),
            ("receipt hash", f"{trace['receipt_hash']} (number {receipt['seq']} of the tab)"),
            ("receipt signature", _short(trace["receipt_signature"])),
            ("settled in", trace["settle_tx"]),
            ("purse (free + reserved), dollars", f"{amount('purse_before')} -> {amount('purse_after')}"),
            ("provider's credit, dollars", f"{amount('provider_credit_before')} -> {amount('provider_credit_after')}"),
            ("audit", audit_words(trace["audit"])),
        ],
        title="Trace of the job",
    )


def _short(text: str) -> str:
    return f"{text[:18]}…{text[-8:]}"
