// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title A token that keeps a fee, blocks accounts, calls back, lies or says nothing: what the escrow must survive.
contract HostileToken is ERC20("Hostile", "HOST") {
    /// What a transfer answers: true, false without having moved anything, or nothing at all.
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

    /// Every transfer loses so many base units from now on.
    function setFee(uint256 units) external {
        fee = units;
    }

    function setBlocked(address account, bool value) external {
        blocked[account] = value;
    }

    function setAnswer(Answer value) external {
        answer = value;
    }

    /// During every transfer this call is made; its failure makes the transfer fail, unless `patient_`. An empty target calls nobody.
    function setCallback(address target_, bytes calldata data, bool patient_) external {
        (target, callback, patient) = (target_, data, patient_);
    }

    /// The token itself takes part in the market: it makes a call and fails as the call does.
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

    /// As EIP-3009, but believes everybody.
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
