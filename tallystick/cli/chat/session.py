"""A conversation at the terminal: a line to write in that remembers, and commands that begin with a slash."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.markup import escape

from tallystick.cli.chat.conversations import Conversation
from tallystick.cli.output import err, harmless, show_facts, show_rows
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Amount, format_amount
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from tallystick.cli.chat.chat_options import ChatOptions
    from tallystick.cli.chat.turn import Turns
    from tallystick.client.sdk.market import Market

HELP = (
    ("/help", "this"),
    ("/model NAME", "from now on ask this model; without a name, which one it is"),
    ("/models", "what is on offer, and at which price"),
    ("/system TEXT", "set the system prompt; without a text, show it; - takes it away"),
    ("/cost", "what was paid so far"),
    ("/new", "begin another conversation"),
    ("/exit", "leave; so do Ctrl-D, and Ctrl-C on an empty line"),
    ("Ctrl-C", "stops an answer; what came of it is paid, and its price is shown"),
)
IMPATIENT_SECONDS = 1.0
"""Ctrl-C again so soon after one that stopped an answer is not meant to end the conversation."""
_COMMANDS = tuple(name.split()[0] for name, _ in HELP if name.startswith("/"))


class _Leave(Exception):
    """Ends the conversation."""


class Session:
    """A person at a terminal, talking."""

    def __init__(self, market: Market, turns: Turns, manner: ChatOptions) -> None:
        self._market, self._turns, self._manner = market, turns, manner
        self._models: list[str] = []
        self._commands: dict[str, Callable[[str], Awaitable[None]]] = {
            "/help": self._help,
            "/model": self._model,
            "/models": self._list_models,
            "/system": self._system,
            "/cost": self._cost,
            "/new": self._new,
            "/exit": self._exit,
            "/quit": self._exit,
        }

    def names(self) -> Iterable[str]:
        """Models that were seen on offer."""
        return self._models

    async def hear(self, text: str) -> None:
        """Does what a line says. Raises _Leave where it says to go; errors of the market are told and not the end."""
        try:
            if text.startswith("/"):
                name, _, rest = text.partition(" ")
                if (command := self._commands.get(name)) is None:
                    err.print(f"no command {escape(name)}; /help tells which there are", highlight=False)
                else:
                    await command(rest.strip())
            else:
                await self._turns.take(text)
                self._keep()
        except TallyError as error:
            err.print(f"[red]error:[/] {escape(str(error))}", highlight=False)

    def _keep(self) -> None:
        talk = self._turns.talk
        if self._manner.keep and talk.messages:
            talk.save()

    async def _help(self, _rest: str) -> None:
        show_facts(HELP)

    async def _model(self, name: str) -> None:
        talk = self._turns.talk
        if name:
            await self._look()
            known = {*self._models, *(alias.name for alias in self._market.config.aliases)}
            if name not in known:
                err.print(f"nobody sells {escape(name)} here now; on offer: {escape(', '.join(sorted(known)))}", highlight=False)
                return
            talk.model = name
        err.print(f"model: {escape(harmless(talk.model))}", highlight=False)

    async def _look(self) -> None:
        self._models = [one.id for one in await self._market.models()]

    async def _list_models(self, _rest: str) -> None:
        found = await self._market.models()
        self._models = [one.id for one in found]
        rows = [
            (one.id, one.live, *map(format_amount, (Amount(one.input_price), Amount(one.output_price))), one.context_tokens)
            for one in found
        ]
        show_rows(("model", "free", "in, $/M tokens", "out, $/M tokens", "context"), rows)

    async def _system(self, text: str) -> None:
        talk = self._turns.talk
        if text:
            talk.system = "" if text == "-" else text
        err.print(f"system prompt: {escape(harmless(talk.system)) or 'none'}", highlight=False)

    async def _cost(self, _rest: str) -> None:
        talk = self._turns.talk
        tokens = f"{talk.input_tokens} + {talk.output_tokens} tokens"
        answers = f"{talk.answers} answer{'' if talk.answers == 1 else 's'}"
        whole = f"{answers}, {format_amount(Amount(talk.cost))} dollars, {tokens}"
        show_facts([("since you started", self._turns.summary()), ("this conversation", whole)])

    async def _new(self, _rest: str) -> None:
        talk = Conversation(self._turns.talk.model)
        talk.system = self._turns.talk.system
        self._turns.talk = talk
        err.print("a new conversation", highlight=False)

    async def _exit(self, _rest: str) -> None:
        raise _Leave


async def converse(market: Market, turns: Turns, manner: ChatOptions) -> None:
    """Talks until the person leaves, then says what it cost."""
    session = Session(market, turns, manner)
    line: PromptSession[str] = PromptSession(
        history=_history(manner), auto_suggest=AutoSuggestFromHistory(), completer=_Slash(session.names)
    )
    talk = turns.talk
    err.print(f"[dim]{escape(harmless(talk.model))}; /help tells what you can do, Ctrl-D leaves[/]", highlight=False)
    if talk.title:
        err.print(f"[dim]going on with: {escape(harmless(talk.title))}[/]", highlight=False)
    while True:
        try:
            text = (await line.prompt_async(HTML("<b><ansicyan>you ></ansicyan></b> "))).strip()
            if text:
                await session.hear(text)
        except KeyboardInterrupt:
            impatient = time.monotonic() - turns.stopped_at < IMPATIENT_SECONDS
            if not line.default_buffer.text and not impatient:
                break
        except (EOFError, _Leave):
            break
    err.print(f"[dim]{turns.summary()}[/]", highlight=False)
    if manner.keep and turns.talk.messages:
        err.print(f"[dim]go on later with: tally chat --resume {turns.talk.id}[/]", highlight=False)


def _history(manner: ChatOptions) -> History:
    """What was typed, in the home folder, for its owner only."""
    if not manner.keep:
        return InMemoryHistory()
    path: Path = home() / "chats" / "prompts"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    path.chmod(0o600)
    return FileHistory(path)


class _Slash(Completer):
    """Completes commands, and the models that were listed."""

    def __init__(self, models: Callable[[], Iterable[str]]) -> None:
        self._models = models

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:  # noqa: ARG002
        """As prompt_toolkit asks for them."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, rest = text.partition(" ")
        if not space:
            yield from (Completion(one, -len(name)) for one in _COMMANDS if one.startswith(name))
        elif name == "/model":
            yield from (Completion(one, -len(rest)) for one in self._models() if one.startswith(rest))
