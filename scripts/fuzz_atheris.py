"""Feeds what reads bytes from outside with inputs that reach ever more of its code (atheris, libFuzzer); see tests/fuzz.py.

An input that fails is kept in build/fuzz/TARGET, printed, and exits with 77. Add it to tests/test_fuzz.py when mended.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["node", "tallystick.protocol", "tallystick.client"]):
    from tests import fuzz

KEPT = Path(__file__).parent.parent / "build" / "fuzz"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(fuzz.TARGETS))
    parser.add_argument("--seconds", type=int, default=180, help="how long (180)")
    options = parser.parse_args()
    folder = KEPT / options.target
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(fuzz.seeds()[options.target]):
        (folder / "corpus" / f"seed-{number}").write_bytes(seed)
    flags = (
        f"-max_total_time={options.seconds}",
        f"-artifact_prefix={folder}/",
        "-timeout=10",
        "-rss_limit_mb=1024",
        "-max_len=16384",
    )
    target = fuzz.TARGETS[options.target]
    atheris.Setup([sys.argv[0], *flags, str(folder / "corpus")], lambda data: fuzz.run(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
