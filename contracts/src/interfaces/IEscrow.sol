// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Messages} from "../Messages.sol";
import {PackedRow} from "../PackedRow.sol";

/// @title The market's escrow: purses that payers fill, tabs that providers collect, stakes that back a provider's word.
/// @notice Amounts are base units of one ERC-20, times Unix seconds, rates basis points. Every call checks, computes, stores,
/// emits, then moves tokens. Signatures are plain ecrecover over EIP-712 digests: code at an address changes nothing.
interface IEscrow {
    // ---------------------------------------------------------------------------------------------------------- types

    /// What one provider collects. `signature` covers Claim(provider, rows) and is the provider's, whoever sends.
    struct ClaimBatch {
        address provider;
        PackedRow.Row[] rows;
        bytes signature;
    }

    /// Why a row was not paid.
    enum Skip {
        None,
        BadClaim, // the provider did not sign this claim
        SelfDealing, // payer and provider are the same key
        Expired, // past the order's claimBy
        BadSignature, // the payer did not sign this order for this provider
        UnknownPurse, // no purse was ever opened for the payer
        NothingOwed, // min(cumulativeCost, ceiling) is already settled
        Unfunded // nothing is left, neither reserved nor free
    }

    /// The waits and the penalty of one deployment.
    struct Rules {
        uint40 thaw; // announced wait before free money leaves a purse
        uint40 release; // announced wait before a payer takes a reservation back
        uint40 unstake; // announced wait before a stake leaves; longer than both
        uint96 penalty; // what one piece of evidence costs a provider, at most
        address treasury; // who is credited with the part of a penalty that is not the reporter's
    }

    // --------------------------------------------------------------------------------------------------------- events

    event PurseOpened(address indexed key, address indexed owner);
    event Deposited(address indexed key, uint256 amount);
    event ThawStarted(address indexed key, uint256 amount, uint256 thawAt);
    event ThawCancelled(address indexed key);
    event Withdrawn(address indexed key, address indexed owner, uint256 amount);
    event Reserved(address indexed payer, address indexed provider, uint256 amount, uint256 reserved);
    event ReleaseStarted(address indexed payer, address indexed provider, uint256 releaseAt);
    event Released(address indexed payer, address indexed provider, uint256 amount, uint256 reserved);
    /// What became of a claim's rows, in their order, two words a row: payer 160 | the tab's new total 96, and
    /// reason (Skip) 64 | fee 96 | paid 96. `paid` includes `fee`. Of a skipped row only payer and reason are set.
    event RowsSettled(address indexed provider, uint256[] results);
    event FeeEarned(address indexed coordinator, uint256 amount);
    event FeeSet(address indexed coordinator, uint256 bps);
    event PayoutSet(address indexed account, address indexed payout);
    event CashedOut(address indexed account, address indexed payout, uint256 amount);
    event Staked(address indexed provider, uint256 amount);
    event UnstakeStarted(address indexed provider, uint256 amount, uint256 unstakeAt);
    event Unstaked(address indexed provider, uint256 amount);
    event Slashed(address indexed provider, address indexed reporter, uint256 amount, uint256 reward, bytes32 evidence);

    // --------------------------------------------------------------------------------------------------------- errors

    error ZeroAmount();
    error ZeroAddress();
    error EmptyBatch();
    error AmountTooLarge(uint256 amount);
    error ShortDelivery(uint256 expected, uint256 received);
    error SelfDealing(address account);
    error BadSignature(address signer);
    error Expired(uint256 deadline);
    error TooEarly(uint256 readyAt);
    error PurseExists(address key);
    error UnknownPurse(address key);
    error NotOwner(address key, address caller);
    error InsufficientFree(uint256 available, uint256 wanted);
    error NotThawing(address key);
    error Thawing(address key);
    error Releasing(address payer, address provider);
    error NotReleasing(address payer, address provider);
    error NothingReserved(address payer, address provider);
    error NothingToReserve(address payer, address provider);
    error NoCredit(address account);
    error FeeTooHigh(uint256 bps);
    error InsufficientStake(uint256 available, uint256 wanted);
    error NotUnstaking(address provider);
    error NotEvidence();
    error EvidenceUsed(bytes32 evidence);
    error NothingAtStake(address provider);
    error BadPayee(address payee);
    error UnstakeTooShort(uint256 unstake, uint256 longest);
    error WaitTooLong(uint256 wait, uint256 longest);

    // --------------------------------------------------------------------------------------------------------- purses

    /// @notice Binds `key` to `owner`, once and for ever. Anyone may send it with the key's signature of Bind(key, owner); the
    /// key itself needs none.
    /// @dev Reverts ZeroAddress, PurseExists, BadSignature.
    function open(address key, address owner, bytes calldata signature) external;

    /// @notice Moves `amount` from the caller, who owns the purse, into its free balance. Needs an ERC-20 approval.
    /// @dev Reverts ZeroAmount, UnknownPurse, NotOwner, ShortDelivery, AmountTooLarge.
    function deposit(address key, uint256 amount) external;

    /// @notice `deposit` with an EIP-2612 permit of the caller. A permit that someone else already sent does no harm.
    function depositWithPermit(address key, uint256 amount, uint256 deadline, uint8 v, bytes32 r, bytes32 s) external;

    /// @notice Deposits by an EIP-3009 authorization of the purse's owner; anyone may send it, so the owner needs no gas. The
    /// authorization's nonce must be `authorizationNonce(key, salt)`: it can fill no other purse.
    function depositWithAuthorization(
        address key,
        uint256 amount,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 salt,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external;

    /// @notice Announces that `amount` of the free balance will leave. It can still be paid out until it is withdrawn; no
    /// reservation is refilled meanwhile. A new call replaces the amount and starts the wait again.
    /// @dev Reverts ZeroAmount, UnknownPurse, NotOwner, InsufficientFree.
    function thaw(address key, uint256 amount) external;

    /// @notice Calls a thaw off. Reverts NotThawing.
    function cancelThaw(address key) external;

    /// @notice Pays what is left of the thawed amount to the owner. Reverts NotThawing, TooEarly.
    function withdraw(address key) external;

    // ----------------------------------------------------------------------------------------------------------- tabs

    /// @notice The owner pledges `amount` more of the free balance to `provider`, and calls off a running release.
    /// @dev Reverts ZeroAmount, ZeroAddress, SelfDealing, UnknownPurse, NotOwner, InsufficientFree.
    function reserve(address key, address provider, uint256 amount) external;

    /// @notice Refills a reservation to the order's reserveTarget, as far as free money goes, without paying anything. Anyone may
    /// send it until the order's deadline.
    /// @dev Reverts SelfDealing, Expired, BadSignature, UnknownPurse, Thawing, Releasing, NothingToReserve.
    function secure(Messages.Order calldata order, bytes calldata signature) external;

    /// @notice The owner announces that it takes a reservation back. Reverts NothingReserved, Releasing.
    function release(address key, address provider) external;

    /// @notice Moves what is still reserved back to the free balance, after the wait. Reverts NotReleasing, TooEarly.
    function finishRelease(address key, address provider) external;

    /// @notice The calling provider lets its reservation on a payer's tab drop to `floor` at once. Reverts NothingReserved.
    function giveBack(address payer, uint256 floor) external;

    /// @notice `giveBack` on the provider's signature; anyone may send it, as often as it likes, until the deadline.
    /// @dev Reverts Expired, BadSignature, NothingReserved.
    function giveBackSigned(Messages.Release calldata consent, bytes calldata signature) external;

    // ------------------------------------------------------------------------------------------------------ settlement

    /// @notice Anyone may send it. Pays, row by row, min(cumulativeCost, ceiling) minus what the tab has settled: from the reservation first, then from
    /// the free balance, in part when money is short. Then refills the reservation to the order's reserveTarget, except during a
    /// thaw or a release. A row that cannot be paid is skipped with the reason; it never stops the others.
    /// @dev Every claim leaves one event, RowsSettled, with a result for each of its rows. Reverts EmptyBatch only.
    function settle(ClaimBatch[] calldata claims) external;

    /// @notice Pays an account's whole credit to its payout address. Anyone may send it. Reverts NoCredit.
    function cashOut(address account) external;

    /// @notice Sets where the caller's credit is paid to; zero means the caller itself. Reverts BadPayee.
    function setPayout(address payout) external;

    /// @notice Sets the caller's rate as a coordinator. What it gets is never above the order's maxFeeBps. Reverts FeeTooHigh.
    function setFee(uint256 bps) external;

    // --------------------------------------------------------------------------------------------------------- stakes

    /// @notice Adds to the caller's stake. Needs an ERC-20 approval. Reverts ZeroAmount, ShortDelivery, AmountTooLarge.
    function stake(uint256 amount) external;

    /// @notice Announces that `amount` in all of the caller's stake will leave; it no longer counts, but can still be slashed. A new
    /// call replaces the amount and starts the wait again; zero calls it off.
    /// @dev Reverts InsufficientStake.
    function unstake(uint256 amount) external;

    /// @notice Pays what is left of the announced amount to the caller. Reverts NotUnstaking, TooEarly.
    function withdrawStake() external;

    /// @notice Slashes a provider that signed two different receipts for one payer and seq.
    /// @dev Reverts NotEvidence, BadSignature, EvidenceUsed, NothingAtStake.
    function slashEquivocation(
        Messages.Receipt calldata first,
        bytes calldata firstSignature,
        Messages.Receipt calldata second,
        bytes calldata secondSignature
    ) external;

    /// @notice Slashes a provider that signed a claim row above its own receipt of the same or a later seq for that payer. The claim of
    /// every settled row is in the calldata of the transaction that settled it.
    /// @dev Reverts NotEvidence, BadSignature, EvidenceUsed, NothingAtStake.
    function slashOverclaim(
        Messages.Claim calldata claim,
        uint256 row,
        bytes calldata claimSignature,
        Messages.Receipt calldata receipt,
        bytes calldata receiptSignature
    ) external;

    // ---------------------------------------------------------------------------------------------------------- views

    /// @notice A purse: its owner (zero if never opened), its free balance, the part of it under thaw, and when that may leave.
    function purse(address key) external view returns (address owner, uint96 free, uint96 thawing, uint40 thawAt);

    /// @notice A tab: paid so far in all, reserved now, and when a running release ends (zero if none runs).
    function tab(address payer, address provider) external view returns (uint96 settled, uint96 reserved, uint40 releaseAt);

    /// @notice Credit to cash out, the address it goes to, and the rate as a coordinator.
    function account(address who) external view returns (uint96 credit, address payout, uint16 feeBps);

    /// @notice The stake that counts, the part that is leaving, and when it may.
    function stakeOf(address provider) external view returns (uint96 staked, uint96 unstaking, uint40 unstakeAt);

    /// @notice The EIP-3009 nonce that binds an authorization to one purse.
    function authorizationNonce(address key, bytes32 salt) external pure returns (bytes32);

    /// @notice Whether this piece of evidence has cost the provider the whole penalty. Until then it can be brought again.
    function evidenceUsed(bytes32 evidence) external view returns (bool);
}
