"""Keys and values of prompts, held once where prompts begin alike."""

from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx

# Of each array the columns are the last axis but one; all arrays have as many.
Columns = list[mx.array]


class _Node:
    """What follows after another node: the keys of its columns, and the columns."""

    def __init__(self, keys: list[int], arrays: Columns, parent: "_Node | None"):
        self.keys, self.arrays, self.parent = keys, arrays, parent
        self.children: dict[int, _Node] = {}
        self.used = 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class PrefixTree:
    """Columns of caches, found by the keys of all that was read up to them.

    A key is a whole number for each column. `root` tells apart what never mixes. The
    arrays are evaluated and nobody writes to them; what does not fit into `limit`
    bytes goes, the ends that were not used for longest first.
    """

    def __init__(self, limit: int):
        self._limit = self._room = limit
        self._roots: dict[Hashable, _Node] = {}
        self._time = 0
        self.nbytes = 0

    def find(self, root: Hashable, keys: Sequence[int]) -> tuple[int, list[Columns]]:
        """How many columns are known of a prompt, and these in pieces, to be joined."""
        path, length = self._walk(root, list(keys))
        return length, [
            node.arrays if n == len(node.keys) else columns(node.arrays, 0, n)
            for node, n in path
        ]

    def make_room(self, nbytes: int) -> None:
        """Let so many bytes of the limit be used by others, from now on."""
        self._room = max(self._limit - nbytes, 0)
        self._shrink()

    def add(self, root: Hashable, keys: Sequence[int], arrays: Columns) -> None:
        """Keep the columns of these keys that are not known; they are copied.

        Where all of them do not fit, the first ones that do are kept.
        """
        each = sum(array.nbytes // array.shape[-2] for array in arrays)
        keys = list(keys)[: self._room // max(each, 1)]
        path, known = self._walk(root, keys)
        if known == len(keys):
            return
        node = self._roots.setdefault(root, _Node([], [], None))
        if path:
            node, n = path[-1]
            if n < len(node.keys):
                node = self._split(node, n)
        made = [mx.contiguous(a) for a in columns(arrays, known, len(keys))]
        mx.eval(made)  # another thread may read them
        new = _Node(keys[known:], made, node)
        new.used = self._time
        node.children[new.keys[0]] = new
        self.nbytes += new.nbytes
        self._shrink()

    def drop(self, root: Hashable) -> None:
        """Forget all under a root."""
        if root in self._roots:
            self.nbytes -= sum(node.nbytes for node in _under(self._roots.pop(root)))

    def _walk(
        self, root: Hashable, keys: list[int]
    ) -> tuple[list[tuple[_Node, int]], int]:
        """The nodes that these keys go through, with the columns of each; all columns.

        They count as used.
        """
        self._time += 1
        path: list[tuple[_Node, int]] = []
        node, at = self._roots.get(root), 0
        while node is not None and at < len(keys):
            node = node.children.get(keys[at])
            if node is None:
                break
            node.used = self._time
            n = shared_length(node.keys, keys[at : at + len(node.keys)])
            path.append((node, n))
            at += n
            if n < len(node.keys):
                break
        return path, at

    def _split(self, node: _Node, n: int) -> _Node:
        """Two nodes of one; gives the first, of n columns."""
        parent = node.parent
        assert parent is not None
        parts = columns(node.arrays, 0, n), columns(node.arrays, n, len(node.keys))
        first, rest = ([mx.contiguous(a) for a in part] for part in parts)
        mx.eval(first, rest)  # copies, or either would hold the memory of both
        head = _Node(node.keys[:n], first, parent)
        head.used = node.used
        parent.children[head.keys[0]] = head
        node.keys, node.arrays, node.parent = node.keys[n:], rest, head
        head.children[node.keys[0]] = node
        return head

    def _shrink(self) -> None:
        while self.nbytes > self._room:
            every = [n for root in self._roots.values() for n in _under(root)]
            ends = [node for node in every if node.parent and not node.children]
            last = min(ends, key=lambda node: node.used)
            assert last.parent is not None
            del last.parent.children[last.keys[0]]
            self.nbytes -= last.nbytes


def _under(node: _Node) -> list[_Node]:
    """A node and all that follow it."""
    found = [node]
    for each in found:
        found.extend(each.children.values())
    return found


def shared_length(some: list[Any], others: list[Any]) -> int:
    """How many entries two lists have in common from their beginning."""
    if some == others:  # much faster than one by one
        return len(some)
    pairs = enumerate(zip(some, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(some), len(others)))


def columns(arrays: Sequence[mx.array], start: int, stop: int) -> Columns:
    """Some columns of each array. (..., C, width) -> (..., stop - start, width)."""
    return [array[..., start:stop, :] for array in arrays]


def joined(pieces: Sequence[Columns]) -> Columns:
    """Columns of several pieces, one behind the other; lazy."""
    if len(pieces) == 1:
        return list(pieces[0])
    return [mx.concatenate(list(x), axis=-2) for x in zip(*pieces, strict=True)]
