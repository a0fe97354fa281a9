// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Messages} from "../Messages.sol";
import {PackedRow} from "../PackedRow.sol";

/// @title The market's escrow: purses of payers, tabs between payers and providers, stakes of providers.
/// @notice Amounts are base units of one ERC-20 token, times are Unix seconds, rates are basis points. Each call checks,
/// computes, stores, emits events, and moves tokens last. Signatures are plain ecrecover over EIP-712 digests: code at the
/// signer's address makes no difference.
interface IEscrow {
    // ---------------------------------------------------------------------------------------------------------- types

    /// @notice The rows that one provider collects. `signature` is the provider's, over Claim(provider, rows), whoever sends it.
    struct ClaimBatch {
        address provider;
        PackedRow.Row[] rows;
        bytes signature;
    }

    /// @notice The reason for which a row was not paid; None if it was paid.
    enum SkipReason {
        None,
        BadClaim, // the provider did not sign this claim
        SelfDealing, // payer and provider are the same key
        Expired, // the order's claimBy is over
        BadSignature, // the payer did not sign this order for this provider
        UnknownPurse, // no purse was ever opened for the payer
        NothingOwed, // min(cumulativeCost, ceiling) is already settled
        Unfunded // no money is left, neither reserved nor free
    }

    /// @notice The waits and the penalty of one deployment.
    struct Rules {
        uint40 thaw; // seconds between the announcement and the withdrawal of free money
        uint40 release; // seconds between the announcement and the end of a reservation
        uint40 unstake; // seconds between the announcement and the withdrawal of a stake; longer than the other two
        uint96 penalty; // the most that one piece of evidence costs a provider, in base units
        address treasury; // the account that is credited with the rest of a penalty after the reporter's share
    }

    // --------------------------------------------------------------------------------------------------------- events

    /// @notice A signing key was bound to an owner.
    /// @param key The signing key that names the purse.
    /// @param owner The account that may withdraw from the purse.
    event PurseOpened(address indexed key, address indexed owner);

    /// @notice A purse was filled.
    /// @param key The purse.
    /// @param amount The amount added to its free balance.
    event Deposited(address indexed key, uint256 amount);

    /// @notice The owner announced a withdrawal.
    /// @param key The purse.
    /// @param amount The amount under thaw, in all.
    /// @param thawAt The time from which it may be withdrawn.
    event ThawStarted(address indexed key, uint256 amount, uint256 thawAt);

    /// @notice The owner cancelled a thaw.
    /// @param key The purse.
    event ThawCancelled(address indexed key);

    /// @notice Thawed money was paid to the owner.
    /// @param key The purse.
    /// @param owner The account that was paid.
    /// @param amount The amount paid.
    event Withdrawn(address indexed key, address indexed owner, uint256 amount);

    /// @notice More of a purse was reserved for a provider.
    /// @param payer The purse.
    /// @param provider The provider.
    /// @param amount The amount added to the reservation.
    /// @param reserved The reservation after it.
    event Reserved(address indexed payer, address indexed provider, uint256 amount, uint256 reserved);

    /// @notice The owner announced the end of a reservation.
    /// @param payer The purse.
    /// @param provider The provider.
    /// @param releaseAt The time from which the reservation may be taken back.
    event ReleaseStarted(address indexed payer, address indexed provider, uint256 releaseAt);

    /// @notice A reservation was reduced; the difference returned to the free balance.
    /// @param payer The purse.
    /// @param provider The provider.
    /// @param amount The amount returned.
    /// @param reserved The reservation after it.
    event Released(address indexed payer, address indexed provider, uint256 amount, uint256 reserved);

    /// @notice The results of a claim's rows, in their order.
    /// @param provider The provider whose claim it was.
    /// @param results Two words per row. The first is payer (160 bits) and the tab's new settled total (96 bits); the second is
    /// the SkipReason (64 bits), the fee (96 bits) and the amount paid including the fee (96 bits). A skipped row has only payer
    /// and reason set.
    event RowsSettled(address indexed provider, uint256[] results);

    /// @notice A coordinator was credited with the fees of consecutive rows.
    /// @param coordinator The coordinator.
    /// @param amount The sum of the fees.
    event FeeEarned(address indexed coordinator, uint256 amount);

    /// @notice A coordinator changed its rate.
    /// @param coordinator The coordinator.
    /// @param bps The new rate in basis points.
    event FeeSet(address indexed coordinator, uint256 bps);

    /// @notice An account changed its payout address.
    /// @param account The account.
    /// @param payout The address to which its credit is paid from now on.
    event PayoutSet(address indexed account, address indexed payout);

    /// @notice An account's credit was paid out.
    /// @param account The account.
    /// @param payout The address that was paid.
    /// @param amount The amount paid.
    event CashedOut(address indexed account, address indexed payout, uint256 amount);

    /// @notice A provider added to its stake.
    /// @param provider The provider.
    /// @param amount The amount added.
    event Staked(address indexed provider, uint256 amount);

    /// @notice A provider announced the withdrawal of a part of its stake, or cancelled it.
    /// @param provider The provider.
    /// @param amount The amount that leaves, in all; zero if the withdrawal was cancelled.
    /// @param unstakeAt The time from which it may be withdrawn; zero if the withdrawal was cancelled.
    event UnstakeStarted(address indexed provider, uint256 amount, uint256 unstakeAt);

    /// @notice The announced part of a stake was paid to its provider.
    /// @param provider The provider.
    /// @param amount The amount paid.
    event Unstaked(address indexed provider, uint256 amount);

    /// @notice A provider lost stake on evidence.
    /// @param provider The provider.
    /// @param reporter The account that submitted the evidence.
    /// @param amount The amount lost.
    /// @param reward The reporter's share of it; the treasury is credited with the rest.
    /// @param evidence The identifier of the evidence (see `evidenceUsed`).
    event Slashed(address indexed provider, address indexed reporter, uint256 amount, uint256 reward, bytes32 evidence);

    // --------------------------------------------------------------------------------------------------------- errors

    /// @notice The amount is zero.
    error ZeroAmount();

    /// @notice An address is zero.
    error ZeroAddress();

    /// @notice The settlement has no claims.
    error EmptyBatch();

    /// @notice The amount does not fit 96 bits.
    /// @param amount The amount given.
    error AmountTooLarge(uint256 amount);

    /// @notice The token delivered less than it was asked for.
    /// @param expected The amount asked for.
    /// @param received The amount that arrived.
    error ShortDelivery(uint256 expected, uint256 received);

    /// @notice Payer and provider are the same party.
    /// @param account The provider.
    error SelfDealing(address account);

    /// @notice A signature is missing, malformed or of another account.
    /// @param signer The account that should have signed.
    error BadSignature(address signer);

    /// @notice The message's deadline is over.
    /// @param deadline The deadline.
    error Expired(uint256 deadline);

    /// @notice The announced wait is not over.
    /// @param readyAt The time from which the call succeeds.
    error TooEarly(uint256 readyAt);

    /// @notice The key already has a purse.
    /// @param key The key.
    error PurseExists(address key);

    /// @notice No purse was ever opened for the key.
    /// @param key The key.
    error UnknownPurse(address key);

    /// @notice The caller does not own the purse.
    /// @param key The purse.
    /// @param caller The caller.
    error NotOwner(address key, address caller);

    /// @notice The purse has too little free money.
    /// @param available The free money that the call may use.
    /// @param wanted The amount asked for.
    error InsufficientFree(uint256 available, uint256 wanted);

    /// @notice The purse has no thaw.
    /// @param key The purse.
    error NotThawing(address key);

    /// @notice The purse has a thaw, during which no reservation is refilled.
    /// @param key The purse.
    error Thawing(address key);

    /// @notice The reservation is already being released.
    /// @param payer The purse.
    /// @param provider The provider.
    error Releasing(address payer, address provider);

    /// @notice The reservation is not being released.
    /// @param payer The purse.
    /// @param provider The provider.
    error NotReleasing(address payer, address provider);

    /// @notice Nothing is reserved, or nothing above the floor given.
    /// @param payer The purse.
    /// @param provider The provider.
    error NothingReserved(address payer, address provider);

    /// @notice The reservation already has its target, or the purse has no free money.
    /// @param payer The purse.
    /// @param provider The provider.
    error NothingToReserve(address payer, address provider);

    /// @notice The account has no credit.
    /// @param account The account.
    error NoCredit(address account);

    /// @notice The rate is above 100 %.
    /// @param bps The rate given, in basis points.
    error FeeTooHigh(uint256 bps);

    /// @notice The stake is too small.
    /// @param available The whole stake, including the part that is leaving.
    /// @param wanted The amount asked for.
    error InsufficientStake(uint256 available, uint256 wanted);

    /// @notice No part of the stake is leaving.
    /// @param provider The provider.
    error NotUnstaking(address provider);

    /// @notice The messages do not contradict each other.
    error NotEvidence();

    /// @notice This evidence has already cost the provider the whole penalty.
    /// @param evidence The identifier of the evidence.
    error EvidenceUsed(bytes32 evidence);

    /// @notice The provider has no stake to lose.
    /// @param provider The provider.
    error NothingAtStake(address provider);

    /// @notice The escrow or its token cannot be a payout address.
    /// @param payee The address given.
    error BadPayee(address payee);

    /// @notice The deployment's unstake wait is not longer than its other waits.
    /// @param unstake The unstake wait.
    /// @param longest The longer of the two other waits.
    error UnstakeTooShort(uint256 unstake, uint256 longest);

    /// @notice A wait of the deployment is above the limit.
    /// @param wait The wait given.
    /// @param longest The limit.
    error WaitTooLong(uint256 wait, uint256 longest);

    // --------------------------------------------------------------------------------------------------------- purses

    /// @notice Opens the purse of a signing key and binds it to its owner, once and for good. Anyone may send it with the key's
    /// signature; the key itself needs none.
    /// @dev Reverts with ZeroAddress, PurseExists or BadSignature.
    /// @param key The signing key.
    /// @param owner The account that may withdraw, reserve and release.
    /// @param signature The key's signature of Bind(key, owner); ignored if the key is the caller.
    function open(address key, address owner, bytes calldata signature) external;

    /// @notice Moves tokens from the caller, who owns the purse, into its free balance. Needs an ERC-20 approval.
    /// @dev Reverts with ZeroAmount, UnknownPurse, NotOwner, ShortDelivery or AmountTooLarge.
    /// @param key The purse.
    /// @param amount The amount to move.
    function deposit(address key, uint256 amount) external;

    /// @notice `deposit` with an EIP-2612 permit of the caller. A permit that was already used does no harm if the allowance is
    /// there.
    /// @dev Reverts like `deposit`.
    /// @param key The purse.
    /// @param amount The amount to move, which the permit allows.
    /// @param deadline The permit's deadline.
    /// @param v The permit's signature, v.
    /// @param r The permit's signature, r.
    /// @param s The permit's signature, s.
    function depositWithPermit(address key, uint256 amount, uint256 deadline, uint8 v, bytes32 r, bytes32 s) external;

    /// @notice Deposits on an EIP-3009 authorization of the purse's owner. Anyone may send it, so the owner needs no gas.
    /// @dev The authorization's nonce must be `authorizationNonce(key, salt)`, so it can fill no other purse. Reverts like
    /// `deposit`, and with the token's own errors.
    /// @param key The purse.
    /// @param amount The amount to move, which the authorization names.
    /// @param validAfter The time after which the authorization is valid.
    /// @param validBefore The time before which the authorization is valid.
    /// @param salt The number that makes the authorization's nonce unique.
    /// @param v The authorization's signature, v.
    /// @param r The authorization's signature, r.
    /// @param s The authorization's signature, s.
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

    /// @notice Announces the withdrawal of free money. Until it is withdrawn it still pays providers, and no reservation is
    /// refilled. Another call replaces the amount and starts the wait again.
    /// @dev Only the owner. Reverts with ZeroAmount, UnknownPurse, NotOwner or InsufficientFree.
    /// @param key The purse.
    /// @param amount The amount to withdraw later.
    function thaw(address key, uint256 amount) external;

    /// @notice Cancels a thaw.
    /// @dev Only the owner. Reverts with UnknownPurse, NotOwner or NotThawing.
    /// @param key The purse.
    function cancelThaw(address key) external;

    /// @notice Pays the rest of the thawed amount to the owner.
    /// @dev Only the owner. Reverts with UnknownPurse, NotOwner, NotThawing or TooEarly.
    /// @param key The purse.
    function withdraw(address key) external;

    // ----------------------------------------------------------------------------------------------------------- tabs

    /// @notice Reserves more of the free balance for a provider, and cancels a running release.
    /// @dev Only the owner. Reverts with ZeroAmount, ZeroAddress, SelfDealing, UnknownPurse, NotOwner or InsufficientFree.
    /// @param key The purse.
    /// @param provider The provider.
    /// @param amount The amount to add to the reservation.
    function reserve(address key, address provider, uint256 amount) external;

    /// @notice Raises a reservation to the order's reserveTarget, or by all free money if that is less. Pays nothing. Anyone may
    /// send it until the order's deadline.
    /// @dev Reverts with SelfDealing, Expired, BadSignature, UnknownPurse, Thawing, Releasing or NothingToReserve.
    /// @param order The order.
    /// @param signature The payer's signature of the order.
    function secure(Messages.Order calldata order, bytes calldata signature) external;

    /// @notice Announces the end of a reservation.
    /// @dev Only the owner. Reverts with UnknownPurse, NotOwner, NothingReserved or Releasing.
    /// @param key The purse.
    /// @param provider The provider.
    function release(address key, address provider) external;

    /// @notice Moves the rest of a reservation back to the free balance after the wait.
    /// @dev Only the owner. Reverts with UnknownPurse, NotOwner, NotReleasing or TooEarly.
    /// @param key The purse.
    /// @param provider The provider.
    function finishRelease(address key, address provider) external;

    /// @notice Lowers the calling provider's reservation on a payer's tab at once.
    /// @dev Reverts with NothingReserved.
    /// @param payer The purse.
    /// @param floor The reservation that remains.
    function giveBack(address payer, uint256 floor) external;

    /// @notice `giveBack` on the provider's signature. Anyone may send it, any number of times, until the deadline.
    /// @dev Reverts with Expired, BadSignature or NothingReserved.
    /// @param consent The provider's consent.
    /// @param signature The provider's signature of the consent.
    function giveBackSigned(Messages.Release calldata consent, bytes calldata signature) external;

    // ------------------------------------------------------------------------------------------------------ settlement

    /// @notice Pays the rows of signed claims. Anyone may send it. A row is due min(cumulativeCost, ceiling) less the amount that
    /// the tab has settled. It is paid from the reservation first, then from the free balance, and in part if money is short.
    /// The reservation is then refilled to the order's reserveTarget, except during a thaw or a release. A row that cannot be
    /// paid is skipped and does not stop the others.
    /// @dev Emits one RowsSettled per claim, with a result for each row. Reverts with EmptyBatch only.
    /// @param claims The claims.
    function settle(ClaimBatch[] calldata claims) external;

    /// @notice Pays an account's whole credit to its payout address. Anyone may send it.
    /// @dev Reverts with NoCredit.
    /// @param account The account.
    function cashOut(address account) external;

    /// @notice Sets the address to which the caller's credit is paid.
    /// @dev Reverts with BadPayee.
    /// @param payout The address; zero means the caller itself.
    function setPayout(address payout) external;

    /// @notice Sets the caller's rate as a coordinator. A fee is never above the order's maxFeeBps.
    /// @dev Reverts with FeeTooHigh.
    /// @param bps The rate in basis points of each payment.
    function setFee(uint256 bps) external;

    // --------------------------------------------------------------------------------------------------------- stakes

    /// @notice Adds to the caller's stake. Needs an ERC-20 approval.
    /// @dev Reverts with ZeroAmount, ShortDelivery or AmountTooLarge.
    /// @param amount The amount to add.
    function stake(uint256 amount) external;

    /// @notice Announces the withdrawal of a part of the caller's stake. That part no longer counts as stake, but can still be
    /// slashed. Another call replaces the amount and starts the wait again.
    /// @dev Reverts with InsufficientStake.
    /// @param amount The amount that leaves, in all; zero cancels the withdrawal.
    function unstake(uint256 amount) external;

    /// @notice Pays the rest of the announced amount to the caller after the wait.
    /// @dev Reverts with NotUnstaking or TooEarly.
    function withdrawStake() external;

    /// @notice Slashes a provider that signed two different receipts for one payer and seq. The caller is credited with the
    /// reporter's share.
    /// @dev Reverts with NotEvidence, BadSignature, EvidenceUsed or NothingAtStake.
    /// @param first One receipt.
    /// @param firstSignature The provider's signature of it.
    /// @param second The other receipt.
    /// @param secondSignature The provider's signature of it.
    function slashEquivocation(
        Messages.Receipt calldata first,
        bytes calldata firstSignature,
        Messages.Receipt calldata second,
        bytes calldata secondSignature
    ) external;

    /// @notice Slashes a provider that signed a claim row above its own receipt of the same or a later seq for that payer. The
    /// caller is credited with the reporter's share.
    /// @dev The claim of each settled row is in the calldata of the transaction that settled it. Reverts with NotEvidence,
    /// BadSignature, EvidenceUsed or NothingAtStake.
    /// @param claim The claim.
    /// @param row The index of the row that claims too much.
    /// @param claimSignature The provider's signature of the claim.
    /// @param receipt The receipt with the lower total.
    /// @param receiptSignature The provider's signature of the receipt.
    function slashOverclaim(
        Messages.Claim calldata claim,
        uint256 row,
        bytes calldata claimSignature,
        Messages.Receipt calldata receipt,
        bytes calldata receiptSignature
    ) external;

    // ---------------------------------------------------------------------------------------------------------- views

    /// @notice The purse of a signing key.
    /// @param key The signing key.
    /// @return owner The owner; zero if the purse was never opened.
    /// @return free The free balance, including the part under thaw.
    /// @return thawing The part of it under thaw.
    /// @return thawAt The time from which that part may be withdrawn; zero without a thaw.
    function purse(address key) external view returns (address owner, uint96 free, uint96 thawing, uint40 thawAt);

    /// @notice The tab of a payer with a provider.
    /// @param payer The purse.
    /// @param provider The provider.
    /// @return settled The total paid so far, including fees.
    /// @return reserved The amount reserved now.
    /// @return releaseAt The time from which the reservation may be taken back; zero without a release.
    function tab(address payer, address provider) external view returns (uint96 settled, uint96 reserved, uint40 releaseAt);

    /// @notice The credit and the settings of an account.
    /// @param who The account.
    /// @return credit The amount that can be cashed out.
    /// @return payout The address to which it is paid.
    /// @return feeBps The account's rate as a coordinator, in basis points.
    function account(address who) external view returns (uint96 credit, address payout, uint16 feeBps);

    /// @notice The stake of a provider.
    /// @param provider The provider.
    /// @return staked The stake that counts.
    /// @return unstaking The part that is leaving, which can still be slashed.
    /// @return unstakeAt The time from which that part may be withdrawn; zero if nothing is leaving.
    function stakeOf(address provider) external view returns (uint96 staked, uint96 unstaking, uint40 unstakeAt);

    /// @notice The EIP-3009 nonce that binds an authorization to one purse.
    /// @param key The purse.
    /// @param salt The number that makes the nonce unique.
    /// @return The nonce.
    function authorizationNonce(address key, bytes32 salt) external pure returns (bytes32);

    /// @notice Whether evidence has cost its provider the whole penalty. Until then it can be submitted again.
    /// @param evidence keccak256 of ABI-encoded ("equivocation" or "overclaim", provider, payer, seq).
    /// @return Whether the whole penalty was paid.
    function evidenceUsed(bytes32 evidence) external view returns (bool);
}
