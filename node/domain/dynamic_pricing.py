"""Dynamic pricing: computes an ask's prices from the load and the time of day, by rules that scale a model's own prices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.pricing import Prices

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
_DISCOUNT = re.compile(r"([1-9]?[0-9])%")
_MINUTES = 24 * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceRule:
    """While the rule applies, prices are `percent` of the model's own.

    `days`: mon to sun; `hours`: a span such as "22:00-06:00", which belongs to the day on which it begins; `min_load_percent`:
    percent of the slots that must be taken, averaged over the last minute; `zone`: an IANA time zone, by default this machine's.
    An unset condition always applies.
    """

    percent: int
    days: tuple[str, ...] = ()
    hours: str = ""
    min_load_percent: int = 0
    zone: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 10_000:
            raise BadMessage(f"config: price_rules.percent: expected 0 to 10000, got {self.percent}")
        if not set(self.days) <= set(DAYS):
            raise BadMessage(f"config: price_rules.days: expected some of {', '.join(DAYS)}, got {', '.join(self.days)}")
        if self.hours and self._minutes_of_day() is None:
            raise BadMessage(f"config: price_rules.hours: expected a span such as 22:00-06:00, got {self.hours!r}")
        if not 0 <= self.min_load_percent <= 100:
            raise BadMessage(f"config: price_rules.min_load_percent: expected 0 to 100, got {self.min_load_percent}")
        try:
            ZoneInfo(self.zone or "UTC")
        except (OSError, ValueError, KeyError) as error:
            raise BadMessage(
                f"config: price_rules.zone: expected an IANA time zone such as Europe/Berlin, got {self.zone!r} ({error})"
            ) from None

    def _minutes_of_day(self) -> tuple[int, int] | None:
        """Returns first minute of the day and end minute of `hours`; None if `hours` is malformed."""
        match = _HOURS.fullmatch(self.hours)
        if match is None:
            return None
        begin, end = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
        return (begin, end) if end <= _MINUTES and begin != end else None

    def applies(self, when: datetime, load: float) -> bool:
        """Returns whether the rule applies at `when` (with a time zone) while the share `load` of the slots is taken."""
        local = when.astimezone(ZoneInfo(self.zone) if self.zone else None)
        day = local
        span = self._minutes_of_day()
        if span is not None:
            begin, end = span
            minute = local.hour * 60 + local.minute
            after_midnight = end < begin and minute < end
            if not (begin <= minute < end or (end < begin and minute >= begin) or after_midnight):
                return False
            day = local - timedelta(days=1) if after_midnight else local
        return (not self.days or DAYS[day.weekday()] in self.days) and load * 100 >= self.min_load_percent


def percent_off(discount: str, where: str) -> PriceRule:
    """The rule of a discount such as "50%". `where`: the setting. Raises BadMessage."""
    match = _DISCOUNT.fullmatch(discount)
    if match is None:
        raise BadMessage(f'config: {where}: expected "1%" to "99%", or "0%" for none, got {discount[:20]!r}')
    return PriceRule(percent=100 - int(match[1]))


def batch_rule(discount: str, hours: str) -> PriceRule:
    """The rule of a discount such as "50%" on jobs of the class `batch`, in these hours or always. Raises BadMessage."""
    rule = percent_off(discount, "batch_discount")
    try:
        return replace(rule, hours=hours)
    except BadMessage:
        raise BadMessage(f'config: batch_hours: expected a span such as "22:00-06:00", got {hours[:40]!r}') from None


def apply_price_rules(prices: Prices, rules: Iterable[PriceRule], when: datetime, load: float) -> Prices:
    """Returns the prices after the first rule that applies, rounded up to whole base units."""
    rule = next((rule for rule in rules if rule.applies(when, load)), None)
    if rule is None:
        return prices
    return Prices(*(-(-price * rule.percent // 100) for price in (prices.input, prices.cached_input, prices.output)))
