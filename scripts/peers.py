"""Other people's programs that measurements and tests run beside ours: each in an environment of its own under build/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build"
LITELLM = ("litellm", ("litellm[proxy]==1.106.2",))


def install(name: str, requirements: tuple[str, ...]) -> Path | None:
    """The folder of the environment's commands, filled at the first call; None, with a word on stderr, if that cannot be."""
    folder = BUILD / name
    stamp = folder / ".requirements"
    wanted = "\n".join(requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {' '.join(requirements)} into {folder} (once) …", file=sys.stderr)
        pip = [str(Path(sys.base_prefix) / "bin" / "python3"), "-m", "pip"]
        steps = (
            [sys.executable, "-m", "venv", "--without-pip", str(folder)],
            [*pip, "--python", str(folder / "bin" / "python"), "install", "--quiet", *requirements],
        )
        for step in steps:
            done = subprocess.run(step, check=False, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{name} cannot be installed here: {done.stderr[-500:]}", file=sys.stderr)
                return None
        stamp.write_text(wanted)
    return folder / "bin"
