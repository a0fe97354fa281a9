"""`tally chat`: one question or a conversation in the terminal, with the price of each answer."""

from __future__ import annotations

import asyncio
import os
import select
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.chat.chat_options import ChatOptions
from tallystick.cli.chat.conversations import LAST, Conversation, complete_ids, folder, newest
from tallystick.cli.options import DEFAULT_WALLET, Config, CoordinatorUrl, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import err, show_json, show_table, step
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.sdk.market import Market
    from tallystick.protocol.eip712 import Signer

MAX_LISTED = 50
EXIT_INTERRUPTED = 130
SILENCE_SECONDS = 2.0
"""Wait for piped input after which a message says what the command waits for."""
Prompt = Annotated[str | None, typer.Argument(help="Question; precedes piped input. Without either, a conversation starts.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Model; default: the first one on offer.")]
System = Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Maximum length of an answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option("--temperature", "-t", min=0, max=2, help="Sampling temperature.")]
Resume = Annotated[
    str | None,
    typer.Option("--resume", "-r", help=f'Continue a conversation: its id, or "{LAST}".', autocompletion=complete_ids),
]
Listing = Annotated[bool, typer.Option("--list", "-l", help="List the saved conversations.")]
NoHistory = Annotated[bool, typer.Option("--no-history", help="Save neither prompts nor answers.")]
Plain = Annotated[bool, typer.Option("--plain", help="Show answers as plain text instead of rendered Markdown.")]
SaveProof = Annotated[
    Path | None,
    typer.Option("--save-proof", help="File for the answer's proof (with the plaintext); check it with `tally receipt verify`."),
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
    coordinator_url: CoordinatorUrl = None,
    save_proof: SaveProof = None,
    as_json: Json = False,
) -> None:
    """Chat with a model on the market; each answer shows its cost. Also works in pipes: `cat file | tally chat "summarise"`.

    In a conversation, Ctrl-C stops an answer and /help lists the commands. Conversations are saved in the home folder for
    --resume.
    """
    from tallystick.client.config import load_config

    if listing:
        _list(as_json=as_json)
        return
    given = {"max_tokens": max_tokens, "temperature": temperature}
    parameters = {name: value for name, value in given.items() if value is not None}
    options = ChatOptions(parameters, save_proof, plain, as_json, keep_history=not no_history)
    loaded = load_config(config, {"coordinator": coordinator_url})
    question = _question(prompt, loaded.max_body_bytes)
    if question is None and as_json:
        raise BadMessage("--json: needs a prompt, as an argument or piped in")
    resumed = None if resume is None else Conversation.load(resume)
    signer = unlock(wallet, password_file)
    with asyncio.Runner() as runner:
        runner.run(_chat(loaded, signer, options, question, resumed, model, system))


async def _chat(
    config: ClientConfig,
    signer: Signer,
    options: ChatOptions,
    question: str | None,
    resumed: Conversation | None,
    model: str | None,
    system: str | None,
) -> None:
    from tallystick.cli.chat.turn import Turns
    from tallystick.client.sdk.market import Market

    async with Market.of(config, signer) as market:
        conversation = resumed or Conversation(model or await first_model(market))
        conversation.model = model or conversation.model
        if system is not None:
            conversation.system = system
        turns = Turns(market, options, conversation)
        if question is None:
            from tallystick.cli.chat.session import converse

            await converse(market, turns, options)
            return
        interrupted = await turns.take(question)
        if options.keep_history and resumed is not None:
            conversation.save()
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


async def first_model(market: Market) -> str:
    """The first model on offer. Raises Refusal if there is none, Unavailable."""
    models = await market.models()
    if not models:
        raise Refusal(Code.NO_PROVIDER, "no provider is connected to this coordinator; try later, or another --coordinator")
    return models[0].id


def _question(prompt: str | None, max_bytes: int) -> str | None:
    """The prompt followed by piped input; None if a person at a terminal is to be asked. Raises BadMessage."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):  # stdin is missing or replaced
        descriptor = -1
    if descriptor < 0 or os.isatty(descriptor):
        return prompt
    mode = os.fstat(descriptor).st_mode
    piped = ""
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
        if not select.select([descriptor], [], [], SILENCE_SECONDS)[0]:
            err.print("[dim]waiting for the end of the piped input …[/]")
        raw = sys.stdin.buffer.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise BadMessage(f"stdin: expected at most {max_bytes} bytes, the limit of a request, got more")
        piped = raw.decode(errors="replace").strip()
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text:
        raise BadMessage("the prompt is empty: give one as an argument, pipe one in, or run the command in a terminal")
    return text


def _list(*, as_json: bool) -> None:
    conversations = newest(MAX_LISTED)
    if as_json:
        show_json([_json(conversation) for conversation in conversations])
    elif conversations:
        rows = [(talk.id, talk.model, talk.answers, format_amount(Amount(talk.cost)), talk.title) for talk in conversations]
        columns = ("id", "model", "answers", "dollars", "first question")
        show_table(columns, rows, title=f"Conversations in {folder()}")
        step(f"continue one with: tally chat --resume ID (or {LAST})")
    else:
        step("no saved conversation; start one with: tally chat")


def _json(conversation: Conversation) -> dict[str, object]:
    return {
        "id": conversation.id,
        "model": conversation.model,
        "answers": conversation.answers,
        "inputTokens": conversation.input_tokens,
        "outputTokens": conversation.output_tokens,
        "cost": str(conversation.cost),
        "title": conversation.title,
    }
