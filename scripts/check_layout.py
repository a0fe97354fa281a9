"""Checks that the folders tell the truth: tests mirror the rooms, and each room says what lives there and what it may import.

A test file is tests/<package>/<room>/test_<module>.py, or test_<module>_<aspect>.py where a module has several.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "chain": "tallystick/chain",
    "cli": "tallystick/cli",
    "client": "tallystick/client",
    "coordinator": "coordinator",
    "node": "node",
    "protocol": "tallystick/protocol",
    "runtime": "tallystick/runtime",
    "scoring": "tallystick/scoring",
    "tracing": "tallystick/tracing",
    "web": "tallystick/web",
}
"""Each folder of tests, and the package that it mirrors."""


def main() -> int:
    """Prints each fault; the exit status says whether there is one."""
    faults = [*misplaced_tests(ROOT), *silent_rooms(ROOT)]
    for fault in faults:
        print(fault)
    return bool(faults)


def misplaced_tests(root: Path) -> Iterator[str]:
    """Test files that are in no room's folder, or whose name is of no module there."""
    for tests, package in PACKAGES.items():
        for test in sorted((root / "tests" / tests).rglob("test_*.py")):
            room = root / package / test.parent.relative_to(root / "tests" / tests)
            if not room.is_dir():
                yield f"{test.relative_to(root)}: expected {room.relative_to(root)}/ to exist, since tests mirror the rooms"
                continue
            subject = test.stem.removeprefix("test_")
            modules = [module.stem for module in room.glob("*.py")]
            if not any(subject == module or subject.startswith(f"{module}_") for module in modules):
                yield (
                    f"{test.relative_to(root)}: expected test_<module>.py or test_<module>_<aspect>.py for a module in "
                    f"{room.relative_to(root)}/"
                )


def silent_rooms(root: Path) -> Iterator[str]:
    """Rooms whose `__init__` does not say what lives there and what they may import."""
    for package in PACKAGES.values():
        for init in sorted((root / package).rglob("__init__.py")):
            if init.parent.name == "versions" or (init.parent == root / package and "/" not in package):
                continue
            text = ast.get_docstring(ast.parse(init.read_text())) or ""
            if "import" not in text.lower():
                yield f"{init.relative_to(root)}: expected a docstring that says what lives in the room and what it may import"


if __name__ == "__main__":
    sys.exit(main())
