// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";

import {IERC3009} from "../interfaces/IERC3009.sol";
import {Messages} from "../Messages.sol";
import {PackedStorage} from "../PackedStorage.sol";
import {EscrowStorage} from "./EscrowStorage.sol";

/// @title Purses: opened once per signing key, filled and emptied by their owner.
abstract contract Purses is EscrowStorage {
    using PackedStorage for PackedStorage.Funds;

    uint40 public immutable thawPeriod;

    constructor(uint40 thawPeriod_) {
        thawPeriod = thawPeriod_;
    }

    function open(address key, address owner, bytes calldata signature) external {
        if (key == address(0) || owner == address(0)) revert ZeroAddress();
        if (_owner[key] != address(0)) revert PurseExists(key);
        if (msg.sender != key) _requireSignature(key, Messages.hash(Messages.Bind(key, owner)), signature);
        _owner[key] = owner;
        _funds[key].write(0, 0, 0);
        emit PurseOpened(key, owner);
    }

    function deposit(address key, uint256 amount) public nonReentrant onlyOwnerOf(key) {
        uint96 added = _amount(amount);
        _pull(msg.sender, amount);
        _credit(key, added);
    }

    function depositWithPermit(address key, uint256 amount, uint256 deadline, uint8 v, bytes32 r, bytes32 s) external {
        // A permit that someone else sent first reverts here, but the allowance exists: a failure is not an error.
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
        PackedStorage.Funds storage funds = _funds[key];
        (uint256 free,,) = funds.read();
        uint256 thawing = _amount(amount);
        if (thawing > free) revert InsufficientFree(free, thawing);
        uint256 thawAt = block.timestamp + thawPeriod;
        funds.write(free, thawing, thawAt);
        emit ThawStarted(key, thawing, thawAt);
    }

    function cancelThaw(address key) external onlyOwnerOf(key) {
        PackedStorage.Funds storage funds = _funds[key];
        (uint256 free, uint256 thawing,) = funds.read();
        if (thawing == 0) revert NotThawing(key);
        funds.write(free, 0, 0);
        emit ThawCancelled(key);
    }

    function withdraw(address key) external nonReentrant onlyOwnerOf(key) {
        PackedStorage.Funds storage funds = _funds[key];
        (uint256 free, uint256 thawing, uint256 thawAt) = funds.read();
        if (thawing == 0) revert NotThawing(key);
        if (block.timestamp < thawAt) revert TooEarly(thawAt);
        funds.write(free - thawing, 0, 0);
        emit Withdrawn(key, msg.sender, thawing);
        _push(msg.sender, thawing);
    }

    function purse(address key) external view returns (address owner, uint96 free, uint96 thawing, uint40 thawAt) {
        (uint256 free_, uint256 thawing_, uint256 thawAt_) = _funds[key].read();
        return (_owner[key], uint96(free_), uint96(thawing_), uint40(thawAt_));
    }

    function authorizationNonce(address key, bytes32 salt) public pure returns (bytes32) {
        return keccak256(abi.encode(key, salt));
    }

    /// Called after the token moved, when its delivery is certain. `_received` bounds the sum, and the guard prevents reentrancy.
    function _credit(address key, uint96 amount) private {
        _addFree(key, amount);
        emit Deposited(key, amount);
    }
}
