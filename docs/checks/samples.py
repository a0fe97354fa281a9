"""Runs the samples of the documentation that are marked `run`, against one local market; docs/README.md has the convention.

Run with `python -m docs.checks.samples [--quick] [PAGE …]`. It prints the first sample of each page that fails; then the exit
status is 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from docs.checks.markdown import ROOT, Block, Page, pages

BIN = ROOT / ".venv" / "bin"
TIMEOUT = 600
"""Seconds for one sample, on a machine that does much else."""


def main(arguments: list[str]) -> int:
    """Runs what is marked. Returns the exit status."""
    chosen = {(Path.cwd() / name).resolve() for name in arguments if not name.startswith("--")}
    runnable = [page for page in pages() if any(_runs(block) for block in page.blocks)]
    runnable = [page for page in runnable if page.path.parent != ROOT / "docs" or page.path.name != "README.md"]
    runnable = [page for page in runnable if not chosen or page.path in chosen]
    if "--quick" in arguments or not runnable:
        return 0
    started = time.monotonic()
    with market() as environment:
        problems = [problem for page in runnable for problem in _run_page(page, environment)]
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    count = sum(_runs(block) for page in runnable for block in page.blocks)
    sys.stdout.write(f"{count} samples of {len(runnable)} pages, {len(problems)} failed, {time.monotonic() - started:.0f} s\n")
    return 1 if problems else 0


def _runs(block: Block) -> bool:
    return block.info[1:2] == ("run",)


def _run_page(page: Page, environment: Mapping[str, str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tallystick-docs-") as folder:
        printed: str | None = None
        for block in page.blocks:
            if _runs(block):
                result = _run(block, environment, folder)
                printed = result.stdout
                if result.returncode:
                    yield f"{block.where}: exit status {result.returncode}\n{_indented(result.stdout + result.stderr)}"
                    return
            elif block.info[:2] == ("text", "output"):
                if printed is None:
                    yield f"{block.where}: no sample comes before this output"
                elif not matches(block.text, printed):
                    yield f"{block.where}: the sample printed something else:\n{_indented(printed)}"
                printed = None


def _run(block: Block, environment: Mapping[str, str], folder: str) -> subprocess.CompletedProcess[str]:
    language = block.info[0]
    commands = {"python": [str(BIN / "python"), "-c"], "sh": ["bash", "-euo", "pipefail", "-c"]}
    command = [*commands[language], block.text]
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        shown = [part.decode(errors="replace") for part in (error.stdout, error.stderr) if isinstance(part, bytes)]
        return subprocess.CompletedProcess(command, 124, "".join(shown), f"\nno end after {TIMEOUT} s")


def matches(expected: str, printed: str) -> bool:
    """Whether output is as the documentation shows it: `…` stands for any text, and white space does not count."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in expected.split("…")]
    return re.fullmatch(r"\s*" + r"[\s\S]*?".join(rf"\s*{part}\s*" for part in parts) + r"\s*", printed) is not None


@contextlib.contextmanager
def market() -> Iterator[dict[str, str]]:
    """`tally demo`, and the environment in which samples find it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "TALLY"))}
    clean["PATH"] = f"{BIN}{os.pathsep}{clean['PATH']}"
    with tempfile.TemporaryDirectory(prefix="tallystick-docs-market-") as folder:
        log = Path(folder) / "demo.log"
        with log.open("w", encoding="utf-8") as stderr:
            process = subprocess.Popen(
                [BIN / "tally", "demo", "--stand-in", "--json"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=clean | {"TMPDIR": folder},
            )
        try:
            market_facts = _first_object(process, log)
            (home,) = Path(folder).glob("tallystick-demo-*")
            yield clean | {
                "COLUMNS": "110",
                "NO_COLOR": "1",
                "OPENAI_API_KEY": "unused",
                "OPENAI_BASE_URL": f"{market_facts['gateway']}/v1",
                "RPC": market_facts["rpc"],
                "TALLYSTICK_COORDINATOR": market_facts["coordinator"],
                "TALLYSTICK_HOME": str(home),
                "TALLYSTICK_MODEL": market_facts["model"],
                "TALLYSTICK_PASSWORD_FILE": str(home / "password"),
                "TALLYSTICK_WALLET": "payer",
            }
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _first_object(process: subprocess.Popen[str], log: Path) -> dict[str, str]:
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        if line == "}\n":
            market_facts: dict[str, str] = json.loads("".join(lines))
            return market_facts
    raise SystemExit(f"the local market did not start:\n{_indented(log.read_text(encoding='utf-8'))}")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-25:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
