// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title The signed structs that the chain reads, with their EIP-712 type strings and hashes.
/// @notice tallystick/protocol/messages.py defines the same structs; golden vectors in tests/vectors keep the two equal.
library Messages {
    /// A payer's order on one provider. `ceiling` is the cap on the tab's total over its whole life; times are Unix seconds.
    struct Order {
        address payer;
        address provider;
        uint96 ceiling;
        uint96 reserveTarget;
        uint64 seq;
        uint64 deadline;
        uint64 claimBy;
        uint16 maxFeeBps;
        address coordinator;
        bytes32 termsHash;
    }

    /// A provider's signed statement of one job and of the tab's new total.
    struct Receipt {
        address payer;
        address provider;
        uint64 seq;
        uint96 cumulativeCost;
        bytes32 orderHash;
        bytes32 resultCommitment;
        uint32 inputTokens;
        uint32 cachedInputTokens;
        uint32 outputTokens;
        uint96 cost;
        uint8 outcome;
        uint64 finishedAt;
        bytes32 evidenceRoot;
    }

    /// One tab to collect, on the order with this EIP-712 digest.
    struct ClaimRow {
        address payer;
        bytes32 orderHash;
        uint64 seq;
        uint96 cumulativeCost;
    }

    /// A provider's claim: anyone may collect these rows for it.
    struct Claim {
        address provider;
        ClaimRow[] rows;
    }

    /// A signing key's agreement to spend a purse of this owner.
    struct Bind {
        address key;
        address owner;
    }

    /// A provider's consent to lower the reservation for it on a tab to `floor`.
    struct Release {
        address payer;
        address provider;
        uint96 floor;
        uint64 deadline;
    }

    bytes32 internal constant ORDER_TYPEHASH = keccak256(
        "Order(address payer,address provider,uint96 ceiling,uint96 reserveTarget,uint64 seq,uint64 deadline,"
        "uint64 claimBy,uint16 maxFeeBps,address coordinator,bytes32 termsHash)"
    );
    bytes32 internal constant RECEIPT_TYPEHASH = keccak256(
        "Receipt(address payer,address provider,uint64 seq,uint96 cumulativeCost,bytes32 orderHash,"
        "bytes32 resultCommitment,uint32 inputTokens,uint32 cachedInputTokens,uint32 outputTokens,uint96 cost,"
        "uint8 outcome,uint64 finishedAt,bytes32 evidenceRoot)"
    );
    bytes32 internal constant CLAIM_ROW_TYPEHASH =
        keccak256("ClaimRow(address payer,bytes32 orderHash,uint64 seq,uint96 cumulativeCost)");
    bytes32 internal constant CLAIM_TYPEHASH = keccak256(
        "Claim(address provider,ClaimRow[] rows)"
        "ClaimRow(address payer,bytes32 orderHash,uint64 seq,uint96 cumulativeCost)"
    );
    bytes32 internal constant BIND_TYPEHASH = keccak256("Bind(address key,address owner)");
    bytes32 internal constant RELEASE_TYPEHASH =
        keccak256("Release(address payer,address provider,uint96 floor,uint64 deadline)");

    function hash(Order calldata order) internal pure returns (bytes32) {
        return keccak256(abi.encode(ORDER_TYPEHASH, order));
    }

    /// `hash` of an order from its fields: building a struct in memory first costs more gas. Each number must fit its field.
    function hashOrder(
        address payer,
        address provider,
        uint256 ceiling,
        uint256 reserveTarget,
        uint256 seq,
        uint256 deadline,
        uint256 claimBy,
        uint256 maxFeeBps,
        address coordinator,
        bytes32 termsHash
    ) internal pure returns (bytes32) {
        return keccak256(
            abi.encode(
                ORDER_TYPEHASH,
                payer,
                provider,
                ceiling,
                reserveTarget,
                seq,
                deadline,
                claimBy,
                maxFeeBps,
                coordinator,
                termsHash
            )
        );
    }

    function hash(Receipt calldata receipt) internal pure returns (bytes32) {
        return keccak256(abi.encode(RECEIPT_TYPEHASH, receipt));
    }

    /// Each number must fit its field.
    function hashRow(address payer, bytes32 orderHash, uint256 seq, uint256 cumulativeCost) internal pure returns (bytes32) {
        return keccak256(abi.encode(CLAIM_ROW_TYPEHASH, payer, orderHash, seq, cumulativeCost));
    }

    /// The hash of a claim from the hashes of its rows.
    function hashClaim(address provider, bytes32[] memory rows) internal pure returns (bytes32) {
        return keccak256(abi.encode(CLAIM_TYPEHASH, provider, keccak256(abi.encodePacked(rows))));
    }

    function hash(Claim calldata claim) internal pure returns (bytes32) {
        bytes32[] memory rows = new bytes32[](claim.rows.length);
        for (uint256 i; i < rows.length; ++i) {
            ClaimRow calldata row = claim.rows[i];
            rows[i] = hashRow(row.payer, row.orderHash, row.seq, row.cumulativeCost);
        }
        return hashClaim(claim.provider, rows);
    }

    function hash(Bind memory bind) internal pure returns (bytes32) {
        return keccak256(abi.encode(BIND_TYPEHASH, bind));
    }

    function hash(Release calldata release) internal pure returns (bytes32) {
        return keccak256(abi.encode(RELEASE_TYPEHASH, release));
    }
}
