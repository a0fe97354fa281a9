"""Installs, starts and kills each real engine, and lists its expected capabilities."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from node.engines.embedded import MODEL, embedded_folder, server_command
from node.engines.embedded import install as install_embedded
from node.engines.kinds import EngineKind
from scripts.peers import BUILD, LITELLM, install
from tallystick.cli.local.processes import free_port
from tallystick.protocol.routes import SCORES

HERE = Path(__file__).parent
GGUF = HERE.parent / "data" / "tinycode-q4_0.gguf"
START_SECONDS = 180


@dataclass
class Process:
    """One engine process, which restarts on the same port."""

    command: Sequence[str]
    port: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    ready: str = "/v1/models"
    running: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Starts the process and waits until it answers."""
        with self.log.open("ab") as log:
            self.running = await asyncio.create_subprocess_exec(
                *self.command, stdout=log, stderr=log, env=os.environ | self.environment, start_new_session=True
            )
        async with httpx.AsyncClient(trust_env=False) as http:
            for _ in range(START_SECONDS * 10):
                assert self.running.returncode is None, self.log.read_text()[-3000:]
                try:
                    if (await http.get(self.url + self.ready)).status_code < 500:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.1)
        raise AssertionError(f"{self.command[0]} does not answer: {self.log.read_text()[-3000:]}")

    async def kill(self) -> None:
        """Kills the process and its children with SIGKILL."""
        if self.running is not None and self.running.returncode is None:
            os.killpg(self.running.pid, signal.SIGKILL)
            await self.running.wait()


@dataclass
class Engine:
    """A running real engine. `features`: the least that probing must find; `slow`: members that make its answers slower."""

    kind: EngineKind
    process: Process
    model: str
    features: frozenset[str]
    streams: str
    slow: dict[str, Any] = field(default_factory=dict)
    context: int | None = None
    embeddings: str | None = None
    """The address of one that embeds."""


def _commands(name: str, *requirements: str) -> Path:
    commands = install(name, requirements)
    assert commands is not None, f"{name} cannot be installed"
    return commands


@asynccontextmanager
async def llama_cpp(folder: Path) -> AsyncIterator[Engine]:
    """llama.cpp's own server."""
    python = _commands("xllamacpp", "xllamacpp==2026.10.11549") / "python"
    processes = [
        Process((str(python), str(HERE / "llama_server.py"), str(GGUF), str(port), *extra), port, folder / f"llama{port}.log")
        for port, extra in ((free_port(0), ()), (free_port(0), ("embedding",)))
    ]
    try:
        for process in processes:
            await process.start()
        features = frozenset({"logprobs", "/v1/responses", "/v1/messages"})
        yield Engine(
            EngineKind.LLAMA_CPP, processes[0], str(GGUF), features, "usage", {"n_probs": 200}, 512, embeddings=processes[1].url
        )
    finally:
        for process in processes:
            await process.kill()


@asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[Engine]:
    """The embedded engine, as `tally engine` serves it."""
    home, port = embedded_folder(BUILD), free_port(0)
    await asyncio.to_thread(install_embedded, home)
    process = Process(server_command(home, "127.0.0.1", port), port, folder / "embedded.log")
    try:
        await process.start()
        features = frozenset({"logprobs", "/v1/responses", SCORES})
        yield Engine(EngineKind.LLAMA_CPP, process, MODEL, features, "usage", {"n_probs": 200}, 4_096)
    finally:
        await process.kill()


@asynccontextmanager
async def litellm(folder: Path) -> AsyncIterator[Engine]:
    """LiteLLM's proxy in front of llama.cpp."""
    commands = install(*LITELLM)
    assert commands is not None
    async with llama_cpp(folder) as behind:
        config, port = folder / "litellm.yaml", free_port(0)
        config.write_text(
            "model_list:\n  - model_name: tinycode\n    litellm_params:\n"
            f"      {{model: openai/{behind.model}, api_base: {behind.process.url}/v1, api_key: none}}\n"
            "litellm_settings: {telemetry: false}\ngeneral_settings: {dangerously_permit_weak_or_unset_master_key: true}\n"
        )
        command = (str(commands / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port))
        process = Process(command, port, folder / "litellm.log", ready="/health/liveliness")
        try:
            await process.start()
            yield Engine(EngineKind.LITELLM, process, "tinycode", frozenset({"logprobs"}), "usage", behind.slow)
        finally:
            await process.kill()


@asynccontextmanager
async def llama_cpp_python(folder: Path) -> AsyncIterator[Engine]:
    """The server of llama-cpp-python, another program on the same library."""
    python = _commands("llama-cpp-python", "llama-cpp-python[server]==0.3.36") / "python"
    port = free_port(0)
    command = (str(python), "-m", "llama_cpp.server", "--model", str(GGUF), "--port", str(port), "--n_ctx", "512")
    process = Process((*command, "--model_alias", "tinycode", "--n_threads", "1"), port, folder / "llama-cpp-python.log")
    try:
        await process.start()
        yield Engine(EngineKind.OTHER, process, "tinycode", frozenset(), "yes")
    finally:
        await process.kill()


@asynccontextmanager
async def transformers(folder: Path) -> AsyncIterator[Engine]:
    """`transformers serve` on PyTorch."""
    commands = _commands("transformers", "torch==2.13.0", "transformers[serving]==5.23.0", "gguf==0.19.0", "accelerate==1.15.0")
    model, port, home = folder / "tinycode", free_port(0), folder / "hf"
    (home / "hub").mkdir(parents=True)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    convert = (str(commands / "python"), str(HERE / "gguf_to_hf.py"), str(GGUF), str(model))
    converting = await asyncio.create_subprocess_exec(*convert, env=os.environ | environment)
    assert await converting.wait() == 0
    command = (str(commands / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    process = Process(command, port, folder / "transformers.log", environment)
    try:
        await process.start()
        yield Engine(EngineKind.OTHER, process, str(model), frozenset({"/v1/responses"}), "usage")
    finally:
        await process.kill()


QUICK = {"llama.cpp": llama_cpp, "embedded": embedded, "litellm": litellm}
LARGE = {"llama-cpp-python": llama_cpp_python, "transformers": transformers}
