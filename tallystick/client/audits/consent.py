"""Who may see a prompt because of an audit. An audit by another provider shows it the prompt, and that is the user's to allow.

The config, an API key, a workload's label and a request may each say yes, no or nothing. One no is enough to forbid it, one yes
to allow it, and without any word it is forbidden. What is private is never shown. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from tallystick.client.audit_settings import AuditSettings, PromptConsent, is_below


def decide_consent(
    settings: AuditSettings,
    label: str,
    *,
    answered: bool | None = None,
    key: bool | None = None,
    request: bool | None = None,
    private: bool = False,
) -> PromptConsent:
    """Combines what everybody said.

    `answered`: what the user answered to `tally start`, which counts unless the config says something. `key`: what the caller's
    API key says; `request`: what the request says; `private`: whether the request is marked so.
    """
    if private or is_below(label, settings.private_labels):
        return PromptConsent(may_share=False, private=True)
    general = answered if settings.share_prompts is None else settings.share_prompts
    by_label = True if is_below(label, settings.share_labels) else None
    return PromptConsent(may_share=_combine((general, key, by_label, request)))


def _combine(words: Iterable[bool | None]) -> bool:
    spoken = [word for word in words if word is not None]
    return bool(spoken) and all(spoken)
