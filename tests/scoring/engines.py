"""Engines as their documentation describes them, with a toy model of bytes: each token is a byte, and 256 ends a turn.

Each has only the endpoints that its scoring adapter uses, and those of the others are 404.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

END = 256
END_TEXT = "<end>"
CONTEXT = 400


def logprobs(text: Sequence[int]) -> dict[int, float]:
    """The model: log-probabilities of all tokens after a text, which depend on its last two tokens."""
    draws = random.Random(hash(tuple(text[-2:])))
    logits = [draws.gauss(0, 3) for _ in range(END + 1)]
    total = math.log(math.fsum(map(math.exp, logits)))
    return {token: value - total for token, value in enumerate(logits)}


def best(text: Sequence[int], count: int) -> dict[int, float]:
    """The likeliest tokens after a text, best first."""
    return dict(sorted(logprobs(text).items(), key=lambda entry: -entry[1])[:count])


def template(messages: list[dict[str, Any]]) -> str:
    """The prompt of a chat."""
    return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"


def tokens_of(text: str) -> list[int]:
    """The tokens of a text."""
    return list(text.encode())


Body = dict[str, Any]
Answer = Body | web.Response
Endpoint = Callable[[Body], Answer]


def refused(status: int) -> web.Response:
    """An engine's refusal, which quotes the prompt."""
    return web.json_response({"error": {"message": "the secret prompt is bad"}}, status=status)


@dataclass
class FakeEngine:
    """An engine with these endpoints. `asked`: the calls that it got, in order."""

    endpoints: dict[str, Endpoint]
    asked: list[tuple[str, Body]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        """Answers any request."""
        endpoint = self.endpoints.get(request.path)
        if endpoint is None:
            return web.json_response({"error": "not found"}, status=404)
        body = await request.json() if request.method == "POST" else {}
        self.asked.append((request.path, body))
        answer = endpoint(body)
        return answer if isinstance(answer, web.Response) else web.json_response(answer)


@asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[str]:
    """The URL of a served engine."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engine.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def llama_cpp() -> FakeEngine:
    """llama.cpp's server: an answer lacks its row if half of a UTF-8 sequence or the end of the text is sampled."""

    def complete(body: Body) -> Answer:
        text = body["prompt"]
        if not text or len(text) > CONTEXT or not all(0 <= token <= END for token in text):
            return refused(400)
        bias = dict(map(tuple, body.get("logit_bias") or []))
        values = logprobs(text)
        sampled = max(values, key=lambda token: values[token] + bias.get(token, 0))
        answer: Body = {"content": "", "tokens_predicted": 1, "timings": {"cache_n": len(text) - 1}}
        if sampled < 128:
            top = [{"id": token, "logprob": value} for token, value in best(text, body["n_probs"]).items()]
            answer["completion_probabilities"] = [{"id": sampled, "top_logprobs": top}]
        return answer

    return FakeEngine(
        {
            "/apply-template": lambda body: {"prompt": template(body["messages"])} if "messages" in body else refused(500),
            "/tokenize": lambda body: {"tokens": [END] if body["content"] == END_TEXT else tokens_of(body["content"])},
            "/completion": complete,
            "/props": lambda _: {"eos_token": END_TEXT},
        }
    )


def vllm(*, tokenizes_chats: bool = True) -> FakeEngine:
    """vLLM, or an older one whose /tokenize takes texts only."""

    def tokenize(body: Body) -> Answer:
        if "messages" in body:
            return {"tokens": tokens_of(template(body["messages"]))} if tokenizes_chats else refused(400)
        return {"tokens": tokens_of(body["prompt"])} if "prompt" in body else refused(422)

    def chat(body: Body) -> Answer:
        ids = {"prompt_token_ids": tokens_of(template(body["messages"]))} if body.get("return_token_ids") else {}
        return {"choices": [{"message": {"content": "x"}}], **ids}

    def complete(body: Body) -> Answer:
        text = body["prompt"]
        if not isinstance(text, list) or len(text) >= CONTEXT or not all(0 <= token <= END for token in text):
            return refused(400)
        choice: Body = {"text": "x", "logprobs": None}
        if body.get("logprobs"):
            names = {f"token_id:{token}": value for token, value in best(text, body["logprobs"]).items()}
            choice["logprobs"] = {"top_logprobs": [names]}
        if body.get("prompt_logprobs"):
            rows: list[Body | None] = [None]
            for at in range(1, len(text)):
                chosen = {text[at]: logprobs(text[:at])[text[at]]}
                row = best(text[:at], body["prompt_logprobs"]) | chosen
                rows.append({str(token): {"logprob": value, "rank": 1} for token, value in row.items()})
            choice["prompt_logprobs"] = rows
        return {"choices": [choice]}

    return FakeEngine({"/tokenize": tokenize, "/v1/completions": complete, "/v1/chat/completions": chat})


def sglang() -> FakeEngine:
    """SGLang, whose log-probabilities follow the temperature, and which tells the tokens of a chat in its choices."""

    def tempered(row: dict[int, float], temperature: float) -> dict[int, float]:
        return row if temperature == 1 else {token: value / temperature for token, value in row.items()}

    def generate(body: Body) -> Answer:
        text, start = body["input_ids"], body["logprob_start_len"]
        if len(text) >= CONTEXT or not all(0 <= token <= END for token in text):
            return refused(400)
        temperature = body["sampling_params"].get("temperature", 0.7)
        chosen: list[Any] = [[None, text[start], None]]
        top: list[Any] = [None]
        for at in range(start + 1, len(text)):
            row = tempered(logprobs(text[:at]), temperature)
            chosen.append([row[text[at]], text[at], None])
            top.append([[row[token], token, None] for token in best(text[:at], body["top_logprobs_num"])])
        row = tempered(logprobs(text), temperature)
        last = [[row[token], token, None] for token in best(text, body["top_logprobs_num"])]
        meta = {"input_token_logprobs": chosen, "input_top_logprobs": top, "output_top_logprobs": [last]}
        return {"text": "x", "meta_info": meta}

    def chat(body: Body) -> Answer:
        choice: Body = {"message": {"content": "x"}}
        if body.get("return_prompt_token_ids"):
            choice["prompt_token_ids"] = tokens_of(template(body["messages"]))
        return {"choices": [choice]}

    return FakeEngine(
        {
            "/tokenize": lambda body: {"tokens": tokens_of(body["prompt"])} if "prompt" in body else refused(422),
            "/generate": generate,
            "/v1/chat/completions": chat,
            "/v1/completions": lambda _: {"choices": [{"text": "x", "logprobs": None}]},
        }
    )


def text_only() -> FakeEngine:
    """An engine that serves chats and completions, and ignores what it does not know."""
    return FakeEngine(
        {
            "/v1/chat/completions": lambda _: {"choices": [{"message": {"content": "x"}}]},
            "/v1/completions": lambda _: {"choices": [{"text": "x", "logprobs": None}]},
        }
    )


ENGINES: dict[str, Callable[[], FakeEngine]] = {
    "llama.cpp": llama_cpp,
    "vLLM": vllm,
    "older vLLM": lambda: vllm(tokenizes_chats=False),
    "SGLang": sglang,
}
