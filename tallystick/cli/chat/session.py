"""An interactive conversation: a prompt with history and completion, and slash commands."""

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
from tallystick.cli.output import dollars, err, show_fields, show_table, strip_control
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import format_amount
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from tallystick.cli.chat.chat_options import ChatOptions
    from tallystick.cli.chat.turn import Turns
    from tallystick.client.coordinator.model_offers import ModelOffer
    from tallystick.client.sdk.market import Market

HELP = (
    ("/help", "show this list"),
    ("/model NAME", "switch to this model; without a name, show the current one"),
    ("/models", "list the models on offer, with their prices"),
    ("/system TEXT", "set the system prompt; without a text, show it; - removes it"),
    ("/cost", "show what was paid so far"),
    ("/new", "start another conversation"),
    ("/exit", "leave (also: Ctrl-D, or Ctrl-C on an empty line)"),
    ("Ctrl-C", "stop an answer; the part that arrived is paid for, and its cost is shown"),
)
DOUBLE_INTERRUPT_SECONDS = 1.0
"""A second Ctrl-C this soon after one that stopped an answer does not end the conversation."""
_COMMANDS = tuple(name.split()[0] for name, _ in HELP if name.startswith("/"))


class _Leave(Exception):
    """Ends the conversation."""


class Session:
    """Handles the lines of one conversation."""

    def __init__(self, market: Market, turns: Turns, options: ChatOptions) -> None:
        self._market, self._turns, self._options = market, turns, options
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
        """Names of the models that the market listed last."""
        return self._models

    async def handle(self, text: str) -> None:
        """Runs a slash command or asks the model. Prints a TallyError and goes on. Raises _Leave for /exit."""
        try:
            if text.startswith("/"):
                name, _, rest = text.partition(" ")
                if (command := self._commands.get(name)) is None:
                    err.print(f"no command {escape(name)}; /help lists them", highlight=False)
                else:
                    await command(rest.strip())
            else:
                await self._turns.take(text)
                self._save()
        except TallyError as error:
            err.print(f"[red]error:[/] {escape(str(error))}", highlight=False)

    def _save(self) -> None:
        conversation = self._turns.conversation
        if self._options.keep_history and conversation.messages:
            conversation.save()

    async def _help(self, _rest: str) -> None:
        show_fields(HELP)

    async def _model(self, name: str) -> None:
        conversation = self._turns.conversation
        if name:
            await self._list()
            known = {*self._models, *(alias.name for alias in self._market.config.aliases)}
            if name not in known:
                err.print(
                    f"no provider sells {escape(name)} here now; on offer: {escape(', '.join(sorted(known)))}", highlight=False
                )
                return
            conversation.model = name
        err.print(f"model: {escape(strip_control(conversation.model))}", highlight=False)

    async def _list(self) -> list[ModelOffer]:
        offers = await self._market.models()
        self._models = [offer.id for offer in offers]
        return offers

    async def _list_models(self, _rest: str) -> None:
        rows = [
            (offer.id, offer.live, *map(format_amount, (offer.input_price, offer.output_price)), offer.context_tokens)
            for offer in await self._list()
        ]
        show_table(("model", "free providers", "input", "output", "context"), rows, title="Prices in dollars per million tokens")

    async def _system(self, text: str) -> None:
        conversation = self._turns.conversation
        if text:
            conversation.system = "" if text == "-" else text
        err.print(f"system prompt: {escape(strip_control(conversation.system)) or 'none'}", highlight=False)

    async def _cost(self, _rest: str) -> None:
        conversation = self._turns.conversation
        tokens = f"{conversation.input_tokens} + {conversation.output_tokens} tokens"
        answers = f"{conversation.answers} answer{'' if conversation.answers == 1 else 's'}"
        total = f"{answers}, {dollars(conversation.cost)}, {tokens}"
        show_fields([("since you started", self._turns.summary()), ("this conversation", total)])

    async def _new(self, _rest: str) -> None:
        conversation = Conversation(self._turns.conversation.model)
        conversation.system = self._turns.conversation.system
        self._turns.conversation = conversation
        err.print("new conversation", highlight=False)

    async def _exit(self, _rest: str) -> None:
        raise _Leave


async def converse(market: Market, turns: Turns, options: ChatOptions) -> None:
    """Reads lines until the user leaves, then shows what the conversation cost."""
    session = Session(market, turns, options)
    line: PromptSession[str] = PromptSession(
        history=_history(options), auto_suggest=AutoSuggestFromHistory(), completer=_Slash(session.names)
    )
    conversation = turns.conversation
    err.print(f"[dim]{escape(strip_control(conversation.model))}; /help lists the commands, Ctrl-D leaves[/]", highlight=False)
    if conversation.title:
        err.print(f"[dim]continuing: {escape(strip_control(conversation.title))}[/]", highlight=False)
    while True:
        try:
            text = (await line.prompt_async(HTML("<b><ansicyan>you ></ansicyan></b> "))).strip()
            if text:
                await session.handle(text)
        except KeyboardInterrupt:
            repeated = time.monotonic() - turns.stopped_at < DOUBLE_INTERRUPT_SECONDS
            if not line.default_buffer.text and not repeated:
                break
        except (EOFError, _Leave):
            break
    err.print(f"[dim]{turns.summary()}[/]", highlight=False)
    if options.keep_history and turns.conversation.messages:
        err.print(f"[dim]continue later with: tally chat --resume {turns.conversation.id}[/]", highlight=False)


def _history(options: ChatOptions) -> History:
    """The history of typed lines: a file of mode 0600 in the home folder, or in memory if nothing is to be kept."""
    if not options.keep_history:
        return InMemoryHistory()
    path: Path = home() / "chats" / "prompts"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    path.chmod(0o600)
    return FileHistory(path)


class _Slash(Completer):
    """Completes slash commands and model names."""

    def __init__(self, models: Callable[[], Iterable[str]]) -> None:
        self._models = models

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:  # noqa: ARG002
        """Yields completions for prompt_toolkit."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, rest = text.partition(" ")
        if not space:
            yield from (Completion(command, -len(name)) for command in _COMMANDS if command.startswith(name))
        elif name == "/model":
            yield from (Completion(model, -len(rest)) for model in self._models() if model.startswith(rest))
