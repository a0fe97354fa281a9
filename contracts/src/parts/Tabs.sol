// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Messages} from "../Messages.sol";
import {Ledger} from "./Ledger.sol";

/// @title Tabs: what a purse pledges to one provider, and how the pledge ends.
abstract contract Tabs is Ledger {
    uint40 public immutable releasePeriod;

    constructor(uint40 releasePeriod_) {
        releasePeriod = releasePeriod_;
    }

    function reserve(address key, address provider, uint256 amount) external onlyOwnerOf(key) {
        uint96 added = _amount(amount);
        if (provider == address(0)) revert ZeroAddress();
        if (provider == key || provider == msg.sender) revert SelfDealing(provider);
        Funds memory funds = _funds[key];
        uint96 available = funds.free - funds.thawing;
        if (added > available) revert InsufficientFree(available, added);
        funds.free -= added;
        _funds[key] = funds;
        _pledge(key, provider, added);
    }

    function secure(Messages.Order calldata order, bytes calldata signature) external {
        (address payer, address provider) = (order.payer, order.provider);
        if (payer == provider) revert SelfDealing(provider);
        if (block.timestamp > order.deadline) revert Expired(order.deadline);
        _requireSignature(payer, Messages.hash(order), signature);
        Funds memory funds = _funds[payer];
        Tab memory tab_ = _tabs[payer][provider];
        if (!funds.opened) revert UnknownPurse(payer);
        if (funds.thawing != 0) revert Thawing(payer);
        if (tab_.releaseAt != 0) revert Releasing(payer, provider);
        uint96 added = _refill(order.reserveTarget, tab_.reserved, funds.free);
        if (added == 0) revert NothingToReserve(payer, provider);
        funds.free -= added;
        _funds[payer] = funds;
        _pledge(payer, provider, added);
    }

    function release(address key, address provider) external onlyOwnerOf(key) {
        Tab memory tab_ = _tabs[key][provider];
        if (tab_.reserved == 0) revert NothingReserved(key, provider);
        if (tab_.releaseAt != 0) revert Releasing(key, provider);
        tab_.releaseAt = uint40(block.timestamp) + releasePeriod;
        _tabs[key][provider] = tab_;
        emit ReleaseStarted(key, provider, tab_.releaseAt);
    }

    function finishRelease(address key, address provider) external onlyOwnerOf(key) {
        Tab memory tab_ = _tabs[key][provider];
        if (tab_.releaseAt == 0) revert NotReleasing(key, provider);
        if (block.timestamp < tab_.releaseAt) revert TooEarly(tab_.releaseAt);
        _unpledge(key, provider, tab_, 0);
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
        Tab memory tab_ = _tabs[payer][provider];
        return (tab_.settled, tab_.reserved, tab_.releaseAt);
    }

    /// What brings `reserved` up to `target`, as far as `free` goes.
    function _refill(uint96 target, uint96 reserved, uint96 free) internal pure returns (uint96) {
        if (target <= reserved) return 0;
        uint96 missing = target - reserved;
        return missing < free ? missing : free;
    }

    function _pledge(address payer, address provider, uint96 added) private {
        Tab memory tab_ = _tabs[payer][provider];
        tab_.reserved += added;
        tab_.releaseAt = 0;
        _tabs[payer][provider] = tab_;
        emit Reserved(payer, provider, added, tab_.reserved);
    }

    function _dropTo(address payer, address provider, uint256 floor) private {
        Tab memory tab_ = _tabs[payer][provider];
        if (tab_.reserved <= floor) revert NothingReserved(payer, provider);
        _unpledge(payer, provider, tab_, uint96(floor));
    }

    /// Brings a reservation down to `floor`; a release that was running ends with it.
    function _unpledge(address payer, address provider, Tab memory tab_, uint96 floor) private {
        uint96 freed = tab_.reserved - floor;
        tab_.reserved = floor;
        if (floor == 0) tab_.releaseAt = 0;
        _tabs[payer][provider] = tab_;
        _funds[payer].free += freed;
        emit Released(payer, provider, freed, floor);
    }
}
