"""Schemas of the control plane: the JSON bodies and parameters that FastAPI validates and documents."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Query, Security
from fastapi.security import APIKeyHeader
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from coordinator.domain.ask_pages import CURSOR_PATTERN, MAX_MODEL_NAME
from coordinator.domain.resource_bounds import MAX_PAGE_ENTRIES
from tallystick.protocol.criteria import DEFAULT_LIMIT, MAX_ADDRESSES, MAX_CANDIDATES, MAX_CONCURRENT, Demand, Sort
from tallystick.protocol.requirements import MAX_NAMES
from tallystick.protocol.versions import PROTOCOL
from tallystick.protocol.weights import MAX_WEIGHT

Hex32 = Annotated[str, Path(pattern="^[0-9a-fA-F]{32}$", description="The job's id, 32 hex digits.")]
ProviderPath = Annotated[str, Path(pattern="^0x[0-9a-fA-F]{40}$", description="The provider's account.")]
Account = Annotated[str, Field(pattern="^0x[0-9a-fA-F]{40}$")]


def _refuse_other_types(value: Any) -> Any:
    """Refuses what pydantic would read as a number, and JSON Schema does not call one: true, false, and text."""
    if isinstance(value, bool | str):
        raise ValueError("expected a whole number")  # noqa: TRY004 - pydantic reports a ValueError by its member
    return value


_WHOLE = BeforeValidator(_refuse_other_types)
"""Stands after the bounds of a number, which else were missing in the schema."""
Count = Annotated[int, Field(ge=0, lt=1 << 32), _WHOLE]
Weight = Annotated[int, Field(ge=0, le=MAX_WEIGHT), _WHOLE]
Price = Annotated[int, Field(ge=0, le=10**18), _WHOLE] | Annotated[str, Field(pattern="^[0-9]{1,18}$")]
"""Base units: a number, or decimal digits for clients whose numbers are too small."""
ModelName = Annotated[str, Query(max_length=MAX_MODEL_NAME, description="The model's name.")]
_NEXT = "The `next` of the previous page; empty for the first page."
AfterModel = Annotated[str, Query(max_length=MAX_MODEL_NAME, description=_NEXT)]
AfterAsk = Annotated[str, Query(pattern=f"^({CURSOR_PATTERN})?$", description=_NEXT)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE_ENTRIES, description="Maximum number of entries in the page.")]
Token = Annotated[
    str | None,
    Security(
        APIKeyHeader(
            name="Authorization",
            scheme_name="Tally",
            description="`Tally TOKEN`: an Access message that the account's key signed for this coordinator a few minutes ago"
            " at most. The SDK creates it; tallystick/protocol/access.py defines it.",
            auto_error=False,
        )
    ),
]


class Problem(BaseModel):
    """The error, the party at fault (`client`, `provider`, `coordinator` or `nobody`), and whether a retry may help."""

    message: str
    type: str
    param: str | None
    code: str
    fault: str
    retry: bool


class ErrorBody(BaseModel):
    """Every error of this API, in OpenAI's shape."""

    error: Problem


class Replica(BaseModel):
    """One process of a coordinator. `id` is new at each start; `url` is its base URL for clients and nodes."""

    id: str
    url: str


class Info(BaseModel):
    """The identity of this coordinator, and the chain and contract on which it settles.

    `protocol` is the version of the wire protocol, `block` the block of the contract's creation. `rpc` is the chain's endpoint
    if that is on the coordinator's own machine, else null: everybody chooses an endpoint that they trust. `replicas`: the
    processes that serve this coordinator, by id; empty if it is alone. A client uses the one that is first for its payer.
    """

    name: str
    version: str
    coordinator: str
    chainId: int
    contract: str
    token: str
    tokenDecimals: int
    feeBps: int
    protocol: int = PROTOCOL
    block: int = 0
    rpc: str | None = None
    replicas: list[Replica] = []


Names = Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=MAX_NAMES)]


class Required(BaseModel):
    """Requirements on an ask's spec: one of the named regions, tiers, precisions and engines, and every named feature."""

    model_config = ConfigDict(extra="forbid")

    precision: Names = []
    region: Names = []
    tier: Names = []
    engine: Names = []
    features: Names = []
    contextTokens: Count = 0


class Needed(BaseModel):
    """What a request needs of the model: features, and the context that it is likely to fill, in tokens."""

    model_config = ConfigDict(extra="forbid")

    features: Names = []
    contextTokens: Count = 0


class Weighted(BaseModel):
    """What counts besides the price: base units per second to the first token, per second of output, and per failed job."""

    model_config = ConfigDict(extra="forbid")

    firstToken: Weight = 0
    speed: Weight = 0
    loss: Weight = 0


class ShortlistRequest(BaseModel):
    """A client's demand. Prices are maxima in base units per 1,000,000 tokens; `minStake` is in base units.

    `inputTokens`: the fewest input tokens that the request can have. `likelyTokens` and `maxOutput`: its likely input and the
    most output that it allows, in tokens, for which the asks' costs are compared. If any ask declares all that the request
    `needs`, only such asks are returned. Asks that declare that they lack an `essential` feature are left out. `concurrent`:
    other jobs for which the client looks for a slot of the model at this moment; the list begins at a slot that is drawn from as
    many of the best free ones. `batch`: the job waits behind interactive ones; asks for batch jobs alone are returned too.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=MAX_MODEL_NAME)
    payer: Account
    maxInputPrice: Price | None = None
    maxOutputPrice: Price | None = None
    providers: list[Account] = Field(default_factory=list, max_length=MAX_ADDRESSES)
    exclude: list[Account] = Field(default_factory=list, max_length=MAX_ADDRESSES)
    route: str | None = Field(default=None, max_length=256)
    require: Required = Field(default_factory=Required)
    needs: Needed = Field(default_factory=Needed)
    essential: Names = []
    inputTokens: Count = 0
    likelyTokens: Count = 0
    maxOutput: Count | None = None
    weights: Weighted = Field(default_factory=Weighted)
    concurrent: Annotated[int, Field(ge=0, le=MAX_CONCURRENT), _WHOLE] = 0
    minReputation: Annotated[int, Field(ge=0, le=100), _WHOLE] = 0
    minIntegrity: Annotated[int, Field(ge=0, le=100), _WHOLE] = 0
    minStake: Price = 0
    sort: Sort = "price"
    batch: bool = False
    limit: Annotated[int, Field(ge=1, le=MAX_CANDIDATES), _WHOLE] = DEFAULT_LIMIT

    def demand(self) -> Demand:
        """Returns the demand. Raises Refusal (unknown_route)."""
        return Demand.from_json(self.model_dump(exclude_unset=True))


class InquiryMembers(BaseModel):
    """A payer's question to this coordinator about one provider, and its time in Unix seconds."""

    model_config = ConfigDict(extra="forbid")

    payer: Account
    provider: Account
    coordinator: Account
    askedAt: str = Field(pattern="^(0|[1-9][0-9]{0,18})$")


class SignedInquiry(BaseModel):
    """The question and its payer's EIP-712 signature."""

    model_config = ConfigDict(extra="forbid")

    message: InquiryMembers
    signature: str = Field(pattern="^0x[0-9a-fA-F]{130}$")


Digest = Annotated[str, Field(pattern="^0x[0-9a-fA-F]{64}$")]
Signature = Annotated[str, Field(pattern="^0x[0-9a-fA-F]{130}$")]
Uint64 = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,18})$")]
Uint96 = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,27})$")]


class ReportMembers(BaseModel):
    """A payer's verdict on one job: 0 pass, 1 suspect, 2 confirmed. Times are Unix seconds."""

    model_config = ConfigDict(extra="forbid")

    payer: Account
    provider: Account
    coordinator: Account
    job: str = Field(pattern="^0x[0-9a-fA-F]{32}$")
    model: str = Field(min_length=1, max_length=MAX_MODEL_NAME)
    precision: str = Field(min_length=1, max_length=32)
    verdict: Annotated[int, Field(ge=0, le=2), _WHOLE]
    receiptHash: Digest
    evidenceHash: Digest
    reportedAt: Uint64
    salt: Digest


class SignedReport(BaseModel):
    """A report and its payer's EIP-712 signature."""

    model_config = ConfigDict(extra="forbid")

    message: ReportMembers
    signature: Signature


class ReceiptMembers(BaseModel):
    """A provider's receipt, as it signed it. Costs are base units."""

    model_config = ConfigDict(extra="forbid")

    payer: Account
    provider: Account
    seq: Uint64
    cumulativeCost: Uint96
    orderHash: Digest
    resultCommitment: Digest
    inputTokens: Count
    cachedInputTokens: Count
    outputTokens: Count
    cost: Uint96
    outcome: Annotated[int, Field(ge=0, le=255), _WHOLE]
    finishedAt: Uint64
    evidenceRoot: Digest


class SignedReceipt(BaseModel):
    """A receipt and its provider's EIP-712 signature."""

    model_config = ConfigDict(extra="forbid")

    message: ReceiptMembers
    signature: Signature


class SealMembers(BaseModel):
    """This coordinator's statement that the report with this digest is of its own probe."""

    model_config = ConfigDict(extra="forbid")

    coordinator: Account
    reportHash: Digest


class SignedSeal(BaseModel):
    """A seal and this coordinator's EIP-712 signature."""

    model_config = ConfigDict(extra="forbid")

    message: SealMembers
    signature: Signature


class AuditReportBody(BaseModel):
    """A report of an audit, and the receipt of the job that was audited. `seal`: of a probe of the coordinator alone.

    `ask`: the signed ask of the job, as `GET /v1/asks` lists it; needed once it is not listed any more.
    """

    model_config = ConfigDict(extra="forbid")

    report: SignedReport
    receipt: SignedReceipt
    seal: SignedSeal | None = None
    ask: dict[str, Any] | None = None


MAX_CANDIDATE = 16_384
"""Characters of a candidate in base64."""


class FurtherOrders(BaseModel):
    """Candidates for a waiting job: order, terms, and the job's wrapped key, each as a submission has it, in base64."""

    model_config = ConfigDict(extra="forbid")

    candidates: list[Annotated[str, Field(max_length=MAX_CANDIDATE)]] = Field(min_length=1, max_length=MAX_CANDIDATES)
