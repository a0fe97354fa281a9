"""Real engines run only on request: `scripts/test engines`, with `--all` also the large ones."""

import os

WANTED = os.environ.get("TALLYSTICK_ENGINES", "")
collect_ignore_glob = [] if WANTED else ["test_*.py"]
