"""The Merkle tree: vectors of Certificate Transparency, the recursive definition of RFC 9162, and forged proofs."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol import merkle
from tallystick.protocol.merkle import EMPTY_ROOT, Edge, includes, includes_span, is_prefix, leaf_hash

LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
"""Roots of the first 0 to 8 leaves, from the tests of the Certificate Transparency log server (certificate-transparency)."""


class Log:
    """A log whose rows hold what `Edge.append` returns, as a database does."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.edge, self.rows, self.roots = Edge(), list[tuple[bytes, ...]](), [EMPTY_ROOT]
        for leaf in leaves:
            self.rows.append(self.edge.append(leaf_hash(leaf)))
            self.roots.append(self.edge.root())

    def node(self, row: int, level: int) -> bytes:
        return self.rows[row][level]

    def inclusion(self, index: int, size: int) -> list[bytes]:
        return [merkle.range_hash(span, self.node) for span in merkle.inclusion_ranges(index, size)]

    def consistency(self, first: int, second: int) -> list[bytes]:
        return [merkle.range_hash(span, self.node) for span in merkle.consistency_ranges(first, second)]


def tree(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162, word for word."""
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0]).digest() if leaves else hashlib.sha256(b"").digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + tree(leaves[:k]) + tree(leaves[k:])).digest()


def path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of RFC 9162, word for word."""
    if len(leaves) == 1:
        return []
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return [*path(m, leaves[:k]), tree(leaves[k:])] if m < k else [*path(m - k, leaves[k:]), tree(leaves[:k])]


def subproof(m: int, leaves: list[bytes], known: bool) -> list[bytes]:
    """SUBPROOF of RFC 9162, word for word."""
    if m == len(leaves):
        return [] if known else [tree(leaves)]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    if m <= k:
        return [*subproof(m, leaves[:k], known), tree(leaves[k:])]
    return [*subproof(m - k, leaves[k:], False), tree(leaves[:k])]


def numbered(count: int) -> list[bytes]:
    """So many leaves, each with its number."""
    return [b"%d" % number for number in range(count)]


def test_roots_are_those_of_certificate_transparency() -> None:
    """The tree is the one that other implementations have."""
    assert [root.hex() for root in Log(LEAVES).roots] == list(ROOTS)


@pytest.mark.parametrize("size", range(1, 34))
def test_roots_and_proofs_follow_the_recursive_definition(size: int) -> None:
    """Each root, inclusion proof and consistency proof equals what the RFC's recursion gives, and verifies."""
    leaves = numbered(size)
    log = Log(leaves)
    assert log.roots[size] == tree(leaves)
    for index in range(size):
        proof = log.inclusion(index, size)
        assert proof == path(index, leaves)
        assert includes(log.roots[size], size, index, leaf_hash(leaves[index]), proof)
    for first in range(1, size + 1):
        proof = log.consistency(first, size)
        assert proof == subproof(first, leaves, True)
        assert is_prefix(first, log.roots[first], size, log.roots[size], proof)


def test_proofs_need_few_rows_of_a_large_log() -> None:
    """A proof in a log of a hundred thousand leaves reads at most two rows per level."""
    size = 100_003
    assert len(merkle.rows(merkle.inclusion_ranges(77_777, size))) <= 2 * size.bit_length()
    assert len(merkle.rows(merkle.consistency_ranges(77_777, size))) <= 2 * size.bit_length()


@given(st.data())
def test_no_other_leaf_index_size_or_root_passes(data: st.DataObject) -> None:
    """A proof is of one leaf at one index in one tree: whatever is changed, it fails."""
    size = data.draw(st.integers(1, 70))
    log, index = Log(numbered(size)), data.draw(st.integers(0, size - 1))
    proof, leaf, root = log.inclusion(index, size), leaf_hash(b"%d" % index), log.roots[size]
    assert not includes(root, size, index, leaf_hash(b"other"), proof)
    assert not includes(leaf_hash(b"root"), size, index, leaf, proof)
    assert not includes(root, size, index, leaf, [*proof, leaf])
    for other in range(-1, size + 1):
        if other != index:
            assert not includes(root, size, other, leaf, proof)
    if proof:
        place = data.draw(st.integers(0, len(proof) - 1))
        assert not includes(root, size, index, leaf, proof[:place] + proof[place + 1 :])
        forged = [*proof]
        forged[place] = leaf_hash(b"forged")
        assert not includes(root, size, index, leaf, forged)
        assert not includes(root, size, index, leaf, [part + b"\0" for part in proof])


@given(st.data())
def test_a_changed_or_shortened_log_is_not_consistent(data: st.DataObject) -> None:
    """A log that changed an old leaf has no proof, whatever parts are sent."""
    size = data.draw(st.integers(2, 70))
    first = data.draw(st.integers(1, size - 1))
    leaves = numbered(size)
    log = Log(leaves)
    changed = [*leaves]
    changed[data.draw(st.integers(0, first - 1))] = b"changed"
    other = Log(changed)
    proof = log.consistency(first, size)
    for claimed in (proof, other.consistency(first, size), [], proof[1:], [*proof, log.roots[1]]):
        assert not is_prefix(first, log.roots[first], size, other.roots[size], claimed)
    assert not is_prefix(size, log.roots[size], first, log.roots[first], proof)


def test_trivial_trees() -> None:
    """An empty tree is the beginning of each; a tree is the beginning of itself; two trees of one size are not."""
    log, other = Log(numbered(5)), Log([*numbered(4), b"x"])
    assert is_prefix(0, EMPTY_ROOT, 5, log.roots[5], [])
    assert not is_prefix(0, log.roots[1], 5, log.roots[5], [])
    assert not is_prefix(0, EMPTY_ROOT, 5, log.roots[5], [log.roots[5]])
    assert is_prefix(5, log.roots[5], 5, log.roots[5], [])
    assert not is_prefix(5, log.roots[5], 5, other.roots[5], [])
    assert not is_prefix(5, log.roots[5], 5, log.roots[5], [log.roots[5]])
    assert not is_prefix(-1, EMPTY_ROOT, 5, log.roots[5], [])
    assert not includes(EMPTY_ROOT, 0, 0, EMPTY_ROOT, [])


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0)])
def test_no_ranges_outside_the_tree(index: int, size: int) -> None:
    """A proof of a leaf that does not exist is an error."""
    with pytest.raises(ValueError, match="expected a leaf"):
        merkle.inclusion_ranges(index, size)


@pytest.mark.parametrize(("first", "second"), [(-1, 3), (4, 3)])
def test_no_consistency_with_a_shorter_tree(first: int, second: int) -> None:
    """A tree cannot begin with a longer one."""
    with pytest.raises(ValueError, match="expected a size"):
        merkle.consistency_ranges(first, second)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 100])
def test_an_edge_is_loaded_from_the_stored_hashes(size: int) -> None:
    """A process that starts again goes on with the same tree; a copy does not change with it."""
    log = Log(numbered(size))
    loaded = Edge.load(size, log.node)
    copy = loaded.copy()
    assert loaded == log.edge
    assert loaded.append(leaf_hash(b"next")) == log.edge.append(leaf_hash(b"next"))
    assert loaded.root() == log.edge.root()
    assert copy.size == size


def _spans(leaves: list[bytes], first: int, end: int) -> tuple[list[bytes], list[bytes]]:
    """The hashes of leaves in a row, and those of what lies beside them."""
    beside = [tree(leaves[low:high]) for low, high in merkle.span_ranges((first, end), len(leaves))]
    return [leaf_hash(leaf) for leaf in leaves[first:end]], beside


@given(st.data())
def test_leaves_in_a_row_have_one_proof(data: st.DataObject) -> None:
    """Any range of any tree is proven; a changed, missing or moved leaf or hash is not, nor another size or root."""
    size = data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(first + 1, size))
    leaves = numbered(size)
    hashes, beside = _spans(leaves, first, end)
    root = tree(leaves)
    assert includes_span(root, size, first, hashes, beside)
    place = data.draw(st.integers(0, len(hashes) - 1))
    changed = [*hashes[:place], bytes(32), *hashes[place + 1 :]]
    assert not includes_span(root, size, first, changed, beside)
    assert not includes_span(root, size, first, hashes[:-1], beside)
    assert not includes_span(bytes(32), size, first, hashes, beside)
    assert not includes_span(root, size, first + 1, hashes, beside)
    assert not includes_span(root, size, first, hashes, [*beside, bytes(32)])
    if beside:
        place = data.draw(st.integers(0, len(beside) - 1))
        assert not includes_span(root, size, first, hashes, [*beside[:place], bytes(32), *beside[place + 1 :]])
        assert not includes_span(root, size, first, hashes, [*beside[:place], b"", *beside[place + 1 :]])


def test_the_proof_of_leaves_in_a_row_is_short() -> None:
    """It grows with the depth of the tree, not with the number of leaves."""
    assert len(merkle.span_ranges((500_000, 502_048), 1_000_000)) <= 2 * 20


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (0, 6)])
def test_no_span_outside_the_tree(span: tuple[int, int]) -> None:
    """A range that is empty or not in the tree has no proof."""
    with pytest.raises(ValueError, match="expected a range"):
        merkle.span_ranges(span, 5)
