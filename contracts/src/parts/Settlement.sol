// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Memory} from "@openzeppelin/contracts/utils/Memory.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

import {Messages} from "../Messages.sol";
import {PackedRow} from "../PackedRow.sol";
import {PackedStorage} from "../PackedStorage.sol";
import {Tabs} from "./Tabs.sol";

/// @title Settlement: pays what the payer's order and the provider's claim agree on. It makes no external call.
abstract contract Settlement is Tabs {
    using PackedRow for PackedRow.Row;
    using PackedStorage for PackedStorage.Funds;
    using PackedStorage for PackedStorage.Tab;

    /// The fees of consecutive rows with one coordinator, stored once at the end of the run.
    struct FeeRun {
        address coordinator;
        uint256 bps;
        uint256 earned;
    }

    function settle(ClaimBatch[] calldata claims) external {
        if (claims.length == 0) revert EmptyBatch();
        FeeRun memory fees;
        bytes32 domain = _domainSeparatorV4();
        for (uint256 i; i < claims.length; ++i) {
            // The next claim needs none of this one's memory, and growing memory costs a large batch several percent.
            Memory.Pointer free = Memory.getFreeMemoryPointer();
            ClaimBatch calldata claim = claims[i];
            _settleClaim(domain, claim.provider, claim.rows, claim.signature, fees);
            Memory.unsafeSetFreeMemoryPointer(free);
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
        _requirePayee(payout);
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

    function _settleClaim(
        bytes32 domain,
        address provider,
        PackedRow.Row[] calldata rows,
        bytes calldata signature,
        FeeRun memory fees
    ) private {
        bytes32[] memory digests = new bytes32[](rows.length);
        bool claimed = _readClaim(domain, provider, rows, signature, digests);
        mapping(address => PackedStorage.Tab) storage tabs = _tabs[provider];
        uint256[] memory results = new uint256[](2 * rows.length);
        uint256 earned;
        for (uint256 i; i < rows.length; ++i) {
            PackedRow.Row calldata row = rows[i];
            address payer = row.payer();
            SkipReason reason = claimed ? _objection(row, payer, provider, digests[i]) : SkipReason.BadClaim;
            (uint256 paid, uint256 fee, uint256 settled) = (0, 0, 0);
            if (reason == SkipReason.None) {
                (reason, paid, settled) = _charge(row, _funds[payer], tabs[payer]);
                fee = _fee(fees, row, paid);
            }
            // A fee is part of the payment, payments are money that the contract holds, and rows fit in calldata.
            unchecked {
                earned += paid - fee;
                results[2 * i] = uint256(uint160(payer)) << 96 | settled;
                results[2 * i + 1] = uint256(reason) << 192 | fee << 96 | paid;
            }
        }
        if (earned != 0) _accounts[provider].credit += uint96(earned);
        emit RowsSettled(provider, results);
    }

    /// Fills in the order digest of each row. Returns whether the provider signed the rows. The signature is also needed if the
    /// provider itself sends the claim: every claim that pays is possible evidence against its provider.
    function _readClaim(
        bytes32 domain,
        address provider,
        PackedRow.Row[] calldata rows,
        bytes calldata signature,
        bytes32[] memory digests
    ) private pure returns (bool) {
        bytes32[] memory hashes = new bytes32[](rows.length);
        for (uint256 i; i < rows.length; ++i) {
            Memory.Pointer free = Memory.getFreeMemoryPointer();
            PackedRow.Row calldata row = rows[i];
            bytes32 digest = MessageHashUtils.toTypedDataHash(domain, row.orderHash(provider));
            digests[i] = digest;
            hashes[i] = Messages.hashRow(row.payer(), digest, row.receiptSeq(), row.cumulativeCost());
            Memory.unsafeSetFreeMemoryPointer(free);
        }
        bytes32 claim = MessageHashUtils.toTypedDataHash(domain, Messages.hashClaim(provider, hashes));
        (address signer,,) = ECDSA.tryRecoverCalldata(claim, signature);
        return signer == provider && signer != address(0);
    }

    /// The reason to skip the row that does not depend on balances, or None.
    function _objection(PackedRow.Row calldata row, address payer, address provider, bytes32 digest)
        private
        view
        returns (SkipReason)
    {
        if (payer == provider) return SkipReason.SelfDealing;
        if (block.timestamp > row.claimBy()) return SkipReason.Expired;
        (address signer,,) = ECDSA.tryRecover(digest, row.r, row.vs);
        if (signer != payer || signer == address(0)) return SkipReason.BadSignature;
        return SkipReason.None;
    }

    /// Moves the money of one row, from the reservation first and then from the free balance, and refills the reservation.
    function _charge(PackedRow.Row calldata row, PackedStorage.Funds storage funds, PackedStorage.Tab storage tab_)
        private
        returns (SkipReason reason, uint256 paid, uint256 total)
    {
        (uint256 settled, uint256 reserved, uint256 releaseAt) = tab_.read();
        uint256 due = Math.min(row.cumulativeCost(), row.ceiling());
        if (due <= settled) return (SkipReason.NothingOwed, 0, 0);
        (uint256 free, uint256 thawing, uint256 thawAt) = funds.read();
        // No overflow below: due is above settled, and each sum is money that the contract holds.
        unchecked {
            due -= settled;
            uint256 fromReserved = Math.min(due, reserved);
            uint256 fromFree = Math.min(due - fromReserved, free);
            paid = fromReserved + fromFree;
            if (paid == 0) return (funds.isOpen() ? SkipReason.Unfunded : SkipReason.UnknownPurse, 0, 0);
            total = settled + paid;
            reserved -= fromReserved;
            free -= fromFree;
            if (thawing != 0) {
                thawing = Math.min(thawing, free);
                if (thawing == 0) thawAt = 0;
            } else if (releaseAt == 0) {
                uint256 added = _refill(row.reserveTarget(), reserved, free);
                reserved += added;
                free -= added;
            }
        }
        tab_.write(total, reserved, releaseAt);
        funds.write(free, thawing, thawAt);
    }

    /// The coordinator's share of `paid` at its own rate, capped by the rate that the payer signed. Rounds down.
    function _fee(FeeRun memory fees, PackedRow.Row calldata row, uint256 paid) private returns (uint256 fee) {
        uint256 maxFeeBps = row.maxFeeBps();
        if (maxFeeBps == 0 || paid == 0) return 0;
        address coordinator = row.coordinator();
        if (coordinator != fees.coordinator) {
            _payFees(fees);
            fees.coordinator = coordinator;
            fees.bps = _accounts[coordinator].feeBps;
        }
        // Amounts fit 96 bits, and rates are at most BPS.
        unchecked {
            fee = paid * Math.min(fees.bps, maxFeeBps) / BPS;
            fees.earned += fee;
        }
    }

    function _payFees(FeeRun memory fees) private {
        if (fees.earned == 0) return;
        _accounts[fees.coordinator].credit += uint96(fees.earned);
        emit FeeEarned(fees.coordinator, fees.earned);
        fees.earned = 0;
    }
}
