"""A headless Chromium for tests of pages: Debian's, or the one that CHROMIUM names."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, async_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
SCREENSHOTS = os.environ.get("TALLYSTICK_SCREENSHOTS", "")
"""A folder for the pictures of pages, to be looked at."""
NARROW, WIDE = 390, 1_280
TIMEOUT_MS = 120_000

needs_browser = pytest.mark.skipif(not (CHROMIUM or os.environ.get("TALLYSTICK_REQUIRE_SERVICES")), reason="needs Chromium")


@asynccontextmanager
async def browsing(
    url: str, *, width: int = WIDE, scheme: Literal["light", "dark"] = "light", at: str = ""
) -> AsyncIterator[Page]:
    """A page of a browser whose addresses begin with `url`. Whatever the browser complains about fails the test at the end.

    `at`: the host and port that all names lead to. Browsers trust plain http of loopback names more than that of others.
    """
    complaints: list[str] = []
    args = ["--no-sandbox", *([f"--host-resolver-rules=MAP * {at}"] if at else [])]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=args, timeout=TIMEOUT_MS)
        try:
            context = await browser.new_context(base_url=url, viewport={"width": width, "height": 900}, color_scheme=scheme)
            context.set_default_timeout(TIMEOUT_MS)
            page = await context.new_page()
            page.on("console", lambda message: complaints.append(message.text) if message.type in {"error", "warning"} else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            yield page
        finally:
            await browser.close()
    assert not complaints


async def look_at(page: Page, name: str) -> None:
    """Asserts that the page is accessible (axe-core) and not wider than the window, and takes its picture."""
    if SCREENSHOTS:
        width = (page.viewport_size or {"width": 0})["width"]
        await page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{width}.png", full_page=True)
    found = await Axe().run(page)
    assert not found.violations_count, found.generate_report()
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} is wider than the window"
