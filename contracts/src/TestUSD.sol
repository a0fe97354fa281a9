// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";

import {IERC3009} from "./interfaces/IERC3009.sol";

/// @title A test dollar for local chains: 6 decimals, EIP-2612, the receiving half of EIP-3009, and an open faucet.
contract TestUSD is ERC20, ERC20Permit, IERC3009 {
    /// @notice The most that one mint gives: a billion dollars. It keeps the supply within 96 bits in practice.
    uint256 public constant MINT_LIMIT = 1e15;

    bytes32 private constant RECEIVE_TYPEHASH = keccak256(
        "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
    );

    mapping(address authorizer => mapping(bytes32 nonce => bool)) public authorizationState;

    error MintTooLarge(uint256 amount, uint256 limit);
    error NotPayee(address payee, address caller);
    error OutsideValidity(uint256 validAfter, uint256 validBefore);
    error AuthorizationAlreadyUsed(address authorizer, bytes32 nonce);
    error BadAuthorization(address authorizer);

    constructor() ERC20("Test USD", "TUSD") ERC20Permit("Test USD") {}

    function decimals() public pure override returns (uint8) {
        return 6;
    }

    function mint(address to, uint256 amount) external {
        if (amount > MINT_LIMIT) revert MintTooLarge(amount, MINT_LIMIT);
        _mint(to, amount);
    }

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
    ) external {
        if (to != msg.sender) revert NotPayee(to, msg.sender);
        if (block.timestamp <= validAfter || block.timestamp >= validBefore) revert OutsideValidity(validAfter, validBefore);
        if (authorizationState[from][nonce]) revert AuthorizationAlreadyUsed(from, nonce);
        bytes32 digest =
            _hashTypedDataV4(keccak256(abi.encode(RECEIVE_TYPEHASH, from, to, value, validAfter, validBefore, nonce)));
        (address signer,,) = ECDSA.tryRecover(digest, v, r, s);
        if (signer != from || signer == address(0)) revert BadAuthorization(from);
        authorizationState[from][nonce] = true;
        emit AuthorizationUsed(from, nonce);
        _transfer(from, to, value);
    }
}
