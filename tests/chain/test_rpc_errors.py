"""What nodes and hosted providers say, each in its own words, and the meaning that the client acts on."""

from __future__ import annotations

from typing import Any

import pytest

from tallystick.chain.codec import ContractError
from tallystick.chain.rpc_errors import RpcError, RpcErrorKind, read_rpc_error, refuses_range
from tallystick.protocol.errors import Code, Refusal

RATE, BATCH, RANGE, BEHIND, UNSUPPORTED, KNOWN, USED, AHEAD, OTHER = RpcErrorKind

RATE_LIMITS = [
    (-32016, "over rate limit"),
    (-32029, "Too many requests, please slow down"),
    (-32005, "limit exceeded"),
    (-32005, "daily request count exceeded, request rate limited"),
    (-32005, "project ID request rate exceeded"),
    (-32007, "50/second request limit reached - reduce calls per second or upgrade your account at quicknode.com"),
    (-32000, "429 Too Many Requests: {}"),
    (-32000, "exceeded rate limit"),
    (-32000, "rate limit exceeded, try again in 10ms"),
    (-32000, "Your app has exceeded its compute units per second capacity. If you have retries enabled, you can ignore this."),
    (429, "Your app has exceeded its throughput limit"),
    (429, ""),
    (-32097, "You've exceeded the RPS limit available on the current plan"),
    (-32603, "Unexpected status code: 429"),
    (-32090, "Too many requests, reason: call rate limit exhausted, retry in 10s"),
    (15, "Too many request, try again later. rate limit is reached"),
    (-32001, "You reached the free tier requests per second limit"),
    (-32046, "Cannot fulfill request: too many requests"),
    (-33200, "daily quota exceeded"),
]


@pytest.mark.parametrize(("number", "message"), RATE_LIMITS, ids=[message[:40] for _, message in RATE_LIMITS])
@pytest.mark.parametrize("method", ["eth_call", "eth_sendRawTransaction", "eth_blockNumber"])
def test_a_rate_limit_in_any_words(method: str, number: int, message: str) -> None:
    """Rate limits are recognised by code or by text, whatever the method; the message says what to do."""
    error = read_rpc_error(method, {"code": number, "message": message}, at="https://rpc.example")
    assert isinstance(error, RpcError)
    assert error.kind is RATE
    assert "https://rpc.example limits how many requests" in str(error)


MEANINGS: list[tuple[str, int, str, RpcErrorKind]] = [
    # A number 429 that is no status, limits that are no rate limits, and a revert that speaks of a rate.
    ("eth_sendRawTransaction", -32000, "nonce too low: next nonce 429, tx nonce 428", USED),
    ("eth_estimateGas", -32000, "gas required exceeds allowance (429)", OTHER),
    ("eth_sendRawTransaction", -32000, "exceeds block gas limit", OTHER),
    ("eth_call", -32000, "intrinsic gas too low", OTHER),
    # Ranges of logs.
    ("eth_getLogs", -32005, "query returned more than 10000 results. Try with this block range [0x1, 0x2].", RANGE),
    ("eth_getLogs", -32600, "You can make eth_getLogs requests with up to a 10 block range.", RANGE),
    ("eth_getLogs", -32602, "block range is too wide", RANGE),
    ("eth_getLogs", -32602, "Log response size exceeded. this block range should work: [0x0, 0x1]", RANGE),
    ("eth_getLogs", -32000, "exceed maximum block range: 50000", RANGE),
    ("eth_getLogs", -32000, "eth_getLogs is limited to a 10,000 range", RANGE),
    ("eth_getLogs", -32614, "eth_getLogs is limited to a 10,000 range", RANGE),
    ("eth_getLogs", -32701, "Please limit the query to at most 1000 blocks", RANGE),
    ("eth_getLogs", 35, "ranges over 10000 blocks are not supported on freetier", RANGE),
    ("eth_getLogs", -32602, "query exceeds max results 20000, retry with the range 100-200", RANGE),
    ("eth_getLogs", -32000, "query timeout exceeded", RANGE),
    ("eth_getLogs", -32003, "response too large", RANGE),
    ("eth_getLogs", -32602, "block range extends beyond current head block", BEHIND),
    # Nodes that lag.
    ("eth_call", -32000, "header not found", BEHIND),
    ("eth_call", -32000, "missing trie node 3f1c (path ) state 0x3f1c is not available", BEHIND),
    ("eth_call", -32001, "Unable to resolve block 0x12", BEHIND),
    ("eth_getLogs", -32000, "One of the blocks specified in filter (fromBlock, toBlock or blockHash) cannot be found.", BEHIND),
    ("eth_getLogs", -32000, "unknown block", BEHIND),
    ("eth_getBlockByNumber", -32000, "Block not found", BEHIND),
    ("eth_call", -32002, "No state available for block 0x12", BEHIND),
    ("eth_call", -32000, "cannot query unfinalized data", BEHIND),
    # What an endpoint lacks.
    ("eth_getBlockByNumber", -32601, "pending block is not available", UNSUPPORTED),
    ("eth_getBlockByNumber", -32000, "pending block is not available", UNSUPPORTED),
    ("eth_getTransactionCount", -32602, "unsupported block tag pending", UNSUPPORTED),
    ("eth_maxPriorityFeePerGas", -32601, "the method eth_maxPriorityFeePerGas does not exist/is not available", UNSUPPORTED),
    ("eth_maxPriorityFeePerGas", -32004, "Unsupported method", UNSUPPORTED),
    # Submissions.
    ("eth_sendRawTransaction", -32000, "already known", KNOWN),
    ("eth_sendRawTransaction", -32000, "ALREADY_EXISTS: already known", KNOWN),
    ("eth_sendRawTransaction", -32010, "AlreadyKnown", KNOWN),
    ("eth_sendRawTransaction", -32000, "Known transaction", KNOWN),
    ("eth_sendRawTransaction", -32010, "Transaction with the same hash was already imported.", KNOWN),
    ("eth_sendRawTransaction", -32003, "transaction already imported", KNOWN),
    ("eth_sendRawTransaction", 3, "known transaction. transaction with hash 0x12 is already in the system", KNOWN),
    ("eth_sendRawTransaction", -32000, "nonce too low", USED),
    ("eth_sendRawTransaction", -32001, "Nonce too low", USED),
    ("eth_sendRawTransaction", -32010, "OldNonce, Current nonce: 7, nonce of rejected tx: 5", USED),
    ("eth_sendRawTransaction", 3, "nonce too low. allowed nonce range: 5 - 25, actual: 4", USED),
    ("eth_sendRawTransaction", -32000, "replacement transaction underpriced", USED),
    ("eth_sendRawTransaction", -32010, "ReplacementNotAllowed", USED),
    ("eth_sendRawTransaction", -32000, "could not replace existing tx", USED),
    ("eth_sendRawTransaction", -32010, "There is another transaction with same nonce already in the queue.", USED),
    ("eth_sendRawTransaction", -32000, "nonce too high", AHEAD),
    ("eth_sendRawTransaction", -32010, "NonceGap, Future nonce. Expected nonce: 5", AHEAD),
    ("eth_sendRawTransaction", 3, "nonce too high. allowed nonce range: 5 - 25, actual: 40", AHEAD),
    ("eth_sendRawTransaction", -32000, "transaction underpriced", OTHER),
    ("eth_sendRawTransaction", -32000, "txpool is full", OTHER),
]


@pytest.mark.parametrize(("method", "number", "message", "kind"), MEANINGS, ids=[row[2][:50] for row in MEANINGS])
def test_the_meaning_of_an_error(method: str, number: int, message: str, kind: RpcErrorKind) -> None:
    """One meaning in the words of each node or provider."""
    error = read_rpc_error(method, {"code": number, "message": message})
    assert isinstance(error, RpcError)
    assert (error.kind, error.number, error.reason) == (kind, number, message)


@pytest.mark.parametrize(
    "message",
    [
        "insufficient funds for gas * price + value",
        "InsufficientFunds, Account balance: 0, cumulative cost: 5",
        "Upfront cost exceeds account balance",
        "Insufficient funds. The account you tried to send transaction from does not have enough funds.",
        "insufficient funds for gas + value. balance: 0, fee: 1, value: 1",
        "Not enough balance to cover the fee. tx.gasLimit=1",
        "Sender doesn't have enough funds to send tx",
        "insufficient funds for transfer",
    ],
)
@pytest.mark.parametrize("number", [-32000, -32003, -32004, -32010, 3])
def test_an_account_without_coins(number: int, message: str) -> None:
    """Too few coins for gas is one refusal, in the words of geth, Nethermind, Besu, Parity, zkSync and Hardhat."""
    error = read_rpc_error("eth_sendRawTransaction", {"code": number, "message": message})
    assert isinstance(error, Refusal)
    assert error.code is Code.INSUFFICIENT_FUNDS
    assert message in str(error)
    other = read_rpc_error("eth_blockNumber", {"code": -32000, "message": message})
    assert isinstance(other, RpcError), "the account at the provider, not one on the chain"


@pytest.mark.parametrize("message", ["execution reverted: insufficient funds", "execution reverted: rate limit exceeded"])
def test_a_revert_goes_before_its_words(message: str) -> None:
    """A contract's own text is a revert, whatever it speaks of."""
    for number in (3, -32000):
        error = read_rpc_error("eth_call", {"code": number, "message": message, "data": "0x"})
        assert type(error) is Refusal
        assert error.code is Code.CHAIN_REFUSED


def test_revert_data_in_any_wrapping() -> None:
    """Revert data is found plain, nested in an object, and after a text."""
    text = "08c379a0" + f"{32:064x}{2:064x}" + b"no".hex().ljust(64, "0")
    for data in ("0x" + text, {"data": "0x" + text}, "Reverted 0x" + text):
        error = read_rpc_error("eth_call", {"code": -32015, "message": "VM execution error.", "data": data})
        assert isinstance(error, ContractError)
        assert error.values == {"message": "no"}


@pytest.mark.parametrize(
    ("message", "data", "seconds"),
    [
        ("rate limit exceeded, try again in 10ms", None, 0.01),
        ("call rate limit exhausted, retry in 10s", None, 10.0),
        ("Too many requests, please wait 2 seconds", None, 2.0),
        ("too many requests; retry after 1.5 sec", None, 1.5),
        ("rate limit: limit resets in 1 minute", None, 60.0),
        ("project ID request rate exceeded", {"rate": {"allowed_rps": 1, "backoff_seconds": 24, "current_rps": 1.4}}, 24.0),
        ("project ID request rate exceeded", {"rate": {"backoff_seconds": "soon"}}, 0.0),
        ("project ID request rate exceeded", {"rate": None}, 0.0),
        ("too many requests", "0x", 0.0),
    ],
)
def test_the_time_to_wait(message: str, data: Any, seconds: float) -> None:
    """The time to wait is read from the text or from data.rate.backoff_seconds."""
    error = read_rpc_error("eth_call", {"code": -32005, "message": message, "data": data})
    assert isinstance(error, RpcError)
    assert (error.kind, error.pause) == (RATE, seconds)


@pytest.mark.parametrize(
    "message",
    [
        "Batch of more than 3 requests are not allowed",
        "batch too large",
        "batch requests are not supported on the free plan",
        "Too many requests in batch: max 10",
        "maximum batch size is 10, got 12: rate limit",
        "response too large",
    ],
)
def test_a_batch_limit(message: str) -> None:
    """An error of a batch that speaks of the batch is a batch limit, also where it has the words of a rate limit."""
    error = read_rpc_error("eth_call", {"code": -32600, "message": message}, batch=True)
    assert isinstance(error, RpcError)
    assert error.kind is BATCH
    alone = read_rpc_error("eth_call", {"code": -32600, "message": message})
    assert isinstance(alone, RpcError)
    assert alone.kind is not BATCH


def test_errors_with_a_shorter_range_to_try() -> None:
    """A shorter range is tried after a range limit, an unknown error, and a bare "limit exceeded", which may mean both."""

    def refuses(number: int, message: str) -> bool:
        error = read_rpc_error("eth_getLogs", {"code": number, "message": message})
        assert isinstance(error, RpcError)
        return refuses_range(error)

    assert refuses(-32005, "limit exceeded")
    assert refuses(-32602, "block range is too wide")
    assert refuses(-32000, "cannot do that")
    assert not refuses(-32005, "rate limit exceeded")
    assert not refuses(-32016, "limit exceeded")
    assert not refuses(-32601, "no such method")
    assert not refuses(-32000, "unknown block")


@pytest.mark.parametrize(
    "error", ["out of service", None, [], {"message": None}, {"code": "-32005"}, {"code": {}, "message": {}}]
)
def test_malformed_errors_are_errors(error: Any) -> None:
    """An error object of any shape is an error and no crash; a code as a string is read."""
    result = read_rpc_error("eth_call", error)
    assert isinstance(result, RpcError)
    assert result.number == (-32005 if error == {"code": "-32005"} else 0)
