"""Fuzzes the parsers of outside bytes, guided by coverage (atheris, libFuzzer); see tests/fuzz.py. A failing input is kept in
build/fuzz/TARGET and printed, and the exit code is 77. Add the input to tests/test_fuzz.py when the fault is fixed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["node", "tallystick.protocol", "tallystick.client"]):
    from tests import fuzz

FUZZ_FOLDER = Path(__file__).parent.parent / "build" / "fuzz"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(fuzz.TARGETS))
    parser.add_argument("--seconds", type=int, default=180, help="duration in seconds (%(default)s)")
    options = parser.parse_args()
    folder = FUZZ_FOLDER / options.target
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
