"""The wheel as a user gets it: what it contains, and that it runs a market from outside the checkout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import clean_environment

ROOT = Path(__file__).parents[2]
PACKAGES = ("tallystick", "coordinator", "node")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a fresh environment that has the wheel and its pinned dependencies, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("environment")
    pins = folder / "pins.txt"
    pins.write_text("\n".join(re.findall(r"^[\w.\[\]-]+==[^\s\\;]+", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    pip = [str(Path(sys.base_prefix) / "bin" / "python3"), "-m", "pip", "--python", str(folder / "venv" / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--constraint", str(pins), str(wheel)], check=True, cwd=folder)
    subprocess.run([*pip, "check"], check=True, cwd=folder)
    return folder / "venv" / "bin"


def test_the_wheel_has_every_data_file(wheel: Path) -> None:
    """All other files beside the modules are in the wheel: migrations, ABIs, example configs, type markers."""
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert set(tracked) <= packed
    assert {name.split("/")[0] for name in packed if ".dist-info/" not in name} == set(PACKAGES)


def test_the_demo_runs_from_outside_the_checkout(commands: Path, tmp_path: Path) -> None:
    """`pip install` gives a `tally` that raises a whole market, serves a paid job and settles it."""
    environment = clean_environment() | {"HOME": str(tmp_path), "PATH": f"{commands}:/usr/bin:/bin"}
    command = [str(commands / "tally"), "demo", "--once", "--stand-in", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=240)
    assert int(json.loads(done.stdout)["cost"]) > 0
    where = [
        str(commands / "python"),
        "-c",
        "import coordinator, node, tallystick; print(tallystick.__file__, coordinator.__file__)",
    ]
    homes = subprocess.run(where, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout.split()
    assert all(Path(home).is_relative_to(commands.parent) for home in homes)
