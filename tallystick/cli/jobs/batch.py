"""`tally batch`: batches of requests at a running gateway, which keeps them going, also after this command and a restart."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from tallystick.cli.options import Config, Json
from tallystick.cli.output import note, show_fields, show_json, show_table, strip_control
from tallystick.cli.progress import Activity, Unit, activity
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError, Unavailable, error_from_json
from tallystick.protocol.routes import CHAT

if TYPE_CHECKING:
    import httpx

app = typer.Typer(no_args_is_help=True, help="Run files of requests as batches, at a running gateway (`tally gateway`).")
POLL_SECONDS = 1.0
ENDED = ("completed", "failed", "expired", "cancelled")
UPLOAD_SECONDS = 3_600.0
MAX_LINES_SHOWN = 20

Gateway = Annotated[
    str | None, typer.Option("--gateway", help="URL of the gateway; default: the config's host and port, http://127.0.0.1:8421.")
]
BatchId = Annotated[str, typer.Argument(metavar="ID", help="Batch id, as `tally batch create` printed it.")]


@app.command("create")
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Input: one JSON request a line, in OpenAI's format.")],
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help=f"Route of all requests; default: the first line's `url`, else {CHAT}.")
    ] = None,
    window: Annotated[
        str, typer.Option("--window", help="Time until the batch must be done: 1m to 7d, such as 90m or 24h.")
    ] = "24h",
    options: Annotated[
        str | None, typer.Option("--options", help='X-Tally-Options of every request, as JSON, such as \'{"max_cost": "0.01"}\'.')
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, as `tally batch wait` does.")] = False,
    config: Config = None,
    gateway: Gateway = None,
    as_json: Json = False,
) -> None:
    """Upload a file of requests and run it as a batch. Prints the batch's id.

    The gateway runs the batch, so it must stay up or be started again; this command may end.
    """
    if not file.is_file():
        raise BadMessage(f"FILE: expected a file of requests, got {file}")
    with _gateway(config, gateway) as http:
        uploaded = _upload(http, file)
        body = {"input_file_id": uploaded["id"], "endpoint": endpoint or _endpoint_of(file), "completion_window": window}
        headers = {} if options is None else {"x-tally-options": options}
        try:
            batch = _call(http, "POST", "/v1/batches", json=body, headers=headers)
        except TallyError:
            http.delete(f"/v1/files/{uploaded['id']}")  # no batch reads it
            raise
        if wait:
            note(f"created {batch['id']}, which goes on without this command; stop it with: tally batch cancel {batch['id']}")
            batch = _wait(http, batch)
    _show(batch, as_json=as_json, title="batch")
    _exit_for(batch, waited=wait)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100, help="Number of batches, newest first.")] = 20,
    config: Config = None,
    gateway: Gateway = None,
    as_json: Json = False,
) -> None:
    """List batches, newest first."""
    with _gateway(config, gateway) as http:
        batches = _call(http, "GET", "/v1/batches", params={"limit": limit})["data"]
    if as_json:
        show_json(batches)
    else:
        show_table(("batch", "at", "status", "requests", "done", "failed", "dollars"), map(_row, batches))


@app.command("show")
def show(batch_id: BatchId, config: Config = None, gateway: Gateway = None, as_json: Json = False) -> None:
    """Show a batch: its state, how many requests have ended, what it cost, and the faults of its input."""
    with _gateway(config, gateway) as http:
        batch = _call(http, "GET", f"/v1/batches/{_checked(batch_id)}")
    _show(batch, as_json=as_json)


@app.command("wait")
def wait(batch_id: BatchId, config: Config = None, gateway: Gateway = None, as_json: Json = False) -> None:
    """Wait for the end of a batch, with a progress bar at a terminal. Exit status 1 unless it completed."""
    with _gateway(config, gateway) as http:
        batch = _wait(http, _call(http, "GET", f"/v1/batches/{_checked(batch_id)}"))
    _show(batch, as_json=as_json)
    _exit_for(batch, waited=True)


@app.command("cancel")
def cancel(batch_id: BatchId, config: Config = None, gateway: Gateway = None, as_json: Json = False) -> None:
    """Cancel a batch. Answers that came are kept; running requests may end within a minute."""
    with _gateway(config, gateway) as http:
        batch = _call(http, "POST", f"/v1/batches/{_checked(batch_id)}/cancel")
    _show(batch, as_json=as_json)


@app.command("download")
def download(
    batch_id: BatchId,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="File for the answers; default: standard output.")] = None,
    errors: Annotated[bool, typer.Option("--errors", help="Download the error file instead of the answers.")] = False,
    config: Config = None,
    gateway: Gateway = None,
) -> None:
    """Download the answers of an ended batch, or its errors: one JSON object a line, in the order of the input."""
    with _gateway(config, gateway) as http:
        batch = _call(http, "GET", f"/v1/batches/{_checked(batch_id)}")
        name = "error_file_id" if errors else "output_file_id"
        if batch[name] is None:
            what = "errors" if errors else "answers"
            text = f"ID: {batch_id} is {batch['status']} and has no {what}"
            raise BadMessage(text + ("" if batch["status"] in ENDED else f"; wait for its end: tally batch wait {batch_id}"))
        with http.stream("GET", f"/v1/files/{batch[name]}/content", timeout=UPLOAD_SECONDS) as answer:
            if answer.status_code != 200:
                answer.read()
                raise error_from_json(_json_of(answer), answer.status_code)
            _save(answer, output)
    if output is not None:
        note(f"{name.removesuffix('_file_id')} file of {batch_id}: {output}")


def _save(answer: httpx.Response, output: Path | None) -> None:
    """Writes to a file, which is complete or not there, or to standard output or a device, which are never replaced."""
    if output is None:
        _copy(answer, sys.stdout.buffer)
        return
    if output.exists() and not output.is_file():
        with output.open("wb") as device:
            _copy(answer, device)
        return
    output = output.resolve()  # a link stays one
    part = output.with_name(f".{output.name}.part")
    try:
        size = int(answer.headers.get("content-length", 0)) or None
        with part.open("wb") as file, activity(f"downloading {output.name}", size, Unit.BYTES) as shown:
            for piece in answer.iter_bytes():
                file.write(piece)
                shown.advance(len(piece))
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def _copy(answer: httpx.Response, output: BinaryIO) -> None:
    output.writelines(answer.iter_bytes())
    output.flush()


@contextmanager
def _gateway(config: Path | None, url: str | None) -> Iterator[httpx.Client]:
    """A client of the gateway. Its failures to connect become Unavailable."""
    import httpx

    from tallystick.client.config import load_config

    loaded = load_config(config)
    key = loaded.api_key or next((api_key.value for api_key in loaded.api_keys if api_key.value), None)
    host = "127.0.0.1" if loaded.host in ("0.0.0.0", "::") else loaded.host  # noqa: S104 - compared, not bound
    base = url or f"http://{f'[{host}]' if ':' in host else host}:{loaded.port}"
    if not base.startswith(("http://", "https://")):
        raise BadMessage(f"--gateway: expected an http:// or https:// URL, got {base[:100]!r}")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        with httpx.Client(base_url=base.rstrip("/").removesuffix("/v1"), headers=headers, timeout=60, trust_env=False) as client:
            yield client
    except httpx.TransportError as error:
        text = f"no gateway answers at {base} ({error}); start one with: tally gateway"
        raise Unavailable(Code.NOT_RUNNING, text, fault=Fault.CLIENT) from None


def _call(http: httpx.Client, method: str, path: str, **arguments: Any) -> dict[str, Any]:
    """The JSON of an answer. Raises TallyError for an error."""
    answer = http.request(method, path, **arguments)
    document = _json_of(answer)
    if answer.status_code >= 400 or not isinstance(document, dict):
        raise error_from_json(document, answer.status_code)
    return document


def _json_of(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None


def _checked(batch_id: str) -> str:
    if not batch_id.isascii() or not batch_id.replace("_", "").isalnum():
        raise BadMessage(f"ID: expected a batch id such as batch_0123abcd, got {batch_id[:100]!r}; see: tally batch list")
    return batch_id


def _endpoint_of(file: Path) -> str:
    """The `url` of the file's first request; the gateway checks the file itself."""
    with file.open("rb") as content:
        first = content.readline(1 << 24)
    try:
        url = json.loads(first.decode("utf-8-sig")).get("url")
    except (ValueError, AttributeError):
        url = None
    return url if isinstance(url, str) else CHAT


def _upload(http: httpx.Client, file: Path) -> dict[str, Any]:
    """Uploads an input file; shows how much of it was read. Returns the gateway's description of it."""
    from rich.filesize import decimal

    size = file.stat().st_size
    with activity(f"uploading {decimal(size)}", size, Unit.BYTES) as shown, _WatchedFile(file, shown) as content:
        named = {"file": (file.name, content)}
        return _call(http, "POST", "/v1/files", files=named, data={"purpose": "batch"}, timeout=UPLOAD_SECONDS)


class _WatchedFile(io.FileIO):
    """A file that shows how much of it was read."""

    def __init__(self, path: Path, shown: Activity) -> None:
        super().__init__(path)
        self._shown = shown

    def read(self, size: int | None = -1, /) -> bytes:
        """See `io.FileIO`."""
        data = super().read(-1 if size is None else size) or b""
        self._shown.advance(len(data))
        return data


def _wait(http: httpx.Client, batch: dict[str, Any], *, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Polls until the batch has ended. The gateway may be restarted meanwhile."""
    import httpx

    with activity("batch") as shown:
        while True:
            counts, tally = batch["request_counts"], batch["tally"]
            done, waiting = counts["completed"] + counts["failed"], tally["waiting"]
            text = f"{batch['status']}, {tally['cost']} dollars" + (f", waits: {strip_control(waiting)[:80]}" if waiting else "")
            shown.update(text, total=counts["total"] or None, done=done)
            if batch["status"] in ENDED:
                return batch
            sleep(POLL_SECONDS)
            try:
                batch = _call(http, "GET", f"/v1/batches/{batch['id']}")
            except httpx.TransportError:
                shown.update("the gateway does not answer; the batch goes on once it is back")


def _row(batch: dict[str, Any]) -> tuple[object, ...]:
    counts = batch["request_counts"]
    at = datetime.fromtimestamp(batch["created_at"]).astimezone().isoformat(" ", "seconds")
    return batch["id"], at, batch["status"], counts["total"], counts["completed"], counts["failed"], batch["tally"]["cost"]


def _show(batch: dict[str, Any], *, as_json: bool, title: str | None = None) -> None:
    if as_json:
        show_json(batch)
        return
    counts, tally = batch["request_counts"], batch["tally"]
    fields = [
        ("batch", batch["id"]),
        ("status", batch["status"]),
        ("requests", f"{counts['total']}: {counts['completed']} answered, {counts['failed']} failed"),
        ("cost", f"{tally['cost']} dollars"),
        ("must be done by", datetime.fromtimestamp(batch["expires_at"]).astimezone().isoformat(" ", "seconds")),
    ]
    fields += [("waits", tally["waiting"])] if tally["waiting"] else []
    fields += [(name.replace("_", " "), batch[name]) for name in ("output_file_id", "error_file_id") if batch[name]]
    show_fields(fields, title)
    faults = (batch["errors"] or {}).get("data", [])
    if faults:
        rows = [(fault["line"] or "", fault["code"], fault["message"]) for fault in faults[:MAX_LINES_SHOWN]]
        show_table(("line", "fault", "explanation"), rows, f"Faults of the input ({len(faults)})")


def _exit_for(batch: dict[str, Any], *, waited: bool) -> None:
    if waited and batch["status"] != "completed":
        raise typer.Exit(1)
