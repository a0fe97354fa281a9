"""What a wallet's own audits say of providers: `tally audit providers`, and a column of `tally models`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tallystick.cli.output import note, show_json, show_table

if TYPE_CHECKING:
    from tallystick.client.audits.provider_audits import ProviderAudits
    from tallystick.client.config import ClientConfig
    from tallystick.protocol.types import Address

NO_AUDITS = "none"


def show_providers(providers: list[ProviderAudits], *, as_json: bool) -> None:
    """Shows the audits of each provider's products by outcome, and the providers whose answers cannot be checked."""
    if as_json:
        show_json([provider_json(provider) for provider in providers])
        return
    rows = [
        (
            provider.provider,
            provider.model,
            provider.precision,
            provider.counts.passed,
            provider.counts.suspect,
            provider.counts.inconclusive,
            provider.counts.unverifiable,
            f"{100 * provider.integrity.lower:.1f}",
        )
        for provider in providers
    ]
    columns = ("provider", "model", "precision", "passed", "suspect", "inconclusive", "unverifiable", "integrity %")
    show_table(columns, rows, title="Audits of this wallet, by provider")
    warn_of_named(providers)


def provider_json(provider: ProviderAudits) -> dict[str, Any]:
    """The audits of a provider's product as JSON."""
    return {
        "provider": provider.provider,
        "model": provider.model,
        "precision": provider.precision,
        "passed": provider.counts.passed,
        "suspect": provider.counts.suspect,
        "inconclusive": provider.counts.inconclusive,
        "unverifiable": provider.counts.unverifiable,
        "integrity": round(100 * provider.integrity.lower, 1),
        "named": provider.is_named,
    }


def warn_of_named(providers: Iterable[ProviderAudits]) -> None:
    """Names the providers whose answers often cannot be checked."""
    for provider in providers:
        if provider.is_named:
            note(
                f"{provider.provider}: {provider.latest.unverifiable} of its latest {provider.latest.total} audited answers of "
                f"{provider.model} cannot be checked. That convicts nobody, and lowers its "
                "integrity a little; to order elsewhere: `exclude` in the options of a request"
            )


async def read_own_audits(config: ClientConfig, payer: Address) -> list[ProviderAudits]:
    """The audits of a wallet by provider; none if it has no file of audits yet. Raises Unavailable."""
    from tallystick.client.audits.store import AuditStore

    path = config.audits_path(payer)
    if not path.exists():
        return []
    store = await AuditStore.open(path)
    try:
        return await store.all_provider_audits()
    finally:
        await store.close()


def describe_model_audits(providers: Iterable[ProviderAudits]) -> str:
    """The audits of a model's providers in a few words: those that decided something, and those that are unverifiable."""
    counts = [provider.counts for provider in providers]
    numbers = {
        "passed": sum(count.passed for count in counts),
        "suspect": sum(count.suspect for count in counts),
        "inconclusive": sum(count.inconclusive for count in counts),
        "unverifiable": sum(count.unverifiable for count in counts),
    }
    return ", ".join(f"{number} {name}" for name, number in numbers.items() if number) or NO_AUDITS
