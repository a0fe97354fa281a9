"""Third-party clients run only on request: `scripts/test clients`."""

import os

collect_ignore_glob = [] if os.environ.get("TALLYSTICK_CLIENTS") else ["test_*.py"]
