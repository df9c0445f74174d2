"""The global random generators of torch, numpy and random, which all threads of a process share.

Code of the server runs alone, and may draw from them: `keyed_globals` seeds them first. Code of clients may not.
"""

import ctypes
import random as python_random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import mtrand

from fedsim.types import Stream, random

MERSENNE_TWISTER_BYTES = 2500  # 624 numbers and a position, of 4 bytes each

_alone = threading.RLock()  # two runs of one process do not draw from the global generators at a time


@contextmanager
def globals_restored() -> Iterator[None]:
    """Afterwards, the global generators of torch, numpy and random are as they were before."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpys, numpy_state = mtrand.get_bit_generator(), np.random.get_state()  # noqa: NPY002
    python_state = python_random.getstate()
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            mtrand.set_bit_generator(numpys)
            np.random.set_state(numpy_state)  # noqa: NPY002
            python_random.setstate(python_state)


@contextmanager
def keyed_globals(seed: int, *key: int) -> Iterator[None]:
    """Inside, the global generators of torch, numpy and random begin at a key; afterwards they are as before."""
    of_torch, of_numpy, of_python = random(seed, Stream.GLOBALS, *key).integers(2**63, size=3).tolist()
    with _alone, globals_restored():
        torch.manual_seed(of_torch)
        mtrand.set_bit_generator(np.random.MT19937(of_numpy))
        python_random.seed(of_python)
        yield


def global_states(device: torch.device) -> dict[str, object]:
    """The states of the global generators, by name; equal as long as nothing is drawn. `device` may be a GPU."""
    numpys = mtrand.get_bit_generator()
    of_torch = [torch.default_generator]
    if device.type == "cuda":
        of_torch.append(torch.cuda.default_generators[device.index or 0])
    return {
        "torch's global generator": [generator.get_state().numpy().tobytes() for generator in of_torch],
        "numpy.random": ctypes.string_at(numpys.ctypes.state_address, MERSENNE_TWISTER_BYTES)
        if isinstance(numpys, np.random.MT19937)  # a hundred times as fast as its `state`
        else repr(numpys.state),
        "random": python_random.getstate(),
    }


@contextmanager
def undisturbed_globals() -> Iterator[None]:
    """Inside, the global generators are in new states, and no other thread is inside `keyed_globals`."""
    with _alone, globals_restored():
        torch.rand(())
        np.random.random()  # noqa: NPY002
        python_random.random()
        yield
