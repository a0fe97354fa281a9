// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";

import {Messages} from "../Messages.sol";
import {Tabs} from "./Tabs.sol";

/// @title Settlement: pays what the two halves of the stick agree on. No call leaves this contract on the way.
abstract contract Settlement is Tabs {
    /// What consecutive rows of one coordinator have earned it, written once at the end of the run.
    struct FeeRun {
        address coordinator;
        uint256 bps;
        uint256 earned;
    }

    function settle(ClaimBatch[] calldata claims) external {
        if (claims.length == 0) revert EmptyBatch();
        FeeRun memory fees;
        for (uint256 i; i < claims.length; ++i) {
            ClaimBatch calldata claim = claims[i];
            bytes32[] memory digests = _digests(claim.rows);
            if (_signed(claim, digests)) _settleRows(claim, digests, fees);
            else _skipAll(claim);
        }
        _payFees(fees);
    }

    function cashOut(address who) external nonReentrant {
        uint96 amount = _accounts[who].credit;
        if (amount == 0) revert NoCredit(who);
        address payout = _payoutOf(who);
        _accounts[who].credit = 0;
        emit CashedOut(who, payout, amount);
        _push(payout, amount);
    }

    function setPayout(address payout) external {
        _payout[msg.sender] = payout;
        emit PayoutSet(msg.sender, _payoutOf(msg.sender));
    }

    function setFee(uint256 bps) external {
        if (bps > BPS) revert FeeTooHigh(bps);
        _accounts[msg.sender].feeBps = uint16(bps);
        emit FeeSet(msg.sender, bps);
    }

    function account(address who) external view returns (uint96 credit, address payout, uint16 feeBps) {
        Account memory account_ = _accounts[who];
        return (account_.credit, _payoutOf(who), account_.feeBps);
    }

    function _payoutOf(address who) private view returns (address) {
        address payout = _payout[who];
        return payout == address(0) ? who : payout;
    }

    function _digests(SettleRow[] calldata rows) private view returns (bytes32[] memory digests) {
        digests = new bytes32[](rows.length);
        for (uint256 i; i < rows.length; ++i) {
            digests[i] = _hashTypedDataV4(Messages.hash(rows[i].order));
        }
    }

    function _signed(ClaimBatch calldata claim, bytes32[] memory digests) private view returns (bool) {
        if (msg.sender == claim.provider && claim.signature.length == 0) return true;
        bytes32[] memory hashes = new bytes32[](digests.length);
        for (uint256 i; i < hashes.length; ++i) {
            SettleRow calldata row = claim.rows[i];
            hashes[i] = Messages.hashRow(row.order.payer, digests[i], row.seq, row.cumulativeCost);
        }
        bytes32 digest = _hashTypedDataV4(Messages.hashClaim(claim.provider, hashes));
        (address signer,,) = ECDSA.tryRecoverCalldata(digest, claim.signature);
        return signer == claim.provider && signer != address(0);
    }

    function _skipAll(ClaimBatch calldata claim) private {
        for (uint256 i; i < claim.rows.length; ++i) {
            emit RowSkipped(claim.rows[i].order.payer, claim.provider, Skip.BadClaim);
        }
    }

    function _settleRows(ClaimBatch calldata claim, bytes32[] memory digests, FeeRun memory fees) private {
        address provider = claim.provider;
        uint256 earned;
        for (uint256 i; i < digests.length; ++i) {
            SettleRow calldata row = claim.rows[i];
            Skip reason = _objection(row, provider, digests[i]);
            uint256 paid;
            uint256 settled;
            if (reason == Skip.None) (reason, paid, settled) = _charge(row, provider);
            if (reason != Skip.None) {
                emit RowSkipped(row.order.payer, provider, reason);
                continue;
            }
            uint256 fee = _fee(fees, row.order, paid);
            earned += paid - fee;
            emit Settled(row.order.payer, provider, paid, fee, settled);
        }
        if (earned != 0) _accounts[provider].credit += uint96(earned);
    }

    /// Why the row cannot stand, whatever the balances are.
    function _objection(SettleRow calldata row, address provider, bytes32 digest) private view returns (Skip) {
        Messages.Order calldata order = row.order;
        if (order.provider != provider) return Skip.WrongProvider;
        if (order.payer == provider) return Skip.SelfDealing;
        if (block.timestamp > order.claimBy) return Skip.Expired;
        (address signer,,) = ECDSA.tryRecover(digest, row.r, row.vs);
        if (signer != order.payer || signer == address(0)) return Skip.BadSignature;
        return Skip.None;
    }

    /// Moves the money of one row: reservation first, then free balance; then refills the reservation.
    function _charge(SettleRow calldata row, address provider) private returns (Skip, uint256 paid, uint256 settled) {
        Messages.Order calldata order = row.order;
        Funds memory funds = _funds[order.payer];
        if (!funds.opened) return (Skip.UnknownPurse, 0, 0);
        Tab memory tab_ = _tabs[order.payer][provider];
        uint96 due = row.cumulativeCost < order.ceiling ? row.cumulativeCost : order.ceiling;
        if (due <= tab_.settled) return (Skip.NothingOwed, 0, 0);
        due -= tab_.settled;

        uint96 fromReserved = due < tab_.reserved ? due : tab_.reserved;
        uint96 fromFree = due - fromReserved < funds.free ? due - fromReserved : funds.free;
        paid = fromReserved + fromFree;
        if (paid == 0) return (Skip.Unfunded, 0, 0);
        tab_.settled += uint96(paid);
        tab_.reserved -= fromReserved;
        funds.free -= fromFree;

        if (funds.thawing != 0) {
            if (funds.thawing > funds.free) funds.thawing = funds.free;
        } else if (tab_.releaseAt == 0) {
            uint96 added = _refill(order.reserveTarget, tab_.reserved, funds.free);
            tab_.reserved += added;
            funds.free -= added;
        }
        _tabs[order.payer][provider] = tab_;
        _funds[order.payer] = funds;
        return (Skip.None, paid, tab_.settled);
    }

    /// The coordinator's part of `paid`: its own rate, never above the rate that the payer signed. Rounds down.
    function _fee(FeeRun memory fees, Messages.Order calldata order, uint256 paid) private returns (uint256 fee) {
        if (order.coordinator != fees.coordinator) {
            _payFees(fees);
            fees.coordinator = order.coordinator;
            fees.bps = _accounts[order.coordinator].feeBps;
        }
        fee = paid * (fees.bps < order.maxFeeBps ? fees.bps : order.maxFeeBps) / BPS;
        fees.earned += fee;
    }

    function _payFees(FeeRun memory fees) private {
        if (fees.earned == 0) return;
        _accounts[fees.coordinator].credit += uint96(fees.earned);
        emit FeeEarned(fees.coordinator, fees.earned);
        fees.earned = 0;
    }
}
