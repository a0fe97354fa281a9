from __future__ import annotations

from pathlib import Path

import pytest

from tallystick.protocol.eip712 import checksum
from tallystick.runtime.keystore import open_keystore
from tests.chain.harness import person
from tests.cli.conftest import PASSWORD, Tally

SIGNER = person("wallet default")


def test_an_address_to_pay_to(payer: Tally) -> None:
    """As text, as a payment address of a chain, and as a QR code of it; a bare address names no chain."""
    address = checksum(SIGNER.address)
    assert payer("wallet", "show") == {"wallet": "default", "address": address, "keystore": f"{payer.home}/keys/default.json"}
    assert payer("wallet", "show", "--chain", "8453", "--qr")["uri"] == f"ethereum:{address}@8453"
    assert "█" in payer.says("wallet", "show", "--qr")


def test_a_bare_key_goes_into_a_private_file_only(payer: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a yes, to a new file that only its owner reads; never to the screen, never over another file."""
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


def test_a_keystore_is_exported_encrypted(payer: Tally, tmp_path: Path) -> None:
    """It opens with the same password."""
    file = tmp_path / "copy.json"
    assert payer("wallet", "export", "default", "-o", str(file))["encrypted"] is True
    assert open_keystore(file, PASSWORD).secret == SIGNER.secret


def test_a_new_password(payer: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same key opens with the new one only; a wrong old one, an empty new one and a cut in the middle change nothing."""
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
