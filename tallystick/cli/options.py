"""Options that several sub-commands share, and what they lead to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.config import home
from tallystick.runtime.keystore import PASSWORD_HELP, open_wallet

DEFAULT_WALLET = "default"


def wallets(incomplete: str) -> list[str]:
    """For the shell's completion: the wallets of the home folder that begin so."""
    return sorted(path.stem for path in (home() / "keys").glob("*.json") if path.stem.startswith(incomplete))


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Wallet = Annotated[
    str,
    typer.Option("--wallet", "-w", help="Name of a wallet in the home folder, or a keystore file.", autocompletion=wallets),
]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        help="File with the keystore's password. Else TALLYSTICK_PASSWORD_FILE, TALLYSTICK_PASSWORD or a prompt.",
    ),
]
DeploymentFile = Annotated[
    Path | None,
    typer.Option(
        "--deployment", help="Deployment file written by `tally deploy`; deployment.json in the home folder by default."
    ),
]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file with the settings.")]
Rpc = Annotated[str | None, typer.Option("--rpc", help="JSON-RPC address of the chain, instead of the deployment file's.")]


def prompt_password(wallet: str, *, confirm: bool = False) -> str:
    """Asks for a password without showing it. Raises BadMessage where nobody can be asked."""
    if not sys.stdin.isatty():
        raise BadMessage(f"wallet {wallet} needs its password: {PASSWORD_HELP}")
    return str(typer.prompt(f"Password of wallet {wallet}", hide_input=True, confirmation_prompt=confirm, err=True))


def unlock(wallet: str, password_file: Path | None) -> Signer:
    """The signer of a wallet. Raises BadMessage."""
    return open_wallet(wallet, password_file=password_file, prompt=lambda: prompt_password(wallet))


def deployment_path(given: Path | None) -> Path:
    """The deployment file. Raises BadMessage if there is none."""
    path = given or home() / "deployment.json"
    if not path.exists():
        raise BadMessage(f"no deployment file at {path}; deploy with `tally deploy`, or name one with --deployment")
    return path
