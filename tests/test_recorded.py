"""Results are what they were before the code was rearranged: recorded fingerprints, found again."""

import pytest
import recorded

RUNS, BEFORE = recorded.runs(), recorded.recorded()
# Seconds each; but for the first, a recipe has the strategy too.
SLOW = {"activation checkpointing"} | {f"digits/{name}.yaml" for name in recorded.VARIANTS}

pytestmark = pytest.mark.skipif(not BEFORE, reason=f"no fingerprints of {recorded.place()}: tests/recorded.py")


def cases():
    """Each shipped config in the reference, and each recipe in one of the runtimes that take it, in turn."""
    for i, name in enumerate(RUNS):
        able = [runtime for runtime in recorded.RUNTIMES if BEFORE.get(f"{name} | {runtime}") != "refused"]
        runtime = able[i % len(able)] if name in recorded.VARIANTS else "serial"
        yield pytest.param(name, runtime, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize(("name", "runtime"), list(cases()))
def test_fingerprints_are_what_they_were(name, runtime):
    assert recorded.outcome(RUNS[name], runtime) == BEFORE[f"{name} | {runtime}"]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", list(recorded.RUNTIMES))
@pytest.mark.parametrize("name", list(RUNS))
def test_all_fingerprints_are_what_they_were(name, runtime):
    assert recorded.outcome(RUNS[name], runtime) == BEFORE[f"{name} | {runtime}"]
