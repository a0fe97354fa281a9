"""The access tier of a payer, as a coordinator explains it. Its texts are the coordinator's words."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TEXT = 500


@dataclass(frozen=True, slots=True)
class AccessTier:
    """The tier's name, why it refuses the model (empty if it does not), and what would bring the payer into a higher one."""

    name: str
    refusal: str
    next: str

    @classmethod
    def from_json(cls, raw: object) -> AccessTier | None:
        """Reads the tier of an explanation; None if it names none, as coordinators without tiers do."""
        if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
            return None
        texts = [raw.get(name) for name in ("name", "refusal", "next")]
        return cls(*(text[:MAX_TEXT] if isinstance(text, str) else "" for text in texts))

    def to_json(self) -> dict[str, str | None]:
        """The tier for programs; `refusal` is null if the model is not refused."""
        return {"name": self.name, "refusal": self.refusal or None, "next": self.next}
