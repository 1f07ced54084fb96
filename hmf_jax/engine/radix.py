"""A radix tree over token ids: which beginnings of prompts have been read."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

REMEMBERED = 1 << 22  # tokens; as soon as there are more, those without an entry are forgotten


class Node:
    """Tokens after those of the parent; `end` in all.

    Attributes:
      entry: what later prompts can go on from.
      gone: it had one that had to go.
    """

    __slots__ = ("tokens", "parent", "children", "end", "entry", "gone", "stamp")

    def __init__(self, tokens: array[int], parent: Node | None) -> None:
        self.tokens, self.parent = tokens, parent
        self.children: dict[int, Node] = {}
        self.end: int = len(tokens) + (parent.end if parent else 0)
        self.entry: Any = None
        self.gone, self.stamp = False, 0

    def before(self) -> Iterator[Node]:
        """The nodes on the way back to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent


class Tree:
    """One root per namespace."""

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._stamp, self._tokens, self._most = 0, 0, REMEMBERED

    def walk(self, namespace: str, tokens: array[int]) -> tuple[list[Node], int]:
        """The nodes that are beginnings of these tokens, and how many tokens the tree knows."""
        nodes: list[Node] = []
        node, at = self._roots.get(namespace), 0
        while node is not None and at < len(tokens):
            node = node.children.get(tokens[at])
            if node is not None:
                at += common(node.tokens, tokens[at : at + len(node.tokens)])
                if at < node.end:
                    break
                nodes.append(node)
        return nodes, at

    def reach(self, namespace: str, tokens: array[int]) -> Node:
        """The node that ends with these tokens; it is made if there is none."""
        self._stamp += 1
        nodes, at = self.walk(namespace, tokens)
        node = nodes[-1] if nodes else self._roots.setdefault(namespace, Node(array("i"), None))
        for known in nodes:
            known.stamp = self._stamp
        if at > node.end:  # they end, or differ, within a node, which is split there
            child = node.children[tokens[node.end]]
            upper = Node(child.tokens[: at - node.end], node)
            child.tokens, child.parent = child.tokens[at - node.end :], upper
            upper.children[child.tokens[0]] = child
            node.children[upper.tokens[0]] = upper
            upper.stamp, node = self._stamp, upper
        if at < len(tokens):
            self._tokens += len(tokens) - at
            # Prompts are read in chunks: a leaf without an entry grows.
            if node.parent is None or node.children or node.entry or node.gone:
                child = Node(tokens[at:], node)
                node.children[tokens[at]], node = child, child
            else:
                node.tokens += tokens[at:]
                node.end = len(tokens)
            node.stamp = self._stamp
            self._prune()
        return node

    def _prune(self) -> None:
        """Forgets what was read longest ago, where there is no entry."""
        if self._tokens <= self._most:
            return
        self._roots = {name: root for name, root in self._roots.items() if root.children}
        leaves = sorted((node for node in self._nodes() if not node.children), key=_stamp)
        for node in leaves:
            while node.parent is not None and not node.children and not node.entry:
                if self._tokens <= REMEMBERED // 4 * 3 or node.stamp == self._stamp:
                    break
                del node.parent.children[node.tokens[0]]
                self._tokens -= len(node.tokens)
                node = node.parent
        self._most = max(REMEMBERED, 2 * self._tokens)  # entries alone may be more

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


def common(a: array[int], b: array[int]) -> int:
    """How many tokens two lists have in common at the beginning."""
    low, most, step = 0, min(len(a), len(b)), 8
    while low < most and a[low : low + step] == b[low : low + step]:  # ever longer pieces
        low += step
        step *= 2
    if low >= most:  # the last piece was the rest of the shorter one
        return most
    high = min(low + step, most)
    if a[low:high] == b[low:high]:
        return high
    while high - low > 1:  # the first `low` are the same, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def _stamp(node: Node) -> int:
    return node.stamp
