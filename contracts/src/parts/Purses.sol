// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";

import {IERC3009} from "../interfaces/IERC3009.sol";
import {Messages} from "../Messages.sol";
import {Ledger} from "./Ledger.sol";

/// @title Purses: opened once for a key, filled and emptied by their owner.
abstract contract Purses is Ledger {
    uint40 public immutable thawPeriod;

    constructor(uint40 thawPeriod_) {
        thawPeriod = thawPeriod_;
    }

    function open(address key, address owner, bytes calldata signature) external {
        if (key == address(0) || owner == address(0)) revert ZeroAddress();
        if (_owner[key] != address(0)) revert PurseExists(key);
        if (msg.sender != key) _requireSignature(key, Messages.hash(Messages.Bind(key, owner)), signature);
        _owner[key] = owner;
        _funds[key].opened = true;
        emit PurseOpened(key, owner);
    }

    function deposit(address key, uint256 amount) public nonReentrant onlyOwnerOf(key) {
        uint96 added = _amount(amount);
        _pull(msg.sender, amount);
        _credit(key, added);
    }

    function depositWithPermit(address key, uint256 amount, uint256 deadline, uint8 v, bytes32 r, bytes32 s) external {
        // A front-run permit reverts here and has still given the allowance, so a failure says nothing.
        try IERC20Permit(address(token)).permit(msg.sender, address(this), amount, deadline, v, r, s) {} catch {}
        deposit(key, amount);
    }

    function depositWithAuthorization(
        address key,
        uint256 amount,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 salt,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external nonReentrant {
        address owner = _owner[key];
        if (owner == address(0)) revert UnknownPurse(key);
        uint96 added = _amount(amount);
        uint256 held = token.balanceOf(address(this));
        IERC3009(address(token)).receiveWithAuthorization(
            owner, address(this), amount, validAfter, validBefore, authorizationNonce(key, salt), v, r, s
        );
        _received(held, amount);
        _credit(key, added);
    }

    function thaw(address key, uint256 amount) external onlyOwnerOf(key) {
        Funds memory funds = _funds[key];
        uint96 leaving = _amount(amount);
        if (leaving > funds.free) revert InsufficientFree(funds.free, leaving);
        funds.thawing = leaving;
        funds.thawAt = uint40(block.timestamp) + thawPeriod;
        _funds[key] = funds;
        emit ThawStarted(key, leaving, funds.thawAt);
    }

    function cancelThaw(address key) external onlyOwnerOf(key) {
        Funds memory funds = _funds[key];
        if (funds.thawing == 0) revert NotThawing(key);
        funds.thawing = 0;
        funds.thawAt = 0;
        _funds[key] = funds;
        emit ThawCancelled(key);
    }

    function withdraw(address key) external nonReentrant onlyOwnerOf(key) {
        Funds memory funds = _funds[key];
        uint96 amount = funds.thawing;
        if (amount == 0) revert NotThawing(key);
        if (block.timestamp < funds.thawAt) revert TooEarly(funds.thawAt);
        funds.free -= amount;
        funds.thawing = 0;
        funds.thawAt = 0;
        _funds[key] = funds;
        emit Withdrawn(key, msg.sender, amount);
        _push(msg.sender, amount);
    }

    function purse(address key) external view returns (address owner, uint96 free, uint96 thawing, uint40 thawAt) {
        Funds memory funds = _funds[key];
        return (_owner[key], funds.free, funds.thawing, funds.thawAt);
    }

    function authorizationNonce(address key, bytes32 salt) public pure returns (bytes32) {
        return keccak256(abi.encode(key, salt));
    }

    /// After the token has moved, since only then is it known to have; `_received` bounds the sum and the guard bars the way back in.
    function _credit(address key, uint96 amount) private {
        _funds[key].free += amount;
        emit Deposited(key, amount);
    }
}
