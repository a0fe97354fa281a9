"""The story of one job, from the SDK's first byte to the chain's payment, told from what each party signed and holds."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tallystick.cli.output import show_facts
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import Address, Amount, format_amount, parse_address, parse_job_id

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.protocol.eip712 import Signer

ANSWER_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Witness:
    """Someone who watches a job from all sides: the gateway's API, the coordinator's API and the chain."""

    escrow: Escrow
    gateway: str
    coordinator: str
    payer: Signer
    """Whose job it is: the coordinator tells nobody else."""
    patience: float
    """Seconds to wait for the settlement."""

    async def tell(self, model: str, prompt: str, providers: Mapping[str, Address], *, quiet: bool) -> dict[str, Any]:
        """Runs one streamed chat and returns its story. Amounts are base units as strings. Raises Unavailable."""
        from openai import OpenAIError

        payer = self.payer.address
        purse_before = await self._purse(payer, providers)
        credit_before = {one: (await self.escrow.provider(one)).credit for one in providers.values()}
        try:
            job, text = await self._chat(model, prompt, quiet=quiet)
        except OpenAIError as error:
            raise Unavailable(Code.PROVIDER_FAILED, f"the chat failed: {error}") from error
        known = await self._json(f"{self.gateway}/tally/jobs/{job}")
        order, signed = known["order"], known["receipt"]
        receipt = signed["typedData"]["message"]
        provider = parse_address(receipt["provider"])
        settlement = await self._settlement(job)
        return {
            "model": model,
            "text": text,
            "job": job,
            "usage": known["usage"],
            "cost": receipt["cost"],
            "order": order["typedData"],
            "order_signature": order["signature"],
            "order_hash": order["digest"],
            "receipt": signed["typedData"],
            "receipt_signature": signed["signature"],
            "receipt_hash": signed["digest"],
            "payer": payer,
            "provider": provider,
            "provider_name": next((name for name, address in providers.items() if address == provider), "?"),
            "chain_id": self.escrow.deployment.chain_id,
            "contract": self.escrow.deployment.escrow,
            "purse_before": str(int(purse_before)),
            "purse_after": str(int(await self._purse(payer, providers))),
            "provider_credit_before": str(int(credit_before[provider])),
            "provider_credit_after": str(int((await self.escrow.provider(provider)).credit)),
            "settle_tx": settlement["tx"],
        }

    async def _purse(self, payer: Address, providers: Mapping[str, Address]) -> Amount:
        """All that the purse holds: free, and reserved for these providers."""
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
            async with asyncio.timeout(self.patience), CoordinatorClient(self.coordinator, ClientConfig()) as asked:
                asked.authorize = AccessTokens(self.payer, asked.info, lambda: int(time.time()))
                while True:
                    known = (await asked.job(parse_job_id(job))).raw
                    if known["settlement"] is not None:
                        return known["settlement"]
                    await asyncio.sleep(0.1)
        except TimeoutError:
            text = f"job {job} was not settled within {self.patience:g} s"
            raise Unavailable(Code.CHAIN_UNAVAILABLE, text) from None

    async def _json(self, url: str) -> Any:
        import httpx

        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            response = await client.get(url)
        if response.status_code != 200:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{url} answered {response.status_code}: {response.text[:300]}")
        return response.json()


def show_story(story: Mapping[str, Any]) -> None:
    """The story as a table."""
    usage, receipt = story["usage"], story["receipt"]["message"]

    def money(name: str) -> str:
        return format_amount(int(story[name]))

    show_facts(
        [
            ("job", story["job"]),
            ("model", story["model"]),
            ("order signed by", f"{story['payer']} (payer)"),
            ("order signature", _short(story["order_signature"])),
            ("ceiling signed", format_amount(int(story["order"]["message"]["ceiling"]))),
            ("provider", f"{story['provider']} ({story['provider_name']})"),
            ("tokens", f"{usage['inputTokens']} in ({usage['cachedInputTokens']} cached), {usage['outputTokens']} out"),
            ("cost", f"{money('cost')} test dollars"),
            ("order hash", story["order_hash"]),
            ("receipt hash", f"{story['receipt_hash']} (no. {receipt['seq']} of the tab)"),
            ("receipt signature", _short(story["receipt_signature"])),
            ("the chain paid in", story["settle_tx"]),
            ("purse (free + reserved)", f"{money('purse_before')} -> {money('purse_after')}"),
            ("provider's credit", f"{money('provider_credit_before')} -> {money('provider_credit_after')}"),
        ],
        title="The story of the job",
    )


def _short(text: str) -> str:
    return f"{text[:18]}…{text[-8:]}"
