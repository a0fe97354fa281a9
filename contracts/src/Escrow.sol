// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {EscrowStorage} from "./parts/EscrowStorage.sol";
import {Purses} from "./parts/Purses.sol";
import {Settlement} from "./parts/Settlement.sol";
import {Stakes} from "./parts/Stakes.sol";
import {Tabs} from "./parts/Tabs.sol";

/// @title Tallystick's escrow. It has no owner, no upgrade and no pause.
contract Escrow is Purses, Settlement, Stakes {
    /// @notice The longest wait of a deployment. It keeps times within 40 bits and prevents a mistake that locks money for good.
    uint40 public constant MAX_WAIT = 365 days;

    constructor(IERC20 token_, Rules memory rules)
        EscrowStorage(token_)
        Purses(rules.thaw)
        Tabs(rules.release)
        Stakes(rules.unstake, rules.penalty, rules.treasury)
    {
        uint40 longest = rules.thaw > rules.release ? rules.thaw : rules.release;
        if (rules.unstake > MAX_WAIT) revert WaitTooLong(rules.unstake, MAX_WAIT);
        if (rules.unstake <= longest) revert UnstakeTooShort(rules.unstake, longest);
    }
}
