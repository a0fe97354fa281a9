"""A Merkle tree over an append-only list of leaves, as RFC 9162 (section 2.1) defines it, with SHA-256. Pure.

A proof is described by ranges of leaves: the hash of each range is one hash of the proof. A log stores with each leaf the hashes
of the complete subtrees that end with it (`Edge.append`), so a proof takes O(log n) rows of it (`rows`, `range_hash`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tallystick.protocol.types import Hash

EMPTY_ROOT = Hash(hashlib.sha256().digest())
"""The root of a tree without leaves."""
HASH_SIZE = 32

Range = tuple[int, int]
"""A range of leaves: the first one, and the one after the last."""
ReadNode = Callable[[int, int], bytes]
"""Returns the hash of the complete subtree of 2**level leaves that ends with leaf `row`, given `row` and `level`."""


def leaf_hash(data: bytes) -> Hash:
    """The hash of a leaf. Its prefix differs from that of a node, so no leaf passes for a subtree."""
    return Hash(hashlib.sha256(b"\x00" + data).digest())


def node_hash(left: bytes, right: bytes) -> Hash:
    """The hash of a subtree of two parts."""
    return Hash(hashlib.sha256(b"\x01" + left + right).digest())


@dataclass(slots=True)
class Edge:
    """The right edge of a tree: the roots of its complete subtrees, largest first. That is all that appending takes."""

    size: int = 0
    roots: list[Hash] = field(default_factory=list)

    def append(self, leaf: Hash) -> tuple[Hash, ...]:
        """Adds a leaf by its hash. Returns the hashes of the complete subtrees that end with it, smallest first."""
        completed = [leaf]
        number = self.size
        while number & 1:
            completed.append(node_hash(self.roots.pop(), completed[-1]))
            number >>= 1
        self.roots.append(completed[-1])
        self.size += 1
        return tuple(completed)

    def root(self) -> Hash:
        """The root of the whole tree."""
        return _fold(self.roots)

    def copy(self) -> Edge:
        """An edge of its own with the same leaves."""
        return Edge(self.size, list(self.roots))

    @classmethod
    def load(cls, size: int, node: ReadNode) -> Edge:
        """The edge of a stored tree. The rows that it reads: `rows([(0, size)])`."""
        return cls(size, [Hash(node(row, level)) for row, level in _cover(0, size)] if size else [])


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """The ranges of the proof that leaf `index` is in the tree of `size` leaves, as RFC 9162 2.1.3.1 orders them."""
    if not 0 <= index < size:
        raise ValueError(f"expected a leaf below {size}, got {index}")
    low, high, ranges = 0, size, list[Range]()
    while high - low > 1:
        middle = _split(low, high)
        if index < middle:
            ranges.append((middle, high))
            high = middle
        else:
            ranges.append((low, middle))
            low = middle
    return ranges[::-1]


def consistency_ranges(first: int, second: int) -> list[Range]:
    """The ranges of the proof that the tree of `first` leaves is the beginning of that of `second` (RFC 9162 2.1.4.1)."""
    if not 0 <= first <= second:
        raise ValueError(f"expected a size up to {second}, got {first}")
    if not first:
        return []
    low, high, ranges = 0, second, list[Range]()
    while high != first:
        middle = _split(low, high)
        if first <= middle:
            ranges.append((middle, high))
            high = middle
        else:
            ranges.append((low, middle))
            low = middle
    if low:
        ranges.append((low, high))
    return ranges[::-1]


def span_ranges(span: Range, size: int) -> list[Range]:
    """The ranges of the proof that the leaves of `span` are in the tree of `size` leaves: those beside it, from left to right."""
    first, end = span
    if not 0 <= first < end <= size:
        raise ValueError(f"expected a range of leaves below {size}, got {first} to {end}")

    def beside(low: int, high: int) -> Iterator[Range]:
        if high <= first or low >= end:
            yield low, high
        elif low < first or high > end:
            middle = _split(low, high)
            yield from beside(low, middle)
            yield from beside(middle, high)

    return list(beside(0, size))


def includes_span(root: bytes, size: int, first: int, leaves: Sequence[bytes], proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that the leaves of these hashes have the numbers from `first` on in the tree of this root and size.

    It costs one hash a leaf, and its proof is no longer than that of two leaves.
    """
    end = first + len(leaves)
    if not 0 <= first < end <= size or any(len(part) != HASH_SIZE for part in (*proof, *leaves)):
        return False
    if len(proof) != len(span_ranges((first, end), size)):
        return False
    parts = iter(proof)

    def subtree(low: int, high: int) -> bytes:
        if high <= first or low >= end:
            return next(parts)
        if high - low == 1:
            return leaves[low - first]
        middle = _split(low, high)
        left = subtree(low, middle)
        return node_hash(left, subtree(middle, high))

    return subtree(0, size) == root


def includes(root: bytes, size: int, index: int, leaf: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that the leaf of this hash is number `index` in the tree of this root and size."""
    if not 0 <= index < size or any(len(part) != HASH_SIZE for part in proof):
        return False
    ranges = inclusion_ranges(index, size)
    if len(proof) != len(ranges):
        return False
    for (_, high), part in zip(ranges, proof, strict=True):
        leaf = node_hash(part, leaf) if high <= index else node_hash(leaf, part)
    return leaf == root


def is_prefix(first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that the tree of the second root begins with all leaves of that of the first."""
    if not 0 <= first <= second or any(len(part) != HASH_SIZE for part in proof):
        return False
    if first == second:
        return not proof and first_root == second_root
    if not first:
        return not proof and first_root == EMPTY_ROOT
    ranges, parts = consistency_ranges(first, second), list(proof)
    if len(parts) != len(ranges):
        return False
    old = new = first_root if ranges[0][0] == first else parts[0]
    for (low, high), part in zip(ranges, parts, strict=True):
        if low >= first:
            new = node_hash(new, part)
        elif high < first:
            old, new = node_hash(part, old), node_hash(part, new)
    return old == first_root and new == second_root


def rows(ranges: Iterable[Range]) -> set[int]:
    """The leaves whose stored hashes `range_hash` reads for these ranges."""
    return {row for low, high in ranges for row, _ in _cover(low, high)}


def range_hash(span: Range, node: ReadNode) -> Hash:
    """The hash of a range that a proof names, from the complete subtrees in it."""
    return _fold([node(row, level) for row, level in _cover(*span)])


def _cover(low: int, high: int) -> Iterator[tuple[int, int]]:
    """Yields the last leaf and the level of each complete subtree of a range, largest first.

    Ranges of proofs begin at a multiple of the largest power of two that they hold.
    """
    while low < high:
        level = (high - low).bit_length() - 1
        low += 1 << level
        yield low - 1, level


def _fold(roots: Sequence[bytes]) -> Hash:
    """The root over complete subtrees of falling size."""
    if not roots:
        return EMPTY_ROOT
    folded = roots[-1]
    for left in reversed(roots[:-1]):
        folded = node_hash(left, folded)
    return Hash(folded)


def _split(low: int, high: int) -> int:
    """Where a tree over this range is divided: after the largest power of two that is smaller than its size."""
    return low + (1 << ((high - low - 1).bit_length() - 1))
