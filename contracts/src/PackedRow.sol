// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Messages} from "./Messages.sol";

/// @title A settlement row in calldata, packed into seven words. Unpacked it would take fourteen, and zero bytes cost gas too.
/// @dev The provider is the claim's. An order for another provider has another digest, so its signature does not verify.
library PackedRow {
    struct Row {
        uint256 payerAndCeiling; // payer 160 | ceiling 96
        uint256 coordinatorAndTarget; // coordinator 160 | reserveTarget 96
        uint256 numbers; // order's seq 64 | deadline 64 | claimBy 64 | receipt's seq 64
        uint256 costAndFee; // unused 144 | cumulativeCost 96 | maxFeeBps 16
        bytes32 termsHash;
        bytes32 r; // the payer's signature of the order, EIP-2098
        bytes32 vs;
    }

    function payer(Row calldata row) internal pure returns (address) {
        return address(uint160(row.payerAndCeiling >> 96));
    }

    function ceiling(Row calldata row) internal pure returns (uint256) {
        return uint96(row.payerAndCeiling);
    }

    function coordinator(Row calldata row) internal pure returns (address) {
        return address(uint160(row.coordinatorAndTarget >> 96));
    }

    function reserveTarget(Row calldata row) internal pure returns (uint256) {
        return uint96(row.coordinatorAndTarget);
    }

    function claimBy(Row calldata row) internal pure returns (uint256) {
        return uint64(row.numbers >> 64);
    }

    function receiptSeq(Row calldata row) internal pure returns (uint256) {
        return uint64(row.numbers);
    }

    function cumulativeCost(Row calldata row) internal pure returns (uint256) {
        return uint96(row.costAndFee >> 16);
    }

    function maxFeeBps(Row calldata row) internal pure returns (uint256) {
        return uint16(row.costAndFee);
    }

    /// The struct hash of the row's order, which its payer signed.
    function orderHash(Row calldata row, address provider) internal pure returns (bytes32) {
        return Messages.hashOrder(
            payer(row),
            provider,
            ceiling(row),
            reserveTarget(row),
            uint64(row.numbers >> 192), // seq
            uint64(row.numbers >> 128), // deadline
            claimBy(row),
            maxFeeBps(row),
            coordinator(row),
            row.termsHash
        );
    }
}
