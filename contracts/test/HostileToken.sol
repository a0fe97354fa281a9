// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title A token that keeps a fee, blocks accounts, calls back, or says nothing: what the escrow must survive.
contract HostileToken is ERC20("Hostile", "HOST") {
    uint256 public fee;
    mapping(address => bool) public blocked;
    address public target;
    bytes public callback;

    error Blocked(address account);

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
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

    /// During every transfer this call is made; its failure makes the transfer fail. An empty target calls nobody.
    function setCallback(address target_, bytes calldata data) external {
        (target, callback) = (target_, data);
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
        if (from != address(0) && target != address(0)) {
            (bool ok, bytes memory said) = target.call(callback);
            if (!ok) {
                assembly ("memory-safe") {
                    revert(add(said, 32), mload(said))
                }
            }
        }
    }
}
