"""Options and arguments that several sub-commands share, and the wallet and deployment file that they select."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.protocol.errors import BadMessage
from tallystick.runtime.config import home
from tallystick.runtime.keystore import PASSWORD_HELP, open_wallet

if TYPE_CHECKING:
    from tallystick.protocol.eip712 import Signer

DEFAULT_WALLET = "default"


def complete_wallets(incomplete: str) -> list[str]:
    """Shell completion: wallets of the home folder whose name begins with `incomplete`."""
    return sorted(path.stem for path in (home() / "keys").glob("*.json") if path.stem.startswith(incomplete))


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
StandIn = Annotated[bool, typer.Option("--stand-in", help="Use a stand-in engine, whose answers say that it is no model.")]
Wallet = Annotated[
    str,
    typer.Option(
        "--wallet", "-w", help="Wallet: a name in the home folder, or a keystore file.", autocompletion=complete_wallets
    ),
]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        help="File with the keystore's password; default: TALLYSTICK_PASSWORD_FILE, TALLYSTICK_PASSWORD, or a prompt.",
    ),
]
DeploymentFile = Annotated[
    Path | None,
    typer.Option("--deployment", help="Deployment file that `tally deploy` wrote; default: deployment.json in the home folder."),
]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="Settings file (TOML).")]
Rpc = Annotated[str | None, typer.Option("--rpc", help="JSON-RPC URL of the chain; default: the deployment file's.")]
CoordinatorUrl = Annotated[
    str | None, typer.Option("--coordinator", help="Coordinator URL; default: the config's, or http://127.0.0.1:8420.")
]
Provider = Annotated[str, typer.Argument(help="Provider: an address or a wallet name.")]


def prompt_password(wallet: str) -> str:
    """Asks for a wallet's password without echo. Raises BadMessage if stdin is no terminal."""
    if not sys.stdin.isatty():
        raise BadMessage(f"wallet {wallet} needs its password: {PASSWORD_HELP}")
    return str(typer.prompt(f"Password of wallet {wallet}", hide_input=True, err=True))


def unlock(wallet: str, password_file: Path | None) -> Signer:
    """Opens a wallet and returns its signer. Raises BadMessage, also for an address, which cannot sign."""
    if wallet.startswith(("0x", "0X")) and not Path(wallet).exists():
        raise BadMessage(f"expected a wallet that can sign (its name, or a keystore file), got the address {wallet[:100]}")
    return open_wallet(wallet, password_file=password_file, prompt=lambda: prompt_password(wallet))


def deployment_path(path: Path | None) -> Path:
    """The deployment file: `path`, or the home folder's. Raises BadMessage if it does not exist."""
    path = path or home() / "deployment.json"
    if not path.exists():
        raise BadMessage(
            f"no deployment file at {path}: deploy the contracts with `tally deploy`, or name the file that the market's "
            "operator gave you with --deployment"
        )
    return path
