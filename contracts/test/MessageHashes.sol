// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";

import {Messages} from "../src/Messages.sol";

/// @title Shows the hashes that the escrow computes, so that golden vectors can be checked on chain.
contract MessageHashes is EIP712("Tallystick", "1") {
    function order(Messages.Order calldata m) external view returns (bytes32) {
        return _hashTypedDataV4(Messages.hash(m));
    }

    function receipt(Messages.Receipt calldata m) external view returns (bytes32) {
        return _hashTypedDataV4(Messages.hash(m));
    }

    function claim(Messages.Claim calldata m) external view returns (bytes32) {
        return _hashTypedDataV4(Messages.hash(m));
    }

    function bind(Messages.Bind calldata m) external view returns (bytes32) {
        return _hashTypedDataV4(Messages.hash(Messages.Bind(m.key, m.owner)));
    }

    function release(Messages.Release calldata m) external view returns (bytes32) {
        return _hashTypedDataV4(Messages.hash(m));
    }
}
