"""`tally chat`: a question or a conversation in the terminal, each answer with its price."""

from __future__ import annotations

import asyncio
import os
import select
import stat
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.chat.chat_options import ChatOptions
from tallystick.cli.chat.conversations import LAST, Conversation, folder, ids, newest
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import err, show_json, show_rows, step
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.sdk.market import Market
    from tallystick.protocol.eip712 import Signer

MOST_LISTED = 50
INTERRUPTED = 130
SILENCE_SECONDS = 2.0
"""After which a person is told what is waited for."""
Prompt = Annotated[str | None, typer.Argument(help="What to say, before what is piped in; without both a conversation starts.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Model to use; the only or first one on offer by default.")]
System = Annotated[str | None, typer.Option("--system", "-s", help="The system prompt.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="The most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option("--temperature", "-t", min=0, max=2, help="How much chance is in an answer.")]
Resume = Annotated[
    str | None, typer.Option("--resume", "-r", help=f'Take up a conversation: its id, or "{LAST}".', autocompletion=ids)
]
Listing = Annotated[bool, typer.Option("--list", "-l", help="List the conversations that are kept.")]
NoHistory = Annotated[bool, typer.Option("--no-history", help="Keep nothing of this: neither prompts nor answers.")]
Plain = Annotated[bool, typer.Option("--plain", help="Show answers as they come, not as rendered markdown.")]
Save = Annotated[
    Path | None,
    typer.Option("--save-proof", help="Write the answer's proof there, for `tally receipt verify`. It has the plaintext."),
]


def chat(
    prompt: Prompt = None,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    resume: Resume = None,
    listing: Listing = False,
    no_history: NoHistory = False,
    plain: Plain = False,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    coordinator_url: Annotated[str | None, typer.Option("--coordinator", help="The coordinator's address.")] = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Talks to a model on the market and shows what each answer cost; `cat file | tally chat "summarise"` works, too.

    In a conversation Ctrl-C stops an answer, /help tells the rest. Conversations are kept in the home folder, for --resume.
    """
    from tallystick.client.config import load_config

    if listing:
        _list(as_json=as_json)
        return
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    manner = ChatOptions(options, save, plain, as_json, keep=not no_history)
    loaded = load_config(config, {"coordinator": coordinator_url})
    text = _question(prompt, loaded.max_body_bytes)
    if text is None and as_json:
        raise BadMessage("--json: needs a prompt, as an argument or piped in")
    past = None if resume is None else Conversation.load(resume)
    signer = unlock(wallet, password_file)
    with asyncio.Runner() as runner:
        runner.run(_talk(loaded, signer, manner, text, past, model, system))


async def _talk(
    config: ClientConfig,
    signer: Signer,
    manner: ChatOptions,
    text: str | None,
    past: Conversation | None,
    model: str | None,
    system: str | None,
) -> None:
    from tallystick.cli.chat.turn import Turns
    from tallystick.client.sdk.market import Market

    async with Market.of(config, signer) as market:
        talk = past or Conversation(model or await first_model(market))
        talk.model = model or talk.model
        if system is not None:
            talk.system = system
        turns = Turns(market, manner, talk)
        if text is None:
            from tallystick.cli.chat.session import converse

            await converse(market, turns, manner)
            return
        stopped = await turns.take(text)
        if manner.keep and past is not None:
            talk.save()
    if stopped:
        raise typer.Exit(INTERRUPTED)


async def first_model(market: Market) -> str:
    """The only or first one on offer. Raises Refusal, Unavailable."""
    models = await market.models()
    if not models:
        raise Refusal(Code.NO_PROVIDER, "no provider is connected to this coordinator")
    return models[0].id


def _question(prompt: str | None, most: int) -> str | None:
    """The prompt with what is piped in, if anything; None where a person at a terminal is to be asked. Raises BadMessage."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):  # there is none, or a stand-in
        descriptor = -1
    if descriptor < 0 or os.isatty(descriptor):
        return prompt
    mode = os.fstat(descriptor).st_mode
    piped = ""
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
        if not select.select([descriptor], [], [], SILENCE_SECONDS)[0]:
            err.print("[dim]waiting for the end of what is piped in …[/]")
        raw = sys.stdin.buffer.read(most + 1)
        if len(raw) > most:
            raise BadMessage(f"stdin: more than {most} bytes, which no request takes")
        piped = raw.decode(errors="replace").strip()
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text:
        raise BadMessage("nothing to say: give a prompt, pipe one in, or run it in a terminal")
    return text


def _list(*, as_json: bool) -> None:
    found = newest(MOST_LISTED)
    if as_json:
        keep = ("id", "model", "answers", "input_tokens", "output_tokens")
        show_json([{k: asdict(one)[k] for k in keep} | {"cost": str(one.cost), "title": one.title} for one in found])
    elif found:
        rows = [(one.id, one.model, one.answers, format_amount(Amount(one.cost)), one.title) for one in found]
        show_rows(("id", "model", "answers", "dollars", "began with"), rows, title=f"Kept in {folder()}", keyed=True)
        step("take one up with: tally chat --resume ID (or last)")
    else:
        step("no conversation is kept yet; start one with: tally chat")
