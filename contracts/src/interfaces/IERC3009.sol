// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title The part of EIP-3009 that the escrow uses: a transfer signed by the payer that only the payee can execute.
interface IERC3009 {
    event AuthorizationUsed(address indexed authorizer, bytes32 indexed nonce);

    /// @notice Moves `value` from `from` to `to`, who must be the caller, on `from`'s EIP-712 signature; each nonce once.
    function receiveWithAuthorization(
        address from,
        address to,
        uint256 value,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external;

    /// @notice Whether a nonce was used.
    function authorizationState(address authorizer, bytes32 nonce) external view returns (bool);
}
