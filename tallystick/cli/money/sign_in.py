"""`tally sign-in`: signs in to a coordinator's, gateway's or node's pages with a wallet of this machine."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from tallystick.cli.options import DEFAULT_WALLET, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import note, out, show_json
from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.protocol.signatures import checksum

if TYPE_CHECKING:
    from tallystick.protocol.eip712 import Signer

SECONDS = 15.0
MAX_ANSWER = 65_536


def sign_in(
    url: Annotated[str, typer.Argument(help="URL of the coordinator, the gateway or the node's pages.")],
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the link in the browser of this machine.")] = False,
    bearer: Annotated[
        bool, typer.Option("--bearer", help="Print a bearer token for scripts instead: Authorization: Bearer TOKEN.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign in with a wallet (EIP-4361), and print a link that signs in a browser once, within five minutes.

    The wallet signs a message for this site alone. It sends no transaction, and the key stays here. Whoever opens the link is
    signed in as the wallet's account, so give it to nobody. A session lasts an hour.
    """
    if open_browser and bearer:
        raise BadMessage("expected one of --open and --bearer, got both")
    origin = _origin_of(url)
    signer = unlock(wallet, password_file)
    signed = _sign(origin, signer)
    account = checksum(signer.address)
    if bearer:
        session = _post(origin, "/sign-in", signed | {"bearer": True})
        if as_json:
            show_json({"account": account, "token": session.get("token"), "expiresAt": session.get("expiresAt")})
        else:
            out.print(str(session.get("token")), markup=False, highlight=False, soft_wrap=True)
        return
    link = f"{origin}/sign-in#{_encode(signed)}"
    if as_json:
        show_json({"account": account, "link": link})
    elif not open_browser:
        note(f"Open this link within 5 minutes, in the browser that is to be signed in as {account}:")
        out.print(link, markup=False, highlight=False, soft_wrap=True)
    if open_browser:
        import webbrowser

        if not webbrowser.open(link):
            raise BadMessage("--open: this machine has no browser; leave it out, and open the link yourself")
        note(f"The browser signs in as {account}.")


def _sign(origin: str, signer: Signer) -> dict[str, Any]:
    """Asks for a challenge and signs it, if it is for the site at `origin`. Raises BadMessage, Unavailable."""
    from tallystick.protocol.sign_in import text_digest
    from tallystick.web.wallet_sign_in import message_of

    message = message_of(_post(origin, "/sign-in/challenge", {}), signer.address)
    own = origin.partition("://")[2]
    if message.domain.lower() != own or not message.uri.lower().startswith(f"{origin}/"):
        raise BadMessage(
            f"challenge: {own} asks for a signature for {message.domain[:100]}, which is another site; nothing was signed."
            " If it is the same server, use that address"
        )
    text = message.to_text()
    return {"message": text, "signature": "0x" + signer.sign_digest(text_digest(text)).hex()}


def _post(origin: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    import httpx

    from tallystick.protocol.errors import error_from_json
    from tallystick.protocol.proxies import uses_proxy
    from tallystick.protocol.wire import loads

    try:
        answer = httpx.post(f"{origin}{path}", json=body, timeout=SECONDS, trust_env=uses_proxy(origin))
    except httpx.HTTPError as error:
        raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{origin} does not answer: {error}") from error
    if answer.status_code == 404 or len(answer.content) > MAX_ANSWER:
        raise BadMessage(f"{origin} has no sign-in with a wallet: expected the address of a coordinator, a gateway or a node")
    raw = loads(answer.content, "sign-in")
    if answer.status_code != 200:
        raise error_from_json(raw, answer.status_code)
    if not isinstance(raw, dict):
        raise BadMessage("sign-in: expected a JSON object")
    return raw


def _origin_of(url: str) -> str:
    """Scheme, host and port of a URL that a person wrote. Raises BadMessage."""
    from tallystick.protocol.origins import read_origin

    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        origin = read_origin(parts.geturl())
        _ = parts.port
    except ValueError:
        origin, parts = "", urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise BadMessage(f"URL: expected http:// or https:// and a host, got {url[:200]!r}")
    return origin


def _encode(signed: dict[str, Any]) -> str:
    from tallystick.protocol.wire import dumps

    return base64.urlsafe_b64encode(dumps(signed)).decode().rstrip("=")
