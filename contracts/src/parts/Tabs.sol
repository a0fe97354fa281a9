// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

import {Messages} from "../Messages.sol";
import {PackedStorage} from "../PackedStorage.sol";
import {EscrowStorage} from "./EscrowStorage.sol";

/// @title Tabs: reservations of a purse for one provider, and their release.
abstract contract Tabs is EscrowStorage {
    using PackedStorage for PackedStorage.Funds;
    using PackedStorage for PackedStorage.Tab;

    uint40 public immutable releasePeriod;

    constructor(uint40 releasePeriod_) {
        releasePeriod = releasePeriod_;
    }

    function reserve(address key, address provider, uint256 amount) external onlyOwnerOf(key) {
        uint256 added = _amount(amount);
        if (provider == address(0)) revert ZeroAddress();
        if (provider == key || provider == msg.sender) revert SelfDealing(provider);
        PackedStorage.Funds storage funds = _funds[key];
        (uint256 free, uint256 thawing, uint256 thawAt) = funds.read();
        if (added > free - thawing) revert InsufficientFree(free - thawing, added);
        funds.write(free - added, thawing, thawAt);
        _pledge(key, provider, added);
    }

    function secure(Messages.Order calldata order, bytes calldata signature) external {
        (address payer, address provider) = (order.payer, order.provider);
        if (payer == provider) revert SelfDealing(provider);
        if (block.timestamp > order.deadline) revert Expired(order.deadline);
        _requireSignature(payer, Messages.hash(order), signature);
        PackedStorage.Funds storage funds = _funds[payer];
        if (!funds.isOpen()) revert UnknownPurse(payer);
        (uint256 free, uint256 thawing,) = funds.read();
        (, uint256 reserved, uint256 releaseAt) = _tabs[provider][payer].read();
        if (thawing != 0) revert Thawing(payer);
        if (releaseAt != 0) revert Releasing(payer, provider);
        uint256 added = _refill(order.reserveTarget, reserved, free);
        if (added == 0) revert NothingToReserve(payer, provider);
        funds.write(free - added, 0, 0);
        _pledge(payer, provider, added);
    }

    function release(address key, address provider) external onlyOwnerOf(key) {
        PackedStorage.Tab storage tab_ = _tabs[provider][key];
        (uint256 settled, uint256 reserved, uint256 releaseAt) = tab_.read();
        if (reserved == 0) revert NothingReserved(key, provider);
        if (releaseAt != 0) revert Releasing(key, provider);
        releaseAt = block.timestamp + releasePeriod;
        tab_.write(settled, reserved, releaseAt);
        emit ReleaseStarted(key, provider, releaseAt);
    }

    function finishRelease(address key, address provider) external onlyOwnerOf(key) {
        (,, uint256 releaseAt) = _tabs[provider][key].read();
        if (releaseAt == 0) revert NotReleasing(key, provider);
        if (block.timestamp < releaseAt) revert TooEarly(releaseAt);
        _unpledge(key, provider, 0);
    }

    function giveBack(address payer, uint256 floor) external {
        _dropTo(payer, msg.sender, floor);
    }

    function giveBackSigned(Messages.Release calldata consent, bytes calldata signature) external {
        if (block.timestamp > consent.deadline) revert Expired(consent.deadline);
        _requireSignature(consent.provider, Messages.hash(consent), signature);
        _dropTo(consent.payer, consent.provider, consent.floor);
    }

    function tab(address payer, address provider) external view returns (uint96 settled, uint96 reserved, uint40 releaseAt) {
        (uint256 settled_, uint256 reserved_, uint256 releaseAt_) = _tabs[provider][payer].read();
        return (uint96(settled_), uint96(reserved_), uint40(releaseAt_));
    }

    /// The amount that raises `reserved` to `target`, at most `free`.
    function _refill(uint256 target, uint256 reserved, uint256 free) internal pure returns (uint256) {
        return Math.min(Math.saturatingSub(target, reserved), free);
    }

    /// Adds to a reservation and cancels a running release.
    function _pledge(address payer, address provider, uint256 added) private {
        PackedStorage.Tab storage tab_ = _tabs[provider][payer];
        (uint256 settled, uint256 reserved,) = tab_.read();
        tab_.write(settled, reserved + added, 0);
        emit Reserved(payer, provider, added, reserved + added);
    }

    function _dropTo(address payer, address provider, uint256 floor) private {
        (, uint256 reserved,) = _tabs[provider][payer].read();
        if (reserved <= floor) revert NothingReserved(payer, provider);
        _unpledge(payer, provider, floor);
    }

    /// Lowers a reservation to `floor`. A running release ends if nothing is left.
    function _unpledge(address payer, address provider, uint256 floor) private {
        PackedStorage.Tab storage tab_ = _tabs[provider][payer];
        (uint256 settled, uint256 reserved, uint256 releaseAt) = tab_.read();
        tab_.write(settled, floor, floor == 0 ? 0 : releaseAt);
        _addFree(payer, reserved - floor);
        emit Released(payer, provider, reserved - floor, floor);
    }
}
