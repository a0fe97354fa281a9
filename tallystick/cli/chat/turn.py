"""One turn of a conversation: a question goes out, the answer comes in, and what it cost is told and added up."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tallystick.cli.chat.screen import choose
from tallystick.cli.output import err, out, show_json, step
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from tallystick.cli.chat.chat_options import ChatOptions
    from tallystick.cli.chat.conversations import Conversation
    from tallystick.client.jobs.job import Job
    from tallystick.client.jobs.result import Result
    from tallystick.client.sdk.market import Market

CHAT = "/v1/chat/completions"


class Turns:
    """The turns of one conversation, and what they cost together."""

    def __init__(self, market: Market, manner: ChatOptions, talk: Conversation) -> None:
        self.market, self.manner, self.talk = market, manner, talk
        self.answers = self.cost = self.input_tokens = self.output_tokens = 0
        self.stopped_at = float("-inf")
        """When Ctrl-C last stopped an answer, by the monotonic clock."""

    async def take(self, text: str) -> bool:
        """Asks, and shows the answer; true if Ctrl-C stopped it. Question and answer, as far as it came, join the conversation.

        Raises TallyError; then the conversation is as it was, but for what was paid.
        """
        loop = asyncio.get_running_loop()
        turn = asyncio.create_task(self._answer(text))
        loop.add_signal_handler(signal.SIGINT, _once(turn))
        try:
            answer, stopped = await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                raise
            err.print("[yellow]stopped[/] before anything came; `tally job list` tells if it cost anything", highlight=False)
            return True
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            if turn.cancelled() or (turn.done() and not turn.exception() and turn.result()[1]):
                self.stopped_at = time.monotonic()
        question = {"role": "user", "content": text}
        self.talk.messages += [question, {"role": "assistant", "content": answer}] if answer else []
        return stopped

    async def _answer(self, question: str) -> tuple[str, bool]:
        from tallystick.client.jobs.result import require_success

        manner = self.manner
        messages = [*self.talk.messages, {"role": "user", "content": question}]
        body = {"model": self.talk.model, "messages": messages, "stream": not manner.as_json} | manner.options
        parts: list[str] = []
        stopped = False
        async with await self.market.submit(CHAT, body, keep=manner.save is not None) as job:
            try:
                if manner.as_json:
                    ended: Result | None = require_success(await job.result())
                    parts.append(ended.text if ended else "")
                else:
                    await job.start()
                    with choose(out, plain=manner.plain) as screen:
                        async for text in job.text():
                            parts.append(text)
                            screen.write(text)
                    ended = await job.result()
            except asyncio.CancelledError:
                _keep_going()
                stopped, ended = True, await job.cancel()
            if not stopped:
                _save(job, manner.save)
        self._tell(job, ended, "".join(parts), stopped=stopped)
        return "".join(parts), stopped

    def _tell(self, job: Job, ended: Result | None, text: str, *, stopped: bool) -> None:
        """What was paid, from the receipt, and for what."""
        if ended is not None:
            used = ended.usage
            self.talk.bill(ended.cost, used.input, used.output)
            self.answers += 1
            self.cost += int(ended.cost)
            self.input_tokens += used.input
            self.output_tokens += used.output
        if self.manner.as_json:
            show_json(self._as_json(job, ended, text))
        elif ended is None or ended.receipt is None:
            err.print(
                f"[yellow]{'stopped' if stopped else 'done'}[/]; its receipt is not here yet: tally job show {job.id.hex()}",
                highlight=False,
            )
        else:
            spent = f"{format_amount(ended.cost)} for {ended.usage.input} + {ended.usage.output} tokens"
            said = f"{'stopped; paid ' if stopped else ''}{spent}, provider {ended.provider}, {ended.outcome.name.lower()}"
            err.print(f"[dim]{said}[/]", highlight=False, soft_wrap=True)

    def _as_json(self, job: Job, ended: Result | None, text: str) -> dict[str, object]:
        told: dict[str, object] = {"text": text, "model": self.talk.model, "job": job.id.hex()}
        if ended is None or ended.receipt is None:
            return told | {"cost": None, "provider": job.provider, "outcome": None, "usage": None}
        used = {"input": ended.usage.input, "cached": ended.usage.cached, "output": ended.usage.output}
        outcome = ended.outcome.name.lower()
        return told | {"cost": str(int(ended.cost)), "provider": ended.provider, "outcome": outcome, "usage": used}

    def summary(self) -> str:
        """What this run of the conversation cost."""
        answers = f"{self.answers} answer{'' if self.answers == 1 else 's'}"
        return f"{answers}, {format_amount(Amount(self.cost))} dollars, {self.input_tokens} + {self.output_tokens} tokens"


def _once(turn: asyncio.Task[tuple[str, bool]]) -> Callable[[], None]:
    """A handler that stops the turn the first time: the wait for the receipt is bounded, and is not to be cut short."""
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            turn.cancel()

    return stop


def _keep_going() -> None:
    """Takes the cancelling of this task back, since it goes on to fetch the receipt."""
    if (task := asyncio.current_task()) is not None:
        task.uncancel()


def _save(job: Job, path: Path | None) -> None:
    """Writes the job's proof, if it was asked for."""
    from tallystick.runtime.keystore import write_private

    if path is None:
        return
    if job.proof is None:
        raise Refusal(Code.BODY_TOO_LARGE, "the answer has no receipt or is too long to be kept, so there is no proof to save")
    write_private(path.absolute(), job.proof.dumps())
    step(f"proof of the answer in {path}; check it with: tally receipt verify {path}")
