// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Messages} from "../src/Messages.sol";
import {PackedRow} from "../src/PackedRow.sol";

/// @title The struct hashes that the escrow computes, as views, to check golden vectors on chain.
contract MessageHashes {
    function hashOrder(Messages.Order calldata m) external pure returns (bytes32) {
        return Messages.hash(m);
    }

    function hashReceipt(Messages.Receipt calldata m) external pure returns (bytes32) {
        return Messages.hash(m);
    }

    function hashClaim(Messages.Claim calldata m) external pure returns (bytes32) {
        return Messages.hash(m);
    }

    function hashBind(Messages.Bind calldata m) external pure returns (bytes32) {
        return Messages.hash(m);
    }

    function hashRelease(Messages.Release calldata m) external pure returns (bytes32) {
        return Messages.hash(m);
    }

    /// The hash of an order from its packed row.
    function hashRow(PackedRow.Row calldata row, address provider) external pure returns (bytes32) {
        return PackedRow.orderHash(row, provider);
    }
}
