"""Other clients are asked for by name: `scripts/test clients`."""

import os

collect_ignore_glob = [] if os.environ.get("TALLYSTICK_CLIENTS") else ["test_*.py"]
