"""Prices that follow the clock and the load: rules that raise or lower a model's own prices while they hold. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.pricing import Prices

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
_MINUTES = 24 * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceRule:
    """While it holds, prices are `percent` of the model's own.

    `days`: mon to sun; `hours`: "22:00-06:00", which belongs to the day on which it begins; `busy`: percent of the slots that are
    taken at least, on average over the last minute; `zone`: an IANA time zone, this machine's by default. What is left out
    always holds.
    """

    percent: int
    days: tuple[str, ...] = ()
    hours: str = ""
    min_load_percent: int = 0
    zone: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 10_000:
            raise BadMessage("config: price_rules: percent: expected 0 to 10000")
        if not set(self.days) <= set(DAYS):
            raise BadMessage(f"config: price_rules: days: expected some of {', '.join(DAYS)}")
        if self.hours and self._minutes_of_day() is None:
            raise BadMessage("config: price_rules: hours: expected a span such as 22:00-06:00")
        if not 0 <= self.min_load_percent <= 100:
            raise BadMessage("config: price_rules: min_load_percent: expected 0 to 100")
        try:
            ZoneInfo(self.zone or "UTC")
        except (OSError, ValueError, KeyError) as error:
            raise BadMessage(f"config: price_rules: zone: {error}") from None

    def _minutes_of_day(self) -> tuple[int, int] | None:
        """The minutes of the day from which and until which it holds."""
        found = _HOURS.fullmatch(self.hours)
        if found is None:
            return None
        begin, end = int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4])
        return (begin, end) if end <= _MINUTES and begin != end else None

    def applies(self, when: datetime, load: float) -> bool:
        """At this moment (with a time zone), with this share of the slots taken."""
        local = when.astimezone(ZoneInfo(self.zone) if self.zone else None)
        day = local
        span = self._minutes_of_day()
        if span is not None:
            begin, end = span
            minute = local.hour * 60 + local.minute
            late = end < begin and minute < end
            if not (begin <= minute < end or (end < begin and minute >= begin) or late):
                return False
            day = local - timedelta(days=1) if late else local
        return (not self.days or DAYS[day.weekday()] in self.days) and load * 100 >= self.min_load_percent


def apply_price_rules(prices: Prices, rules: Iterable[PriceRule], when: datetime, load: float) -> Prices:
    """The prices by the first rule that holds; rounded up to whole base units."""
    rule = next((rule for rule in rules if rule.applies(when, load)), None)
    if rule is None:
        return prices
    return Prices(*(-(-price * rule.percent // 100) for price in (prices.input, prices.cached_input, prices.output)))
