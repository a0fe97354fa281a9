"""`tally wallet`: keys in encrypted keystores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tallystick.cli.options import DEFAULT_WALLET, Json, PasswordFile, prompt_password, unlock, wallets
from tallystick.cli.output import show_facts, show_json, show_rows, step
from tallystick.protocol.eip712 import checksum
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.config import home
from tallystick.runtime.keystore import (
    change_password,
    create_keystore,
    find_password,
    keystore_address,
    keystore_path,
    open_keystore,
    write_private,
)

app = typer.Typer(no_args_is_help=True, help="Make, list, import and export wallets (encrypted keystores, mode 0600).")
Name = Annotated[str, typer.Argument(help="The wallet's name in the home folder, or a keystore file.", autocompletion=wallets)]


@app.command()
def new(name: Name = DEFAULT_WALLET, password_file: PasswordFile = None, as_json: Json = False) -> None:
    """Makes a wallet with a fresh key."""
    _create(name, password_file, None, as_json=as_json)


@app.command("import")
def import_(
    name: Name,
    key_file: Annotated[Path | None, typer.Option(help="File that holds the private key as hex.")] = None,
    keystore: Annotated[Path | None, typer.Option(help="A keystore (V3) to copy in.")] = None,
    dev: Annotated[
        int | None, typer.Option("--dev-account", help="Number of a funded account of `tally chain` (test money only).")
    ] = None,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Makes a wallet from a key that exists."""
    if sum(source is not None for source in (key_file, keystore, dev)) != 1:
        raise BadMessage("give one of --key-file, --keystore and --dev-account")
    if key_file is not None:
        secret = _read_key(key_file)
    elif keystore is not None:
        secret = unlock(str(keystore), password_file).secret
    else:
        from tallystick.chain.devnet import dev_accounts

        accounts = dev_accounts()
        if dev is None or not 0 <= dev < len(accounts):
            raise BadMessage(f"--dev-account: expected 0 to {len(accounts) - 1}")
        secret = accounts[dev].secret
    _create(name, password_file, secret, as_json=as_json)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Lists the wallets in the home folder."""
    found = {path.stem: checksum(keystore_address(path)) for path in sorted((home() / "keys").glob("*.json"))}
    if as_json:
        show_json(found)
    elif found:
        show_rows(("wallet", "address"), found.items())
    else:
        step("no wallets yet; make one with: tally wallet new")


@app.command()
def show(
    name: Name = DEFAULT_WALLET,
    qr: Annotated[bool, typer.Option("--qr", help="Draw the address as a QR code, to pay to it from a phone.")] = False,
    chain: Annotated[
        int | None, typer.Option("--chain", min=1, help="Chain id, for a payment address (EIP-681) of that chain.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Shows a wallet's address; needs no password."""
    _show(name, keystore_path(name), chain, as_json=as_json)
    if qr and not as_json:
        import segno

        address = checksum(keystore_address(keystore_path(name)))
        segno.make(_uri(address, chain) or address, error="m", micro=False).terminal(sys.stdout, border=2, compact=True)


@app.command()
def export(
    name: Name,
    to: Annotated[Path, typer.Option("--out", "-o", help="File to write; it must not exist.")],
    key: Annotated[
        bool, typer.Option("--private-key", help="Write the bare private key, which whoever reads it can spend.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask whether --private-key is meant.")] = False,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Copies a wallet's keystore, still encrypted, once the password was shown to open it; or its bare key into a file (0600)."""
    if to.exists():
        raise BadMessage(f"{to} exists")
    if key and not yes:
        question = f"Write the private key of {name} to {to}, unencrypted? Whoever reads that file owns its money."
        typer.confirm(question, abort=True, err=True)
    signer = unlock(name, password_file)
    try:
        write_private(to, f"0x{signer.secret.hex()}\n".encode() if key else keystore_path(name).read_bytes(), replace=False)
    except FileExistsError:
        raise BadMessage(f"{to} exists") from None
    if as_json:
        show_json({"wallet": name, "address": checksum(signer.address), "file": str(to), "encrypted": not key})
    else:
        step(f"wrote {to} ({'NOT encrypted: delete it when it has served' if key else 'encrypted with the same password'})")


@app.command("change-password")
def change(
    name: Name = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    new_file: Annotated[
        Path | None, typer.Option("--new-password-file", help="File with the new password; it is asked for without one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Changes the password of a wallet's keystore. Copies made before still open with the old one."""
    path = keystore_path(name)
    if not path.exists():
        raise BadMessage(f"no wallet at {path}; make one with: tally wallet new {name}")
    old = find_password(password_file, lambda: prompt_password(name))
    open_keystore(path, old)  # whoever mistypes it is not asked for a new one
    new = prompt_password(f"{name} (new)", confirm=True) if new_file is None else find_password(new_file)
    signer = change_password(path, old, new)
    if as_json:
        show_json({"wallet": name, "address": checksum(signer.address), "keystore": str(path)})
    else:
        step(f"{path} has a new password")


def _read_key(path: Path) -> bytes:
    try:
        secret = bytes.fromhex(path.read_text().strip().removeprefix("0x"))
    except (OSError, ValueError):
        raise BadMessage(f"{path}: expected a private key as 64 hex digits") from None
    if len(secret) != 32:
        raise BadMessage(f"{path}: expected a private key as 64 hex digits")
    return secret


def _create(name: str, password_file: Path | None, secret: bytes | None, *, as_json: bool) -> None:
    path = keystore_path(name)
    if path.exists():
        raise BadMessage(f"{path} exists; a key is never overwritten")
    password = find_password(password_file, lambda: prompt_password(name, confirm=True))
    create_keystore(path, password, secret)
    _show(name, path, as_json=as_json)


def _show(name: str, path: Path, chain: int | None = None, *, as_json: bool) -> None:
    address = checksum(keystore_address(path))
    uri = _uri(address, chain)
    facts = {"wallet": name, "address": address, "keystore": str(path)} | ({"uri": uri} if uri else {})
    if as_json:
        show_json(facts)
    else:
        show_facts(facts.items())


def _uri(address: str, chain: int | None) -> str | None:
    """Without a chain there is none: wallets would take it for the main chain's."""
    return None if chain is None else f"ethereum:{address}@{chain}"
