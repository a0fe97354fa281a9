"""Unmodified clients through a whole market: requests reach the engine, and answers reach the clients."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.peers import BUILD, LITELLM, install
from scripts.relay import processes
from tallystick.runtime.serving import serving
from tests.e2e.conftest import clean_environment
from tests.third_party_clients.engine import CITIES, DOCUMENT, TEXT, USAGE, VECTOR, Engine

PROGRAMS = Path(__file__).parent / "programs"
PYTHON = {
    "litellm_sdk": LITELLM,
    "langchain_openai_chat": ("langchain", ("langchain-openai==1.7.3",)),
    "llama_index_openai_like": ("llama-index", ("llama-index-llms-openai-like==0.8.1",)),
    "anthropic_sdk": ("anthropic", ("anthropic==2.14.0",)),
    "openai_agents_sdk": ("openai-agents", ("openai-agents==0.24.0",)),
    "pydantic_ai_agent": ("pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",)),
}
LLM = ("llm", ("llm==0.36",))
JAVASCRIPT = "openai@7.55.0"
JS_ANTHROPIC = "@anthropic-ai/sdk@1.14.0"
VERCEL = ("ai@7.0.173", "@ai-sdk/openai@4.0.118", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7")
CLAUDE_CODE = "@anthropic-ai/claude-code@2.1.197"
SAID: dict[str, Any] = {
    "text": TEXT,
    "stream": TEXT,
    "tools": [["weather", {"city": city}] for city in CITIES],
    "streamed_tools": [["weather", {"city": city}] for city in CITIES],
    "tokens": USAGE["total_tokens"],
    "json": json.loads(DOCUMENT),
    "vectors": [VECTOR, VECTOR],
}
"""What each client is to find, as far as its program looks."""


@dataclass
class Site:
    """A running market and the engine behind it."""

    url: str
    engine: Engine
    folder: Path

    async def run(self, *command: str, **environment: str) -> str:
        """The output of a program that gets the market's address from environment variables, as any client does."""
        variables = {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": "unused",
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": "unused",
            "HOME": str(self.folder),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        pipe = asyncio.subprocess.PIPE
        started = await asyncio.create_subprocess_exec(
            *command,
            env=clean_environment() | variables | environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
        )
        out, err = await started.communicate()
        assert started.returncode == 0, (out + err).decode()[-3000:]
        return out.decode()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """A market whose parts, except the engine, are processes of their own."""
    engine = Engine()
    async with (
        serving(engine.app, "127.0.0.1", 0) as port,
        processes.market(tmp_path / "market", f"http://127.0.0.1:{port}") as market,
    ):
        yield Site(market.gateway, engine, tmp_path)


def _check(output: dict[str, Any], engine: Engine) -> None:
    fault = output.pop("fault", None)
    assert fault is None or "no such user" in fault
    assert output == {name: SAID[name] for name in output}
    assert any(asked.get("seed") == 7 for asked in engine.asked)


@pytest.mark.parametrize("program", PYTHON)
async def test_a_python_client(program: str, site: Site) -> None:
    """Whole and streamed answers, parallel tools, JSON, embeddings, errors."""
    commands = await asyncio.to_thread(install, *PYTHON[program])
    assert commands is not None
    output = json.loads((await site.run(str(commands / "python"), str(PROGRAMS / f"{program}.py"))).splitlines()[-1])
    assert output.keys() >= {"text", "stream", "tools", "tokens"}
    _check(output, site.engine)


async def test_the_llm_command(site: Site) -> None:
    """Streamed by default, whole with --no-stream."""
    commands = await asyncio.to_thread(install, *LLM)
    assert commands is not None
    (site.folder / "extra-openai-models.yaml").write_text(
        f"- model_id: market\n  model_name: bench\n  api_base: {site.url}/v1\n  api_key_name: market\n"
    )
    for option in ((), ("--no-stream",)):
        command = (str(commands / "llm"), "-m", "market", "--key", "unused", *option, "hi")
        assert (await site.run(*command, LLM_USER_PATH=str(site.folder))).strip() == TEXT


def _is_installed(folder: Path, requirement: str) -> bool:
    package, _, version = requirement.rpartition("@")
    described = folder / "node_modules" / package / "package.json"
    return described.exists() and json.loads(described.read_text())["version"] == version


def _install_npm(name: str, *requirements: str) -> Path:
    """The folder of packages of npm, which are installed on the first call."""
    folder = BUILD / name
    if not all(_is_installed(folder, requirement) for requirement in requirements):
        folder.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        assert npm, "npm is needed, as for the contracts"
        subprocess.run(
            [npm, "install", "--no-fund", "--no-audit", "--silent", "--prefix", str(folder), *requirements], check=True
        )
    return folder


async def test_the_javascript_package(site: Site) -> None:
    """The official `openai` of Node.js."""
    folder = await asyncio.to_thread(_install_npm, "js-openai", JAVASCRIPT)
    shutil.copy(PROGRAMS / "js_openai.mjs", folder)
    output = json.loads(await site.run(shutil.which("node") or "node", str(folder / "js_openai.mjs"), PATH=os.environ["PATH"]))
    assert output.keys() == {*SAID.keys(), "fault"} - {"json"}
    _check(output, site.engine)


async def test_anthropics_javascript_package(site: Site) -> None:
    """The official `@anthropic-ai/sdk` of Node.js."""
    folder = await asyncio.to_thread(_install_npm, "js-anthropic", JS_ANTHROPIC)
    shutil.copy(PROGRAMS / "js_anthropic.mjs", folder)
    output = json.loads(await site.run(shutil.which("node") or "node", str(folder / "js_anthropic.mjs"), PATH=os.environ["PATH"]))
    assert output.keys() == {"text", "stream", "tools", "streamed_tools", "tokens", "fault"}
    _check(output, site.engine)


async def test_the_vercel_ai_sdk(site: Site) -> None:
    """Its OpenAI provider over Responses (the default) and chat, and its compatible provider: loops, JSON, further turns."""
    folder = await asyncio.to_thread(_install_npm, "js-vercel-ai", *VERCEL)
    shutil.copy(PROGRAMS / "vercel_ai_sdk.mjs", folder)
    outputs = json.loads(
        await site.run(shutil.which("node") or "node", str(folder / "vercel_ai_sdk.mjs"), PATH=os.environ["PATH"])
    )
    assert outputs.keys() == {"responses", "chat", "compatible"}
    for output in outputs.values():
        assert output.keys() >= {"text", "stream", "tools", "streamed_tools", "tokens", "json"}
        assert output == {name: SAID[name] for name in output}
    conversation = [message["role"] for message in site.engine.asked[-2]["messages"]]
    assert conversation == ["user", "assistant", "user"]


async def test_claude_code(site: Site) -> None:
    """A question without tools, and one whose answer calls a tool: its result goes back to the engine."""
    folder = await asyncio.to_thread(_install_npm, "claude-code", CLAUDE_CODE)
    command = (str(folder / "node_modules" / ".bin" / "claude"), "-p", "hi", "--output-format", "json", "--tools")
    settings = {"ANTHROPIC_MODEL": "bench", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "PATH": os.environ["PATH"]}
    plain = json.loads(await site.run(*command, "", **settings))
    assert (plain["is_error"], plain["result"], plain["usage"]["output_tokens"]) == (False, TEXT, USAGE["completion_tokens"])
    tools = json.loads(await site.run(*command, "Bash", **settings))
    assert (tools["is_error"], tools["result"]) == (False, TEXT)
    calls, results = _calls_and_results(site.engine.asked[-1])
    assert calls == results == {f"call_{at}" for at in range(len(CITIES))}


def _calls_and_results(asked: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The ids of the calls of tools in a request, and of their results."""
    calls = {call["id"] for message in asked["messages"] for call in message.get("tool_calls", ())}
    return calls, {message["tool_call_id"] for message in asked["messages"] if message["role"] == "tool"}


async def test_curl(site: Site) -> None:
    """curl, used as in the README of any OpenAI-compatible server."""
    body = '{"model": "bench", "messages": [{"role": "user", "content": "hi"}], "n": 2, "logprobs": true}'
    address = f"{site.url}/v1/chat/completions"
    output = json.loads(await site.run("curl", "-sS", address, "-H", "content-type: application/json", "-d", body))
    assert [choice["message"]["content"] for choice in output["choices"]] == [TEXT, TEXT]
    assert all(choice["logprobs"]["content"][0]["logprob"] == -0.5 for choice in output["choices"])
    streamed = await site.run(
        "curl", "-sSN", address, "-H", "content-type: application/json", "-d", body[:-1] + ', "stream": true}'
    )
    assert streamed.endswith("data: [DONE]\n\n")


async def test_java(site: Site) -> None:
    """Java's own HTTP client, whose offer of HTTP/2 is ignored: whole and streamed, bodies of known and unknown length."""
    java = shutil.which("java")
    assert java, "a JDK of at least version 11 is needed"
    lines = (await site.run(java, str(PROGRAMS / "JavaHttpClient.java"))).splitlines()
    answers = [line.split(" ", 2) for line in lines]
    assert [answer[:2] for answer in answers] == [["HTTP_1_1", "200"]] * 5
    for _, _, body in answers[:2]:
        assert json.loads(body)["choices"][0]["message"]["content"] == TEXT
    for _, _, body in answers[2:4]:
        assert body.endswith("data: [DONE]\\n\\n")
    assert [model["id"] for model in json.loads(answers[4][2])["data"]] == ["bench"]
    assert [asked["seed"] for asked in site.engine.asked if "seed" in asked] == [7] * 4
