"""Which wallet, state folder and deployment file a new node gets: its own ones, shared with no other node of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from tallystick.cli.market_deployment import (
    default_deployment_file,
    ensure_deployment_file,
    is_local,
    matches_coordinator,
)
from tallystick.cli.output import note, step
from tallystick.cli.prompts import ask, choose_password
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Address, parse_address
from tallystick.runtime.config import home
from tallystick.runtime.keystore import create_keystore, find_password, keystore_address, keystore_path

if TYPE_CHECKING:
    from node.storage.state_folder import StateFolder


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """A node's wallet and state folder."""

    wallet: str
    state: Path


def state_folders() -> Iterator[Path]:
    """The folders in the home folder in which nodes keep their state."""
    yield home() / "node"
    yield from sorted((home() / "nodes").glob("*"))


def choose_identity(file: Path, wallet: str, contract: str | None, *, named: bool, quiet: bool) -> NodeIdentity:
    """The wallet and the state folder for the config `file` on the market of `contract` (None if that is unknown).

    A wallet that serves another node of this market is not used: another one is asked for, or made if the wallet was not `named`.
    The state that this wallet has on this market is kept. Raises BadMessage.
    """
    from node.storage.state_folder import find_states

    states = find_states([*state_folders(), *_former_state(file)])
    while (other := _other_node(states, file, wallet, contract)) is not None:
        text = (
            f"the wallet {wallet} serves another node already: {_describe(other)}. Two nodes with one wallet would sign one "
            "receipt number twice, which costs the stake"
        )
        free = _free_wallet(file)
        if quiet and named:
            raise BadMessage(f"{text}; name another wallet, which is made if it does not exist: --wallet {free}")
        note(text)
        wallet = free if quiet else ask("Wallet for this node", free, _wallet_name, instead="name it with --wallet")
    own = _own_state(states, file, wallet, contract)
    if own is not None:
        step(f"this node continues with the state in {own.path}")
        return NodeIdentity(wallet, own.path)
    taken = {state.path for state in states}
    names = (home() / "nodes" / name for name in _names(file))
    return NodeIdentity(wallet, next(path for path in names if path not in taken))


def open_wallet_address(name: str, password_file: Path | None) -> Address:
    """The address of a wallet, which is made if it does not exist. Raises BadMessage."""
    path = keystore_path(name)
    if not path.exists():
        create_keystore(path, find_password(password_file, lambda: choose_password(name)))
        step(f"made wallet {name} in {path}; keep the file and its password safe: the wallet signs for your money")
    return parse_address(keystore_address(path))


async def choose_deployment(given: Path | None, coordinator: str, rpc: str | None, state: Path) -> Path:
    """The deployment file of the coordinator's market, which is fetched if it is missing and can be had now.

    Without a `given` file it is the home folder's; if that is of another market, the file is in the node's state folder.
    """
    path = given or default_deployment_file()
    try:
        if given is None and _exists(path) and await matches_coordinator(path, coordinator) is False:
            path = state / "deployment.json"
        await ensure_deployment_file(path, coordinator, rpc)
    except TallyError as error:
        endpoint = "" if is_local(coordinator) or rpc else ", once `rpc` in the config names the chain's endpoint"
        note(f"still missing: {error}")
        note(f"`tally node run` fetches it{endpoint}")
    return path.expanduser().absolute()


def _exists(path: Path) -> bool:
    return path.exists()


def _former_state(file: Path) -> list[Path]:
    """The state folder that an existing config names."""
    from node.service.config import load_config

    try:
        return [load_config(file, environment={}).state] if file.exists() else []
    except TallyError:
        return []


def _own_state(states: list[StateFolder], file: Path, wallet: str, contract: str | None) -> StateFolder | None:
    address = _address(wallet)
    own = (state for state in states if state.provider == address and _same_market(state, contract) and address is not None)
    return next(own, None) or next(
        (state for state in states if state.config == file.absolute() and state.provider is None), None
    )


def _other_node(states: list[StateFolder], file: Path, wallet: str, contract: str | None) -> StateFolder | None:
    """Another node of this machine that uses the wallet on this market."""
    address = _address(wallet)
    if address is None:
        return None
    for state in states:
        foreign = state.config != file.absolute() if state.config is not None else state.running is not None
        if state.provider == address and _same_market(state, contract) and foreign:
            return state
    return None


def _same_market(state: StateFolder, contract: str | None) -> bool:
    return None in (state.contract, contract) or state.contract == contract


def _describe(state: StateFolder) -> str:
    config = f"config {state.config}, " if state.config is not None else ""
    running = f", running as process {state.running}" if state.running else ""
    return f"{config}state {state.path}{running}"


def _address(wallet: str) -> str | None:
    path = keystore_path(wallet)
    return keystore_address(path) if path.exists() else None


def _names(file: Path) -> Iterator[str]:
    """Names for a node, after its config file."""
    yield file.stem
    yield from (f"{file.stem}-{number}" for number in count(2))


def _free_wallet(file: Path) -> str:
    return next(name for name in _names(file) if not keystore_path(name).exists())


def _wallet_name(text: str) -> str:
    if not text or text.startswith(("0x", "0X")):
        raise BadMessage(f"wallet: expected the name of a wallet or a keystore file, got {text[:60]!r}")
    return text
