"""Programs of other projects that measurements and tests run for comparison, each in its own environment under build/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tallystick.cli.output import note
from tallystick.cli.progress import activity

BUILD = Path(__file__).parent.parent / "build"
LITELLM = ("litellm", ("litellm[proxy]==1.106.2",))
SGLANG_ROUTER = ("sglang-router", ("sglang-router==0.3.2",))


def install(name: str, requirements: tuple[str, ...]) -> Path | None:
    """Returns the folder of the environment's commands, which is filled on the first call. Returns None, with the reason on
    stderr, if the installation fails.
    """
    folder = BUILD / name
    stamp = folder / ".requirements"
    requirement_text = "\n".join(requirements)
    if not stamp.exists() or stamp.read_text() != requirement_text:
        note(f"installing {' '.join(requirements)} into {folder} (once) …")
        pip = [str(Path(sys.base_prefix) / "bin" / "python3"), "-m", "pip"]
        steps = (
            [sys.executable, "-m", "venv", "--without-pip", str(folder)],
            [*pip, "--python", str(folder / "bin" / "python"), "install", "--quiet", *requirements],
        )
        for step in steps:
            with activity(f"installing {name}"):
                result = subprocess.run(step, check=False, capture_output=True, text=True)
            if result.returncode != 0:
                print(f"{name} cannot be installed here: {result.stderr[-500:]}", file=sys.stderr)
                return None
        stamp.write_text(requirement_text)
    return folder / "bin"
