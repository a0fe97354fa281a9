// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title A token that keeps a fee, blocks accounts, calls back, lies or returns nothing: the escrow must survive all of it.
contract HostileToken is ERC20("Hostile", "HOST") {
    /// The result of a transfer: true, false without moving anything, or no data.
    enum Answer {
        True,
        False,
        Nothing
    }

    uint256 public fee;
    mapping(address => bool) public blocked;
    address public target;
    bytes public callback;
    bool public patient;
    Answer public answer;

    error Blocked(address account);

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    function burn(address from, uint256 amount) external {
        _burn(from, amount);
    }

    function decimals() public pure override returns (uint8) {
        return 6;
    }

    /// From now on every transfer loses this many base units.
    function setFee(uint256 units) external {
        fee = units;
    }

    function setBlocked(address account, bool value) external {
        blocked[account] = value;
    }

    function setAnswer(Answer value) external {
        answer = value;
    }

    /// Makes this call during every transfer. If it fails, so does the transfer, unless `patient_`. A zero target makes no call.
    function setCallback(address target_, bytes calldata data, bool patient_) external {
        (target, callback, patient) = (target_, data, patient_);
    }

    /// Makes a call as the token itself, and reverts as the call does.
    function act(address to, bytes calldata data) external {
        _call(to, data, false);
    }

    function transfer(address to, uint256 amount) public override returns (bool) {
        return _answer(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) public override returns (bool) {
        _spendAllowance(from, msg.sender, amount);
        return _answer(from, to, amount);
    }

    /// Like EIP-3009, without checking the signature.
    function receiveWithAuthorization(address from, address to, uint256 amount, uint256, uint256, bytes32, uint8, bytes32, bytes32)
        external
    {
        _answer(from, to, amount);
    }

    function _answer(address from, address to, uint256 amount) private returns (bool) {
        if (answer == Answer.False) return false;
        _transfer(from, to, amount);
        if (answer == Answer.Nothing) {
            assembly ("memory-safe") {
                return(0, 0)
            }
        }
        return true;
    }

    function _update(address from, address to, uint256 amount) internal override {
        if (blocked[from]) revert Blocked(from);
        if (blocked[to]) revert Blocked(to);
        if (from == address(0) || fee == 0) {
            super._update(from, to, amount);
        } else {
            super._update(from, to, amount - fee);
            super._update(from, address(0), fee);
        }
        bool moved = from != address(0) && to != address(0);
        if (moved && target != address(0)) _call(target, callback, patient);
    }

    function _call(address to, bytes memory data, bool patient_) private {
        (bool ok, bytes memory said) = to.call(data);
        if (ok || patient_) return;
        assembly ("memory-safe") {
            revert(add(said, 32), mload(said))
        }
    }
}
