// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";

import {IEscrow} from "../interfaces/IEscrow.sol";
import {PackedStorage} from "../PackedStorage.sol";

/// @title The storage that all parts share, and the only two functions that move tokens.
/// @dev The token's supply must fit 96 bits; `_pull` keeps the whole balance below that, so sums of balances never overflow.
abstract contract EscrowStorage is IEscrow, EIP712, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;
    using PackedStorage for PackedStorage.Funds;

    /// The fee rate shares a word with the credit, so that charging a fee costs one word and not two.
    struct Account {
        uint96 credit;
        uint16 feeBps;
    }

    struct Stake {
        uint96 staked;
        uint96 unstaking;
        uint40 unstakeAt;
    }

    uint256 internal constant BPS = 10_000;

    IERC20 public immutable token;

    mapping(address key => PackedStorage.Funds) internal _funds;
    mapping(address key => address) internal _owner;
    mapping(address provider => mapping(address payer => PackedStorage.Tab)) internal _tabs;
    mapping(address who => Account) internal _accounts;
    mapping(address who => address) internal _payout;
    mapping(address provider => Stake) internal _stakes;
    mapping(bytes32 evidence => uint96) internal _taken;

    constructor(IERC20 token_) EIP712("Tallystick", "1") {
        if (address(token_) == address(0)) revert ZeroAddress();
        token = token_;
    }

    modifier onlyOwnerOf(address key) {
        address owner = _owner[key];
        if (owner == address(0)) revert UnknownPurse(key);
        if (msg.sender != owner) revert NotOwner(key, msg.sender);
        _;
    }

    /// Takes exactly `amount`. Reverts for a token that keeps a fee on transfers.
    function _pull(address from, uint256 amount) internal {
        uint256 held = token.balanceOf(address(this));
        token.safeTransferFrom(from, address(this), amount);
        _received(held, amount);
    }

    function _push(address to, uint256 amount) internal {
        token.safeTransfer(to, amount);
    }

    function _received(uint256 heldBefore, uint256 amount) internal view {
        uint256 held = token.balanceOf(address(this));
        uint256 received = Math.saturatingSub(held, heldBefore);
        if (received != amount) revert ShortDelivery(amount, received);
        if (held > type(uint96).max) revert AmountTooLarge(held);
    }

    function _amount(uint256 amount) internal pure returns (uint96) {
        if (amount == 0) revert ZeroAmount();
        if (amount > type(uint96).max) revert AmountTooLarge(amount);
        return uint96(amount);
    }

    /// Credit that is paid to the escrow itself, or to its token, would be lost.
    function _requirePayee(address payee) internal view {
        if (payee == address(this) || payee == address(token)) revert BadPayee(payee);
    }

    function _addFree(address key, uint256 amount) internal {
        PackedStorage.Funds storage funds = _funds[key];
        (uint256 free, uint256 thawing, uint256 thawAt) = funds.read();
        funds.write(free + amount, thawing, thawAt);
    }

    /// Plain ecrecover with low s. Code at the signer's address makes no difference.
    function _requireSignature(address signer, bytes32 structHash, bytes calldata signature) internal view {
        (address recovered,,) = ECDSA.tryRecoverCalldata(_hashTypedDataV4(structHash), signature);
        if (recovered != signer || signer == address(0)) revert BadSignature(signer);
    }
}
