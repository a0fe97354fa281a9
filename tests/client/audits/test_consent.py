from __future__ import annotations

import itertools

import pytest

from tallystick.client.audit_settings import AuditSettings, PromptConsent
from tallystick.client.audits.consent import decide_consent

WORDS = (None, True, False)


@pytest.mark.parametrize(("config", "answered", "key", "request_"), list(itertools.product(WORDS, WORDS, WORDS, WORDS)))
def test_one_no_is_enough(config: bool | None, answered: bool | None, key: bool | None, request_: bool | None) -> None:
    """Somebody must have said yes, and nobody no. The user's answer counts if the config says nothing."""
    consent = decide_consent(AuditSettings(share_prompts=config), "", answered=answered, key=key, request=request_)
    words = [word for word in (answered if config is None else config, key, request_) if word is not None]
    assert consent == PromptConsent(may_share=bool(words) and all(words))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("public", PromptConsent(may_share=True)),
        ("public/papers", PromptConsent(may_share=True)),
        ("publication", PromptConsent()),
        ("hr", PromptConsent(private=True)),
        ("hr/salaries", PromptConsent(private=True)),
        ("", PromptConsent()),
    ],
)
def test_labels(label: str, expected: PromptConsent) -> None:
    """A workload may be shown, or is private, with those below it."""
    settings = AuditSettings(share_labels=("public",), private_labels=("hr",))
    assert decide_consent(settings, label) == expected


def test_private_is_never_shown() -> None:
    """Whatever anybody else says."""
    settings = AuditSettings(share_prompts=True, share_labels=("public",))
    assert decide_consent(settings, "public", key=True, request=True, private=True) == PromptConsent(private=True)
