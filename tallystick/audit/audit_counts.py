"""The audits of a provider by their outcome, and when its answers count as hard to check.

An answer is unverifiable if its audit could not decide because of what the provider did. It committed to evidence and kept it
back, or gave an answer that no referee can score. That proves nothing, and never convicts. Who does so often is named,
and each of these answers counts a little against its integrity: otherwise it could cheat in exactly those.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_UNVERIFIABLE = 3
"""Unverifiable answers from which a provider can be named."""
NAMED_SHARE = 0.2
"""The share of unverifiable answers above which a provider is named. An honest node that restarts loses single ones."""
LATEST = 100
"""The latest audits of a provider that decide whether it is named."""
UNVERIFIABLE_WEIGHT = 0.25
"""What an unverifiable answer of a named provider counts, of a suspect one."""


@dataclass(frozen=True, slots=True)
class AuditCounts:
    """Audits of a provider by outcome. `inconclusive`: those that decided nothing and are not unverifiable."""

    passed: int = 0
    suspect: int = 0
    inconclusive: int = 0
    unverifiable: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.passed + self.suspect + self.inconclusive + self.unverifiable

    @property
    def is_named(self) -> bool:
        """Whether the provider is named as one whose answers cannot be checked."""
        checkable = self.passed + self.suspect + self.unverifiable
        return self.unverifiable >= MIN_UNVERIFIABLE and self.unverifiable > NAMED_SHARE * checkable

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.suspect} suspect, {self.inconclusive} inconclusive, {self.unverifiable} unverifiable"
