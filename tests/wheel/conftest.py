"""The wheel is installed for real, which takes a minute and needs a package index: `scripts/test wheel`."""

import os

collect_ignore_glob = [] if os.environ.get("TALLYSTICK_WHEEL") else ["test_*.py"]
