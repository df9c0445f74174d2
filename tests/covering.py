"""Fewer cases than a product has, in which values still meet."""

from itertools import combinations, product

import pytest


def pairs(*axes):
    """Cases, one value of each axis, in which any two values of two axes meet; the same ones each time.

    Greedy: a case is the one of the product that has the most pairs not met so far, the first of equal ones.
    """
    places = list(product(*(range(len(axis)) for axis in axes)))
    met, cases = set(), []
    while new := _pairs(best := max(places, key=lambda case: len(_pairs(case) - met))) - met:
        met |= new
        cases.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
    return cases


def _pairs(case):
    return {*combinations(enumerate(case), 2)}


def in_turn(many, *axes):
    """A case for each of `many`, beside the combinations of the other axes, which take turns."""
    others = list(product(*axes))
    return [(value, *others[i % len(others)]) for i, value in enumerate(many)]


def sampled(cases, *axes):
    """The whole product as parameters of a test; those that are none of `cases` are slow."""
    return [pytest.param(*c, marks=[] if c in cases else [pytest.mark.slow]) for c in product(*axes)]
