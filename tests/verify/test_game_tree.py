import itertools
import math

import numpy as np
import pytest

from corollary.base.errors import BadInput
from corollary.verify.game_tree import GameTree, Node

BINARY = {(0, 0): 3.0, (0, 1): 9.0, (1, 0): 5.0, (1, 1): 6.0}
"""Rewards of a game of two moves with two choices each: best play gives 9, against an opponent 5."""


def tree_of(second, rewards=BINARY, exploration=1.0):
    def propose(node):
        state = (*node.state, len(node.children))
        if len(state) == 2:
            return Node(state, "maximise", 0, terminal=rewards[state])
        return Node(state, second, 2)

    tree = GameTree(Node((), "maximise", 2), np.random.default_rng(0), exploration)
    return tree, propose


def never(state):
    raise AssertionError(f"the game is over at {state}")


def playout(state):
    """The mean of what can follow."""
    return float(np.mean([value for key, value in BINARY.items() if key[: len(state)] == state]))


def test_partners_exhaust_the_game():
    tree, propose = tree_of("maximise")
    tree.grow(propose, playout, 100)
    assert tree.root.best == 9.0
    assert tree.root.is_closed
    assert tree.root.visits == 6  # two inner nodes and four ends, each simulated once


def test_the_mean_tends_to_the_value_against_an_opponent():
    tree, propose = tree_of("minimise", exploration=0.5)
    value = tree.grow(propose, playout, 500)
    assert value == pytest.approx(5.0, abs=0.5)  # max over min; the rest is what exploring costs
    assert max(tree.root.children, key=lambda child: child.visits).state == (1,)


def test_the_mean_tends_to_the_expectation_under_chance():
    tree, propose = tree_of("chance", exploration=0.5)
    tree.grow(propose, playout, 500)
    for child, mean in zip(tree.root.children, (6.0, 5.5), strict=True):
        # Standard deviation 3 for the first, 0.5 for the second, over a hundred visits and more.
        assert child.mean == pytest.approx(mean, abs=4 * 3 / child.visits**0.5)


def test_children_not_visited_come_first():
    tree = GameTree(Node("root", "maximise", 5), np.random.default_rng(0))
    names = itertools.count()
    tree.grow(lambda node: Node(next(names), "maximise", math.inf), lambda state: 1.0, 5)
    assert [child.visits for child in tree.root.children] == [1] * 5


def test_drawn_moves_widen_with_the_root_of_visits():
    tree = GameTree(Node("root", "chance", math.inf), np.random.default_rng(0))
    tree.grow(lambda node: Node("end", "maximise", 0, terminal=1.0), never, 400)
    assert len(tree.root.children) == 20
    assert tree.root.visits == 400


def test_backup_credits_the_whole_path():
    tree, propose = tree_of("minimise")
    path = tree.expand(tree.select(), propose(tree.root))
    tree.backup(path, [2.0, 4.0])
    assert [(node.visits, node.mean, node.best) for node in path] == [(2, 3.0, 4.0)] * 2
    assert tree.simulate(path, lambda state: 7.0) == 7.0


def test_a_node_takes_no_more_children_than_moves():
    tree, propose = tree_of("maximise")
    tree.grow(propose, playout, 100)
    with pytest.raises(BadInput, match="takes no more"):
        tree.expand([tree.root], propose(tree.root))
