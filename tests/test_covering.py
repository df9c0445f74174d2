"""Samples of products lose no value, and what they leave out is slow rather than gone."""

from itertools import combinations, product

from covering import in_turn, pairs, sampled

AXES = ("abcde", [1, 2, 3], [True, False], "xy")


def test_any_two_values_meet_in_far_fewer_cases_than_the_product_has():
    cases = pairs(*AXES)
    for i, j in combinations(range(len(AXES)), 2):
        assert {(case[i], case[j]) for case in cases} == {*product(AXES[i], AXES[j])}
    assert len(cases) < len({*product(*AXES)}) / 3


def test_in_turn_each_has_one_case_and_the_others_take_turns():
    cases = in_turn("abcdefg", [1, 2], "xyz")
    assert [case[0] for case in cases] == [*"abcdefg"]
    assert {case[1:] for case in cases} == {*product([1, 2], "xyz")}


def test_the_whole_product_is_there_and_what_is_no_sample_is_slow():
    found = sampled(in_turn("abc", [1, 2]), "abc", [1, 2])
    assert [case.values for case in found] == [*product("abc", [1, 2])]
    fast = [case.values for case in found if not case.marks]
    assert fast == in_turn("abc", [1, 2])
