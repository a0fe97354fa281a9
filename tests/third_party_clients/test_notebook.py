"""The SDK in a notebook: Jupyter's kernel, in an environment of its own that can import this package."""

from __future__ import annotations

import asyncio
import json
import os
import sysconfig
from pathlib import Path

from scripts.peers import install
from tests.e2e.test_examples import EXAMPLES, example_market
from tests.third_party_clients.test_clients import PROGRAMS

JUPYTER = ("jupyter", ("nbclient==0.11.0", "ipykernel==7.4.0"))


async def test_a_notebook(tmp_path: Path) -> None:
    """The example notebook runs unchanged; stopping a cell cancels its job, with and without await, and the market stays open."""
    commands = await asyncio.to_thread(install, *JUPYTER)
    assert commands is not None
    async with example_market(tmp_path, token_seconds=0.05) as environment:
        paths = os.pathsep.join((sysconfig.get_path("purelib"), str(EXAMPLES.parent.parent)))
        variables = {"PYTHONPATH": paths, "HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1"}
        command = (str(commands / "python"), str(PROGRAMS / "notebook.py"), str(EXAMPLES / "notebook.ipynb"))
        pipe = asyncio.subprocess.PIPE
        started = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, env=environment | variables, stdout=pipe, stderr=pipe
        )
        out, err = await started.communicate()
    assert started.returncode == 0, (out + err).decode()[-3000:]
    output = json.loads(out.decode().splitlines()[-1])
    example = "".join(output["example"])
    assert "stderr: " not in example
    assert example.count("stand-in") >= 2
    assert "cost: 0.0000" in example
    assert "[20, 20, 20, 20, 20]" in example
    assert output["async error"] in {"CancelledError", "KeyboardInterrupt"}
    assert output["sync error"] == "KeyboardInterrupt"
    assert output["async"] == output["sync"] == ["CANCELLED 0 COMPLETED\n", ""]
    assert output["open"] == output["close"] == ["", ""]
