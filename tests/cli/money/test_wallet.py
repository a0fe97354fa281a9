from __future__ import annotations

from pathlib import Path

import pytest

from tallystick.protocol.signatures import checksum
from tallystick.runtime.keystore import open_keystore
from tests.chain.harness import person
from tests.cli.conftest import PASSWORD, Tally

SIGNER = person("wallet default")


def test_wallet_show(payer: Tally) -> None:
    """The address is shown as text, as a payment URI for a chain, and as a QR code; a bare address names no chain."""
    address = checksum(SIGNER.address)
    assert payer("wallet", "show") == {"wallet": "default", "address": address, "keystore": f"{payer.home}/keys/default.json"}
    assert payer("wallet", "show", "--chain", "8453", "--qr")["uri"] == f"ethereum:{address}@8453"
    assert "█" in payer.says("wallet", "show", "--qr")


def test_private_key_export(payer: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After confirmation, the private key goes to a new file of mode 0600; never to the terminal, and never over another file."""
    file = tmp_path / "key"
    with (tmp_path / "no").open("w+") as stdin:
        stdin.write("n\n")
        stdin.seek(0)
        monkeypatch.setattr("sys.stdin", stdin)
        payer.says("wallet", "export", "default", "--private-key", "-o", str(file), code=1)
    assert not file.exists()
    assert SIGNER.secret.hex() not in payer.says("wallet", "export", "default", "--private-key", "--yes", "-o", str(file))
    assert (file.read_text(), file.stat().st_mode & 0o777) == (f"0x{SIGNER.secret.hex()}\n", 0o600)
    for taken in (str(file), "/dev/stdout"):
        assert "exists" in payer("wallet", "export", "default", "--private-key", "--yes", "-o", taken, fails=True)["message"]
    assert payer("wallet", "import", "again", "--key-file", str(file))["address"] == checksum(SIGNER.address)


def test_keystore_export(payer: Tally, tmp_path: Path) -> None:
    """The exported keystore opens with the same password."""
    file = tmp_path / "copy.json"
    assert payer("wallet", "export", "default", "-o", str(file))["encrypted"] is True
    assert open_keystore(file, PASSWORD).secret == SIGNER.secret


def test_change_password(payer: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the new password opens the key; a wrong old one, an empty new one and an interruption change nothing."""
    keystore, new = payer.home / "keys" / "default.json", tmp_path / "new"
    before = keystore.read_bytes()
    new.write_text("\n")
    assert "empty" in payer("wallet", "change-password", "--new-password-file", str(new), fails=True)["message"]
    new.write_text("another\n")
    assert "does not open" in payer("wallet", "change-password", "--password-file", str(new), fails=True)["message"]

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        payer.says("wallet", "change-password", "--new-password-file", str(new), code=130)
    assert keystore.read_bytes() == before
    payer("wallet", "change-password", "--new-password-file", str(new))
    assert open_keystore(keystore, "another").secret == SIGNER.secret
    assert keystore.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in keystore.parent.iterdir()] == ["default.json"]
    assert "no wallet" in payer("wallet", "change-password", "nobody", fails=True)["message"]
