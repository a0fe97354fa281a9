"""The programs in scripts/examples, as a new user runs them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from node.engines.demo import Simulation, build_app
from node.engines.demo_answer import MODEL
from scripts.relay import processes
from tallystick.runtime.serving import serving
from tests.e2e.conftest import clean_environment
from tests.e2e.extra_node import node_beside

EXAMPLES = Path(__file__).parent.parent.parent / "scripts" / "examples"
SAID = {
    "hello.py": ("stand-in", "tokens from 0x", "cost 0.0000"),
    "stream.py": ("stand-in", "dollars", "of this tab", "output tokens"),
    "cancel.py": ("stand-in", "client_cancelled: ", "output tokens, 0.0000"),
    "many.py": ("24 of 24 answered for 0.00", "100%"),
    "choose.py": ("in eu-west: qualifies", "answered for 0.0000"),
    "verify.py": ("order: signed by the payer", "transcript: the whole answer", "not valid: "),
    "openai_sdk.py": ("stand-in",),
}
"""What each must print; notebook.ipynb is run by `scripts/test clients`."""


@asynccontextmanager
async def example_market(folder: Path, token_seconds: float = 0.01) -> AsyncIterator[dict[str, str]]:
    """A market with a slow stand-in engine, and the environment that points the examples to it."""
    engine = build_app(Simulation(token_seconds=token_seconds))
    async with (
        processes.upstream() as mock,
        processes.market(folder / "market", mock) as site,
        serving(engine, "127.0.0.1", 0) as port,
        node_beside(
            folder / "market",
            site,
            f'[[engines]]\nurl = "http://127.0.0.1:{port}"\nslots = 16\n[engines.spec]\nregion = "eu-west"\n',
            model=MODEL,
        ),
    ):
        yield clean_environment() | {
            "OPENAI_BASE_URL": f"{site.gateway}/v1",
            "TALLYSTICK_COORDINATOR": site.coordinator,
            "TALLYSTICK_HOME": str(folder / "market"),
            "TALLYSTICK_MODEL": MODEL,
            "TALLYSTICK_PASSWORD_FILE": str(folder / "market" / "password"),
            "TALLYSTICK_WALLET": "payer",
            "COLUMNS": "120",
        }


async def test_every_example(tmp_path: Path) -> None:
    """Each program runs unmodified against a market, prints what it should show, and nothing on stderr."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAID.keys()
    shown = (EXAMPLES / "README.md").read_text()
    assert all(f"]({path.name})" in shown for path in EXAMPLES.iterdir() if path.suffix in {".py", ".ipynb"})
    async with example_market(tmp_path) as environment:
        for name, wanted in SAID.items():
            pipe = asyncio.subprocess.PIPE
            started = await asyncio.create_subprocess_exec(
                sys.executable,
                "-W",
                "default::ResourceWarning",
                str(EXAMPLES / name),
                cwd=tmp_path,
                env=environment,
                stdout=pipe,
                stderr=pipe,
            )
            out, err = await started.communicate()
            assert (started.returncode, err.decode()) == (0, ""), f"{name}: {out.decode()[-2000:]}"
            for part in wanted:
                assert part in out.decode(), f"{name}: {out.decode()}"
