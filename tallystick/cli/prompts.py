"""Questions to a person: each is asked again until its answer can be used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import typer

from tallystick.cli.output import note
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.keystore import PASSWORD_HELP

T = TypeVar("T")
MIN_PASSWORD = 8


def ask(question: str, default: str, read: Callable[[str], T], *, instead: str) -> T:
    """The answer to a question, read by `read`; asked again if that raises BadMessage.

    Raises BadMessage if there is nobody to answer; `instead` says which option gives the answer.
    """
    while True:
        try:
            answer = typer.prompt(question, default=default, err=True)
        except typer.Abort:
            if sys.stdin.isatty():
                raise
            raise BadMessage(
                f"no answer to {question!r}, because stdin has ended: {instead}, or accept the defaults with --yes"
            ) from None
        try:
            return read(str(answer).strip())
        except BadMessage as error:
            note(f"{error}; try again")


def choose_password(wallet: str) -> str:
    """A new password for a wallet, asked for twice without echo. Raises BadMessage if stdin is no terminal."""
    if not sys.stdin.isatty():
        raise BadMessage(f"wallet {wallet} needs a password: {PASSWORD_HELP}")
    note(
        f"Choose a password for the wallet {wallet}: at least {MIN_PASSWORD} characters. It encrypts the key on this disk, and "
        "nobody can reset it."
    )
    while True:
        password = str(typer.prompt("New password", hide_input=True, err=True))
        if len(password) < MIN_PASSWORD:
            note(f"expected at least {MIN_PASSWORD} characters, got {len(password)}; try again")
        elif typer.prompt("The same password again", hide_input=True, err=True) != password:
            note("the two passwords differ; try again")
        else:
            return password
