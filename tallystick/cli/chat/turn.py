"""Turns of a conversation: each sends a question, shows the streamed answer, and adds up what it cost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tallystick.cli.chat.screen import open_screen
from tallystick.cli.output import dollars, err, out, outcome_words, show_json, step
from tallystick.protocol.errors import Code, Refusal

if TYPE_CHECKING:
    from tallystick.cli.chat.chat_options import ChatOptions
    from tallystick.cli.chat.conversations import Conversation
    from tallystick.client.jobs.job import Job
    from tallystick.client.jobs.result import Result
    from tallystick.client.sdk.market import Market
    from tallystick.protocol.queue_place import QueuePlace

CHAT = "/v1/chat/completions"


class Turns:
    """The turns of this run of a conversation, and their total cost."""

    def __init__(self, market: Market, options: ChatOptions, conversation: Conversation) -> None:
        self.market, self.options, self.conversation = market, options, conversation
        self.answers = self.cost = self.input_tokens = self.output_tokens = 0
        self.stopped_at = float("-inf")
        """Monotonic time at which Ctrl-C last stopped an answer."""

    async def take(self, question: str) -> bool:
        """Sends a question and shows the answer. Returns whether Ctrl-C stopped it. The question, and the part of the answer that
        arrived, join the conversation.

        Raises TallyError; then the messages of the conversation are unchanged, and its cost includes what was paid.
        """
        loop = asyncio.get_running_loop()
        turn = asyncio.create_task(self._answer(question))
        loop.add_signal_handler(signal.SIGINT, _cancel_once(turn))
        try:
            answer, stopped = await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                raise
            err.print("[yellow]stopped[/] before an answer arrived; see if it cost anything: tally job list", highlight=False)
            return True
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            if turn.cancelled() or (turn.done() and not turn.exception() and turn.result()[1]):
                self.stopped_at = time.monotonic()
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        self.conversation.messages += messages if answer else []
        return stopped

    async def _answer(self, question: str) -> tuple[str, bool]:
        from tallystick.client.jobs.job import run_of
        from tallystick.client.jobs.result import require_success

        options = self.options
        messages = [*self.conversation.messages, {"role": "user", "content": question}]
        body = {"model": self.conversation.model, "messages": messages, "stream": not options.as_json} | options.parameters
        parts: list[str] = []
        stopped = False
        async with await self.market.submit(CHAT, body, keep=options.proof_file is not None) as job:
            run_of(job).on_place = _show_place
            try:
                if options.as_json:
                    result: Result | None = require_success(await job.result())
                    parts.append(result.text if result else "")
                else:
                    await job.start()
                    with open_screen(out, plain=options.plain) as screen:
                        async for text in job.text():
                            parts.append(text)
                            screen.write(text)
                    result = await job.result()
            except asyncio.CancelledError:
                _uncancel()
                stopped, result = True, await job.cancel()
            if not stopped:
                _save_proof(job, options.proof_file)
        self._report(job, result, "".join(parts), stopped=stopped)
        return "".join(parts), stopped

    def _report(self, job: Job, result: Result | None, text: str, *, stopped: bool) -> None:
        """Adds the cost that the receipt states, and shows it."""
        if result is not None:
            usage = result.usage
            self.conversation.add_cost(result.cost, usage.input, usage.output)
            self.answers += 1
            self.cost += int(result.cost)
            self.input_tokens += usage.input
            self.output_tokens += usage.output
        if self.options.as_json:
            show_json(self._json(job, result, text))
        elif result is None or result.receipt is None:
            err.print(
                f"[yellow]{'stopped' if stopped else 'done'}[/]; the receipt has not arrived yet: tally job show {job.id.hex()}",
                highlight=False,
            )
        else:
            cost = f"{dollars(result.cost)} for {result.usage.input} + {result.usage.output} tokens"
            prefix = "stopped; paid " if stopped else ""
            line = f"{prefix}{cost}, provider {result.provider}, {outcome_words(result.outcome.name.lower())}"
            err.print(f"[dim]{line}[/]", highlight=False, soft_wrap=True)

    def _json(self, job: Job, result: Result | None, text: str) -> dict[str, object]:
        fields: dict[str, object] = {"text": text, "model": self.conversation.model, "job": job.id.hex()}
        if result is None or result.receipt is None:
            return fields | {"cost": None, "provider": job.provider, "outcome": None, "usage": None}
        usage = {"input": result.usage.input, "cached": result.usage.cached, "output": result.usage.output}
        outcome = result.outcome.name.lower()
        return fields | {"cost": str(int(result.cost)), "provider": result.provider, "outcome": outcome, "usage": usage}

    def summary(self) -> str:
        """The total cost of this run, in words."""
        answers = f"{self.answers} answer{'' if self.answers == 1 else 's'}"
        return f"{answers}, {dollars(self.cost)}, {self.input_tokens} + {self.output_tokens} tokens"


def _show_place(place: QueuePlace) -> None:
    """Says why nothing happens yet."""
    err.print(f"[dim]all providers are busy; number {place.position} in the queue{place.words}[/]", highlight=False)


def _cancel_once(turn: asyncio.Task[tuple[str, bool]]) -> Callable[[], None]:
    """A signal handler that cancels the turn the first time only: the wait for the receipt that follows is bounded."""
    cancelled = False

    def cancel() -> None:
        nonlocal cancelled
        if not cancelled:
            cancelled = True
            turn.cancel()

    return cancel


def _uncancel() -> None:
    """Withdraws the cancellation of the current asyncio task, which goes on to fetch the receipt."""
    if (current := asyncio.current_task()) is not None:
        current.uncancel()


def _save_proof(job: Job, path: Path | None) -> None:
    """Writes the job's proof, if a file was given. Raises Refusal if there is no proof."""
    from tallystick.runtime.keystore import write_private

    if path is None:
        return
    if job.proof is None:
        raise Refusal(
            Code.BODY_TOO_LARGE, "--save-proof: the answer has no receipt or is too long to be kept, so there is no proof to save"
        )
    write_private(path.absolute(), job.proof.dumps())
    step(f"saved the answer's proof in {path}; check it with: tally receipt verify {path}")
