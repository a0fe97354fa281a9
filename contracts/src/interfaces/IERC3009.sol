// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title The part of EIP-3009 that the escrow uses: a transfer signed by the payer that only the payee can execute.
interface IERC3009 {
    /// @notice An authorization was used.
    /// @param authorizer The account that signed it.
    /// @param nonce Its nonce.
    event AuthorizationUsed(address indexed authorizer, bytes32 indexed nonce);

    /// @notice Moves tokens to the caller on the payer's EIP-712 signature. Each nonce is used once.
    /// @param from The payer, who signed.
    /// @param to The payee, which must be the caller.
    /// @param value The amount in base units.
    /// @param validAfter The time after which the authorization is valid, in Unix seconds.
    /// @param validBefore The time before which the authorization is valid, in Unix seconds.
    /// @param nonce The authorization's nonce.
    /// @param v The signature, v.
    /// @param r The signature, r.
    /// @param s The signature, s.
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
    /// @param authorizer The payer.
    /// @param nonce The nonce.
    /// @return Whether an authorization with this nonce was used.
    function authorizationState(address authorizer, bytes32 nonce) external view returns (bool);
}
