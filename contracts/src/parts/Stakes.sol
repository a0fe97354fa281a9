// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

import {Messages} from "../Messages.sol";
import {EscrowStorage} from "./EscrowStorage.sol";

/// @title Stakes: a provider's bond, slashed on two kinds of signed evidence.
abstract contract Stakes is EscrowStorage {
    /// @notice The reporter's share of a penalty. It is a minority, so self-reporting is no way around the unstake wait.
    uint256 public constant REPORTER_BPS = 2_000;

    uint40 public immutable unstakePeriod;
    uint96 public immutable penalty;
    address public immutable treasury;

    constructor(uint40 unstakePeriod_, uint96 penalty_, address treasury_) {
        if (penalty_ == 0) revert ZeroAmount();
        if (treasury_ == address(0)) revert ZeroAddress();
        _requirePayee(treasury_);
        unstakePeriod = unstakePeriod_;
        penalty = penalty_;
        treasury = treasury_;
    }

    function stake(uint256 amount) external nonReentrant {
        uint96 added = _amount(amount);
        _pull(msg.sender, amount);
        _stakes[msg.sender].staked += added;
        emit Staked(msg.sender, amount);
    }

    function unstake(uint256 amount) external {
        Stake memory bond = _stakes[msg.sender];
        uint96 total = bond.staked + bond.unstaking;
        if (amount > total) revert InsufficientStake(total, amount);
        bond.unstaking = uint96(amount);
        bond.staked = total - bond.unstaking;
        bond.unstakeAt = amount == 0 ? 0 : uint40(block.timestamp) + unstakePeriod;
        _stakes[msg.sender] = bond;
        emit UnstakeStarted(msg.sender, amount, bond.unstakeAt);
    }

    function withdrawStake() external nonReentrant {
        Stake memory bond = _stakes[msg.sender];
        uint96 amount = bond.unstaking;
        if (amount == 0) revert NotUnstaking(msg.sender);
        if (block.timestamp < bond.unstakeAt) revert TooEarly(bond.unstakeAt);
        bond.unstaking = 0;
        bond.unstakeAt = 0;
        _stakes[msg.sender] = bond;
        emit Unstaked(msg.sender, amount);
        _push(msg.sender, amount);
    }

    function slashEquivocation(
        Messages.Receipt calldata first,
        bytes calldata firstSignature,
        Messages.Receipt calldata second,
        bytes calldata secondSignature
    ) external {
        bytes32 firstHash = Messages.hash(first);
        bytes32 secondHash = Messages.hash(second);
        bool sameJob = first.provider == second.provider && first.payer == second.payer && first.seq == second.seq;
        if (!sameJob || firstHash == secondHash) revert NotEvidence();
        _requireSignature(first.provider, firstHash, firstSignature);
        _requireSignature(first.provider, secondHash, secondSignature);
        _slash(first.provider, keccak256(abi.encode("equivocation", first.provider, first.payer, first.seq)));
    }

    function slashOverclaim(
        Messages.Claim calldata claim,
        uint256 row,
        bytes calldata claimSignature,
        Messages.Receipt calldata receipt,
        bytes calldata receiptSignature
    ) external {
        if (row >= claim.rows.length) revert NotEvidence();
        Messages.ClaimRow calldata claimed = claim.rows[row];
        bool sameTab = claim.provider == receipt.provider && claimed.payer == receipt.payer;
        bool above = claimed.seq <= receipt.seq && claimed.cumulativeCost > receipt.cumulativeCost;
        if (!sameTab || !above) revert NotEvidence();
        _requireSignature(claim.provider, Messages.hash(claim), claimSignature);
        _requireSignature(claim.provider, Messages.hash(receipt), receiptSignature);
        _slash(claim.provider, keccak256(abi.encode("overclaim", claim.provider, claimed.payer, claimed.seq)));
    }

    function stakeOf(address provider) external view returns (uint96 staked, uint96 unstaking, uint40 unstakeAt) {
        Stake memory bond = _stakes[provider];
        return (bond.staked, bond.unstaking, bond.unstakeAt);
    }

    function evidenceUsed(bytes32 evidence) external view returns (bool) {
        return _taken[evidence] == penalty;
    }

    /// Takes the penalty, or the whole stake if that is less: first from the stake that counts, then from the part that leaves.
    /// An unpaid rest stays due, so a provider cannot use evidence up before it stakes.
    function _slash(address provider, bytes32 evidence) private {
        uint96 due = penalty - _taken[evidence];
        if (due == 0) revert EvidenceUsed(evidence);
        Stake memory bond = _stakes[provider];
        uint96 fromStaked = uint96(Math.min(due, bond.staked));
        uint96 fromUnstaking = uint96(Math.min(due - fromStaked, bond.unstaking));
        uint96 taken = fromStaked + fromUnstaking;
        if (taken == 0) revert NothingAtStake(provider);
        _taken[evidence] += taken;
        bond.staked -= fromStaked;
        bond.unstaking -= fromUnstaking;
        if (bond.unstaking == 0) bond.unstakeAt = 0;
        _stakes[provider] = bond;

        uint96 reward = uint96(taken * REPORTER_BPS / BPS);
        _accounts[msg.sender].credit += reward;
        _accounts[treasury].credit += taken - reward;
        emit Slashed(provider, msg.sender, taken, reward, evidence);
    }
}
