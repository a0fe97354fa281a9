// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title The two storage words of a settlement, packed by hand: each row reads and writes each of them once.
library PackedStorage {
    /// A purse's money: free 96 | thawing 96 | thawAt 40 | opened 8. Always thawing <= free.
    struct Funds {
        uint256 word;
    }

    /// One payer's account with one provider: settled 96 | reserved 96 | releaseAt 64.
    struct Tab {
        uint256 word;
    }

    uint256 private constant OPENED = 1 << 232;

    /// A guard that is never reached: sums of money that the contract holds fit 96 bits.
    error WordOverflow();

    function isOpen(Funds storage self) internal view returns (bool) {
        return self.word != 0;
    }

    function read(Funds storage self) internal view returns (uint256 free, uint256 thawing, uint256 thawAt) {
        uint256 word = self.word;
        return (uint96(word), uint96(word >> 96), uint40(word >> 192));
    }

    function write(Funds storage self, uint256 free, uint256 thawing, uint256 thawAt) internal {
        if ((free | thawing) >> 96 != 0) revert WordOverflow();
        self.word = free | thawing << 96 | thawAt << 192 | OPENED;
    }

    function read(Tab storage self) internal view returns (uint256 settled, uint256 reserved, uint256 releaseAt) {
        uint256 word = self.word;
        return (uint96(word), uint96(word >> 96), word >> 192);
    }

    function write(Tab storage self, uint256 settled, uint256 reserved, uint256 releaseAt) internal {
        if ((settled | reserved) >> 96 != 0) revert WordOverflow();
        self.word = settled | reserved << 96 | releaseAt << 192;
    }
}
