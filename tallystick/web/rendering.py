"""Renders pages from Jinja templates. All text is escaped, whoever it is from; nothing in a page is inline script or style.

The Content-Security-Policy allows files of this server alone, so text that slipped through could neither run nor load anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import HTMLResponse

from tallystick.protocol.types import format_amount
from tallystick.version import __version__
from tallystick.web.static_files import STATIC_PATH, versioned

if TYPE_CHECKING:
    from jinja2 import Environment

HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src"
    " 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "same-origin",  # without referrers, forms over plain http name no origin, as if another site sent them
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_SHARED = Path(__file__).parent / "templates"
_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


class Pages:
    """The pages of one daemon: its own templates in `folder`, beside the shared ones.

    `sections`: the links of its navigation, by address from the server's root, in order.
    """

    def __init__(self, folder: Path, *, product: str, sections: Mapping[str, str]) -> None:
        self._folder, self._product, self._sections = folder, product, sections

    @cached_property
    def _environment(self) -> Environment:
        import jinja2  # noqa: PLC0415 - takes some megabytes, which a daemon that nobody looks at saves

        environment = jinja2.Environment(
            loader=jinja2.ChoiceLoader([jinja2.FileSystemLoader(self._folder), jinja2.FileSystemLoader(_SHARED)]),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {
            "dollars": format_amount,
            "count": "{:,}".format,
            "short": short_address,
            "age": age,
            "milliseconds": milliseconds,
        }
        environment.globals |= {
            "static": lambda name: f"{STATIC_PATH}/{versioned(name)}",
            "product": self._product,
            "sections": self._sections,
            "version": __version__,
        }
        return environment

    def render(self, template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
        """Returns a page. `values` are what the template names; text in them is escaped."""
        return HTMLResponse(self._environment.get_template(template).render(values), status, dict(HEADERS))


def short_address(address: str) -> str:
    """An address for narrow columns: its first and last digits. Links and titles have the whole one."""
    return f"{address[:6]}…{address[-4:]}" if len(address) > 12 else address


def age(seconds: float) -> str:
    """A span of time in its largest unit: "3 min", "2 d"; "now" below a second."""
    whole = int(seconds)
    if whole < 1:
        return "now"
    return next((f"{whole // size} {unit}" for unit, size in _UNITS if whole >= size), f"{whole} s")


def milliseconds(value: float) -> str:
    """A time in milliseconds, or in seconds from 10 s on; a dash if it is unknown (0)."""
    if not value:
        return "\N{EN DASH}"
    return f"{value / 1_000:.0f} s" if value >= 10_000 else f"{value:,.0f} ms"
