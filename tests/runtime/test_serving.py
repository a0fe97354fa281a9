"""Serving with real HTTP: an orderly stop, and signals."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tallystick.cli.local.processes import free_port
from tallystick.protocol.errors import Unavailable
from tallystick.runtime import serving as serving_module
from tallystick.runtime.http_direct import MAX_RECURSION
from tallystick.runtime.serving import SharedPort, _Server, server_config, serving, wait_for_stop_signal
from tests.runtime.processes import TIMEOUT_SECONDS, line, script
from tests.virtual_time import on_virtual_time

LOOPBACK = "127.0.0.1"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that answers with the requested path."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


async def test_an_app_is_served_on_a_free_port() -> None:
    """With port 0, the chosen port answers while the context is open and not afterwards."""
    async with httpx.AsyncClient() as client:
        async with serving(echo, LOOPBACK, 0) as port:
            assert port > 0
            answer = await client.get(f"http://{LOOPBACK}:{port}/hello")
            assert (answer.status_code, answer.text) == (200, "/hello")
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://{LOOPBACK}:{port}/hello")


async def test_a_request_under_way_is_answered_before_the_end() -> None:
    """Leaving the context waits for answers that have begun."""
    asked = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await asyncio.sleep(0.2)
        await echo(scope, receive, send)

    async with httpx.AsyncClient() as client:
        async with serving(slow, LOOPBACK, 0) as port:
            asking = asyncio.create_task(client.get(f"http://{LOOPBACK}:{port}/slow"))
            await asked.wait()
        assert (await asking).text == "/slow"


async def test_a_server_that_has_nothing_to_do_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops when it is told to, not when it next looks; and answers have a date all the same."""
    monkeypatch.setattr(serving_module, "_DATE_SECONDS", 100_000)
    async with asyncio.timeout(TIMEOUT_SECONDS), serving(echo, "127.0.0.1", 0) as port, httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/")).headers["date"].endswith("GMT")


async def test_the_date_of_answers_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as the server runs."""
    monkeypatch.setattr(serving_module, "_DATE_SECONDS", 0.001)
    renewed = asyncio.Event()
    server = serving_module._Server(server_config(echo, "127.0.0.1", 0))
    ticks = 0

    async def tick(_counter: int) -> bool:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            renewed.set()
        return server.should_exit

    monkeypatch.setattr(server, "on_tick", tick)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        running = asyncio.create_task(server.main_loop())
        await renewed.wait()
        server.stop()
        await running


def test_idle_connections_are_kept_longer_than_by_clients() -> None:
    """A client or proxy that keeps its connections for a minute never meets one that the server is just closing."""
    assert server_config(echo, LOOPBACK, 0).timeout_keep_alive > 60


async def test_a_used_port_is_reported() -> None:
    """A second server on the same port, a foreign address and a port out of range raise Unavailable with the reason."""
    async with serving(echo, LOOPBACK, 0) as port:
        for host, number in ((LOOPBACK, port), ("192.0.2.1", 0), (LOOPBACK, 70_000), ("no.such.host.invalid", 0)):
            with pytest.raises(Unavailable, match=f"cannot listen on {host} port {number}"):
                async with serving(echo, host, number):
                    pytest.fail("it listened")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://{LOOPBACK}:{port}/still")).text == "/still"


async def test_the_port_is_free_again_at_once() -> None:
    """A restart on the same port works."""
    async with serving(echo, LOOPBACK, free_port(0)) as port:
        pass
    async with serving(echo, LOOPBACK, port) as again:
        assert again == port


async def test_an_error_inside_passes_through_and_the_server_stops() -> None:
    """The context closes the server after any error, and does not hide the error."""
    with pytest.raises(LookupError, match="mine"):
        async with serving(echo, LOOPBACK, 0) as port:
            raise LookupError("mine")
    with socket.socket() as probe:
        assert probe.connect_ex((LOOPBACK, port)) != 0


async def test_ipv6_is_served_where_there_is_one() -> None:
    """A host with colons is an IPv6 address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    async with serving(echo, "::1", 0) as port, httpx.AsyncClient() as client:
        assert (await client.get(f"http://[::1]:{port}/six")).text == "/six"


SERVER = """
import asyncio, sys
from tallystick.runtime.serving import serving, wait_for_stop_signal
from tests.runtime.test_serving import echo

async def main():
    async with serving(echo, "127.0.0.1", 0) as port:
        asyncio.get_running_loop().call_soon(print, port)  # runs when `wait_for_stop_signal` has taken over the signals
        await wait_for_stop_signal()
        print("stopping")
        if "linger" in sys.argv:
            await asyncio.sleep(60)
    print("stopped")

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order(number: signal.Signals) -> None:
    """On SIGTERM or SIGINT the process leaves its contexts one by one and ends with code 0."""
    with script(SERVER) as process:
        port = int(line(process))
        assert httpx.get(f"http://{LOOPBACK}:{port}/alive").text == "/alive"
        process.send_signal(number)
        assert line(process) == "stopping"
        assert line(process) == "stopped"
        assert process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(number: signal.Signals) -> None:
    """A second signal ends a slow stop at once."""
    with script(SERVER, "linger") as process:
        line(process)
        process.send_signal(number)
        assert line(process) == "stopping"
        process.send_signal(number)
        assert process.wait(TIMEOUT_SECONDS) != 0


JSON_SERVER = """
import asyncio, sys
from fastapi import FastAPI
from tallystick.runtime.serving import serving, wait_for_stop_signal

app = FastAPI()

@app.post("/")
async def take(body: dict[str, object]) -> int:
    return len(body)

async def main():
    async with serving(app, "127.0.0.1", 0) as port:
        import eth_account
        print(sys.getrecursionlimit())
        print(port)
        await wait_for_stop_signal()

asyncio.run(main())
"""


def test_a_deeply_nested_body_does_not_kill_the_process() -> None:
    """eth-account's libraries raise Python's recursion limit to a depth at which JSON overflows the stack; serving lowers it."""
    with script(JSON_SERVER) as process:
        assert int(line(process)) > MAX_RECURSION, "if this fails, those libraries were mended, and so may be serving"
        url = f"http://{LOOPBACK}:{line(process)}/"
        for bracket in ("[", '{"a":', '{"a":['):
            for depth in (1_000, 50_000, 200_000):
                answer = httpx.post(url, content=bracket * depth, headers={"content-type": "application/json"})
                assert 400 <= answer.status_code < 500
        assert httpx.post(url, json={"a": 1}).text == "1"


CANCELLED = """
import asyncio, signal
from tallystick.runtime.serving import wait_for_stop_signal

async def main():
    task = asyncio.create_task(wait_for_stop_signal())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGINT) is signal.default_int_handler)

asyncio.run(main())
"""


def test_a_cancelled_wait_gives_the_signals_back() -> None:
    """After a cancelled wait, the signals have their default effects again."""
    with script(CANCELLED) as process:
        assert line(process) == "True True"


def test_these_tests_run_from_the_repository() -> None:
    """The processes above can import this module by name."""
    assert Path(__file__).name == "test_serving.py"
    assert callable(wait_for_stop_signal)


FILES = """
import asyncio, resource, sys
from tallystick.runtime import serving
from tallystick.runtime.connection_limiter import ConnectionLimits

resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))
limits = serving._within_open_file_limit(ConnectionLimits(connections=2_000))
print(limits.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
@pytest.mark.parametrize(("hard", "connections", "files"), [(4_096, 2_000, 2_384), (1_000, 616, 1_000), (256, 128, 256)])
def test_connections_do_not_use_up_the_open_files(hard: int, connections: int, files: int) -> None:
    """A server requests as many open files as its connections need, and accepts fewer connections if the system allows fewer
    files.
    """
    with script(FILES, str(hard)) as process:
        while "files=" in (output := line(process)):
            assert "the open file limit is too low" in output
        assert output == f"{connections} {files}"


@on_virtual_time
async def test_an_idle_server_seldom_wakes() -> None:
    """It renews the header Date once a second, and ends as soon as it is told to."""
    loop, ticks = asyncio.get_running_loop(), list[float]()
    began = loop.time()

    class Counting(_Server):
        """Notes when it wakes."""

        async def on_tick(self, counter: int) -> bool:
            """See uvicorn."""
            ticks.append(loop.time() - began)
            return await super().on_tick(counter)

    config = server_config(echo, LOOPBACK, 0)
    config.load()
    server = Counting(config)
    loop.call_later(2.5, server.stop)
    await server.main_loop()
    assert [round(tick, 3) for tick in ticks] == [0, 1, 2, 2.5]
    assert [name for name, _ in server.server_state.default_headers] == [b"date", b"server"]


async def test_a_shared_port_can_be_left_alone() -> None:
    """An app also serves a second port; after it has left that one, its connections go on and new ones reach another process."""
    shared, other = SharedPort(0), SharedPort(0)
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((LOOPBACK, 0))
        shared.port = other.port = held.getsockname()[1]
        url = f"http://{LOOPBACK}:{shared.port}"
        async with httpx.AsyncClient() as client, serving(echo, LOOPBACK, 0, shared=shared) as port:
            assert port != shared.port
            for base in (url, f"http://{LOOPBACK}:{port}"):
                assert (await client.get(f"{base}/hello")).text == "/hello"
            shared.leave()
            assert (await client.get(f"{url}/kept")).text == "/kept", "on the connection that there is"
            async with httpx.AsyncClient() as newcomer:
                with pytest.raises(httpx.ConnectError):
                    await newcomer.get(url)
                async with serving(echo, LOOPBACK, 0, shared=other):
                    assert (await newcomer.get(f"{url}/new")).text == "/new"
                assert (await client.get(f"http://{LOOPBACK}:{port}/own")).text == "/own"


LETS_GO = """
import asyncio, os, signal, sys
from pathlib import Path
from tallystick.runtime.serving import wait_for_stop_signal
from tallystick.runtime.storage import Database

async def main():
    first = Database(f"sqlite:///{sys.argv[1]}/first.db")
    await first.start(Path(sys.argv[2]))
    assert "alembic.command" in sys.modules
    asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
    await wait_for_stop_signal()
    assert not [name for name in sys.modules if name.partition(".")[0] in {"alembic", "mako"}]
    for name in ("second", "third"):
        database = Database(f"sqlite:///{sys.argv[1]}/{name}.db")
        await database.start(Path(sys.argv[2]))
        await database.close()
        assert "alembic.command" not in sys.modules
    await first.close()
    print("migrated", flush=True)

asyncio.run(main())
"""


def test_a_started_daemon_lets_go_of_what_migrates(tmp_path: Path) -> None:
    """Once a daemon waits for its end, the migration tool is unloaded. One opened later is migrated all the same."""
    arguments = [sys.executable, "-c", LETS_GO, str(tmp_path), str(Path(__file__).parent / "migrations")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "migrated\n", done.stderr
