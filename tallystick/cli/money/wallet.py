"""`tally wallet`: keys in encrypted keystores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tallystick.cli.money.wallet_import import (
    STDIN,
    Derivation,
    ask_secret,
    confirm_account,
    key_of_keystore,
    key_of_text,
    read_secret,
    refuse_secret_argument,
    usable_signer,
)
from tallystick.cli.onchain import dev_account
from tallystick.cli.options import DEFAULT_WALLET, Json, PasswordFile, complete_wallets, prompt_password, unlock
from tallystick.cli.output import note, show_fields, show_json, show_table, step
from tallystick.cli.prompts import choose_password
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import parse_address
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
Name = Annotated[
    str, typer.Argument(help="Wallet: a name in the home folder, or a keystore file.", autocompletion=complete_wallets)
]


@app.command()
def new(name: Name = DEFAULT_WALLET, password_file: PasswordFile = None, as_json: Json = False) -> None:
    """Make a wallet with a new random key."""
    _create(name, password_file, None, as_json=as_json)


@app.command("import")
def import_(
    name: Name,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="File with a private key (64 hex digits) or a seed phrase; - reads standard input."),
    ] = None,
    keystore: Annotated[
        str | None,
        typer.Option(
            "--keystore", help="Keystore to copy: a file (V3), an account that foundry keeps, or an address that geth keeps."
        ),
    ] = None,
    dev: Annotated[
        int | None, typer.Option("--dev-account", help="Number of a funded account of `tally chain` (test money only).")
    ] = None,
    index: Annotated[
        int | None, typer.Option("--index", min=0, help="Account of the seed phrase, in MetaMask's order; default: 0.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option("--derivation-path", help="Path in the seed phrase, instead of --index: m/44'/60'/1'/0/0 for Ledger Live."),
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the seed phrase's passphrase (BIP-39), if it has one.")
    ] = None,
    ask_passphrase: Annotated[
        bool, typer.Option("--ask-passphrase", help="Ask for the seed phrase's passphrase (BIP-39).")
    ] = False,
    keystore_password_file: Annotated[
        Path | None,
        typer.Option("--keystore-password-file", help="File with the password of --keystore; default: as --password-file."),
    ] = None,
    expect: Annotated[
        str | None, typer.Option("--expect-address", help="Import only if the key is that of this address.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask whether the address is the right one.")] = False,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Make a wallet from an existing key: a private key, a seed phrase, or a keystore of another wallet.

    Without --key-file, --keystore or --dev-account, the key or the seed phrase is asked for without being shown.
    """
    for text, field in ((name, "NAME"), (str(key_file or ""), "--key-file"), (keystore or "", "--keystore")):
        refuse_secret_argument(text, field)
    if sum(source is not None for source in (key_file, keystore, dev)) > 1:
        raise BadMessage("expected at most one of --key-file, --keystore and --dev-account")
    _refuse_existing(name)
    expected = None if expect is None else parse_address(expect, "--expect-address")
    derivation = Derivation(index, path, passphrase_file, ask_passphrase)
    if derivation.is_given and (keystore is not None or dev is not None):
        raise BadMessage("--index, --derivation-path and a passphrase are for seed phrases only")
    if keystore is not None:
        secret = key_of_keystore(keystore, keystore_password_file or password_file)
    elif dev is not None:
        secret = dev_account(dev).secret
    elif key_file is not None:
        secret = key_of_text(read_secret(key_file), derivation, "--key-file")
    else:
        secret = key_of_text(ask_secret("Private key or seed phrase"), derivation, "private key or seed phrase")
    signer = usable_signer(secret)
    confirm_account(signer, checksum(signer.address), expected, ask=not yes and not as_json and dev is None)
    _create(name, password_file, secret, as_json=as_json)
    if key_file is not None and key_file != STDIN:
        note(f"{key_file} still holds the secret unencrypted: delete it, or keep it where only you can read it")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the wallets in the home folder."""
    addresses = {path.stem: _address_of(path) for path in sorted((home() / "keys").glob("*.json"))}
    if as_json:
        show_json(addresses)
    elif addresses:
        show_table(("wallet", "address"), [(name, address or "unknown") for name, address in addresses.items()])
    else:
        step("no wallets yet; make one with: tally wallet new")


def _address_of(path: Path) -> str | None:
    """The address that a keystore names; None, with a remark, if it names none or is damaged."""
    try:
        return checksum(keystore_address(path))
    except BadMessage as error:
        note(str(error))
        return None


@app.command()
def show(
    name: Name = DEFAULT_WALLET,
    qr: Annotated[bool, typer.Option("--qr", help="Draw the address as a QR code, for payments from a phone.")] = False,
    chain: Annotated[
        int | None, typer.Option("--chain", min=1, help="Chain id; shows a payment URI (EIP-681) for that chain.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a wallet's address. Needs no password."""
    path = _existing(name)
    _show(name, path, chain, as_json=as_json)
    if qr and not as_json:
        import segno

        address = checksum(keystore_address(path))
        segno.make(_uri(address, chain) or address, error="m", micro=False).terminal(sys.stdout, border=2, compact=True)


@app.command()
def export(
    name: Name,
    file: Annotated[Path, typer.Option("--out", "-o", help="File to write; must not exist.")],
    private_key: Annotated[
        bool, typer.Option("--private-key", help="Write the unencrypted private key; its readers can spend the money.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before writing the private key.")] = False,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Copy a wallet's encrypted keystore, or write its private key, to a file of mode 0600. Needs the password."""
    if file.exists():
        raise BadMessage(f"--out: {file} exists; give a file that does not")
    if private_key and not yes:
        question = f"Write the private key of {name} to {file}, unencrypted? Anyone who reads that file can spend its money."
        typer.confirm(question, abort=True, err=True)
    signer = unlock(name, password_file)
    content = f"0x{signer.secret.hex()}\n".encode() if private_key else keystore_path(name).read_bytes()
    try:
        write_private(file, content, replace=False)
    except FileExistsError:
        raise BadMessage(f"--out: {file} exists; give a file that does not") from None
    if as_json:
        show_json({"wallet": name, "address": checksum(signer.address), "file": str(file), "encrypted": not private_key})
    else:
        step(f"wrote {file} ({'NOT encrypted: delete it after use' if private_key else 'encrypted with the same password'})")


@app.command("change-password")
def change(
    name: Name = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    new_file: Annotated[
        Path | None, typer.Option("--new-password-file", help="File with the new password; default: a prompt.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Change the password of a wallet's keystore. Earlier copies of the keystore still open with the old password."""
    path = _existing(name)
    old = find_password(password_file, lambda: prompt_password(name))
    open_keystore(path, old)  # a mistyped password fails before the new one is asked for
    new = choose_password(name) if new_file is None else find_password(new_file)
    signer = change_password(path, old, new)
    if as_json:
        show_json({"wallet": name, "address": checksum(signer.address), "keystore": str(path)})
    else:
        step(f"{path} has a new password")


def _existing(name: str) -> Path:
    """The keystore of a wallet. Raises BadMessage if there is none."""
    path = keystore_path(name)
    if not path.exists():
        raise BadMessage(f"no wallet at {path}; list the wallets with `tally wallet list`, or make one: tally wallet new {name}")
    return path


def _refuse_existing(name: str) -> None:
    path = keystore_path(name)
    if path.exists():
        raise BadMessage(f"{path} exists; a key is never overwritten. Choose another name")


def _create(name: str, password_file: Path | None, secret: bytes | None, *, as_json: bool) -> None:
    _refuse_existing(name)
    path = keystore_path(name)
    password = find_password(password_file, lambda: choose_password(name))
    create_keystore(path, password, secret)
    _show(name, path, as_json=as_json)


def _show(name: str, path: Path, chain: int | None = None, *, as_json: bool) -> None:
    address = checksum(keystore_address(path))
    uri = _uri(address, chain)
    fields = {"wallet": name, "address": address, "keystore": str(path)} | ({"uri": uri} if uri else {})
    if as_json:
        show_json(fields)
    else:
        show_fields(fields.items())


def _uri(address: str, chain: int | None) -> str | None:
    """The payment URI (EIP-681). None without a chain, since wallets would assume the main chain."""
    return None if chain is None else f"ethereum:{address}@{chain}"
