"""Starts a node's daemon as its own process: python -m tests.node.start CONFIG."""

from __future__ import annotations

import sys
from pathlib import Path

import uvloop

from node.config import load_config
from node.daemon import run
from tallystick.protocol.errors import TallyError
from tests.node.world import PROVIDER

if __name__ == "__main__":
    try:
        path = Path(sys.argv[1])
        uvloop.run(run(load_config(path), PROVIDER, lambda: load_config(path)))
    except TallyError as error:
        sys.exit(f"error: {error}")
