"""Starts a node's daemon as its own process: python -m tests.node.run_daemon CONFIG."""

from __future__ import annotations

import sys
from pathlib import Path

import uvloop

from node.service.config import load_config
from node.service.daemon import run
from tallystick.protocol.errors import TallyError
from tests.node.harness import PROVIDER

if __name__ == "__main__":
    try:
        path = Path(sys.argv[1])
        uvloop.run(run(load_config(path), PROVIDER, lambda: load_config(path)))
    except TallyError as error:
        sys.exit(f"error: {error}")
