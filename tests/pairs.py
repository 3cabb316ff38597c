"""Cases that cross every value of every axis with every value of every other: all pairs, not the whole product."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

SEED = 20261124


def all_pairs(
    axes: dict[str, list[Any]], legal: Callable[[dict[str, Any]], bool], seed: int
) -> list[dict[str, Any]]:
    """Cases (a value's index by axis), chosen greedily among random legal ones until every legal pair has occurred."""
    chance = random.Random(seed)
    names = list(axes)
    pair = tuple[tuple[str, int], tuple[str, int]]
    missing: set[pair] = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    cases: list[dict[str, Any]] = []
    tries = 0
    while missing and tries < 200:
        wanted = chance.choice(sorted(missing))
        best, gain = None, 0
        for _ in range(30):
            case = {name: chance.randrange(len(axes[name])) for name in names} | dict(wanted)
            if not legal({name: axes[name][i] for name, i in case.items()}):
                continue
            covered = {((a, case[a]), (b, case[b])) for a, b in combinations(names, 2)} & missing
            if len(covered) > gain:
                best, gain = case, len(covered)
        if best is None:  # an illegal pair: no case has it
            missing.discard(wanted)
            tries += 1
            continue
        missing -= {((a, best[a]), (b, best[b])) for a, b in combinations(names, 2)}
        cases.append({name: axes[name][i] for name, i in best.items()})
    return cases
