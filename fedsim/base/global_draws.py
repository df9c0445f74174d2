"""The global random generators of torch, numpy and random, which all threads of a process share.

Code of the server runs alone, and may draw from them: `keyed_globals` seeds them first. Code of clients may not.
"""

import random as python_random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import torch
from numpy.random import mtrand
from torch.utils._pytree import tree_map

from fedsim.types import Stream, random

_numpys = np.random.MT19937(0)  # takes the place of the caller's, which may be of another kind
_alone = threading.RLock()  # two runs of one process do not draw from the global generators at a time


class Shared:
    """A context of the process: the first thread that enters opens it, and the last one that leaves closes it."""

    def __init__(self, context: Callable[[], AbstractContextManager[object]]):
        self.context, self.lock, self.inside, self.opened = context, threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.opened.enter_context(self.context())
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.opened.close()


@contextmanager
def _restored() -> Iterator[None]:
    of_torch = [(generator, generator.get_state()) for generator in _torch_generators()]
    numpys, numpy_state = mtrand.get_bit_generator(), np.random.get_state()  # noqa: NPY002
    python_state = python_random.getstate()
    try:
        yield
    finally:
        for generator, state in of_torch:
            generator.set_state(state)
        mtrand.set_bit_generator(numpys)
        np.random.set_state(numpy_state)  # noqa: NPY002
        python_random.setstate(python_state)


globals_kept = Shared(_restored)  # when all threads have left, the global generators are as they were before


@contextmanager
def keyed_globals(seed: int, *key: int) -> Iterator[None]:
    """Inside, the global generators of torch, numpy and random begin at a key."""
    of_torch, of_numpy, of_python = random(seed, Stream.GLOBALS, *key).integers(2**63, size=3).tolist()
    with globals_kept, _alone:
        for generator in _torch_generators():
            generator.manual_seed(of_torch)
        mtrand.set_bit_generator(_numpys)
        np.random.seed(of_numpy % 2**32)  # noqa: NPY002
        python_random.seed(of_python)
        yield


def global_states(device: torch.device) -> dict[str, object]:
    """The states of the global generators, by name; equal as long as nothing is drawn. `device` may be a GPU."""
    of_torch = [torch.default_generator]
    if device.type == "cuda":
        of_torch.append(torch.cuda.default_generators[device.index or 0])
    of_numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "torch's global generator": [generator.get_state().numpy().tobytes() for generator in of_torch],
        "numpy.random": tree_map(lambda part: part.tobytes() if isinstance(part, np.ndarray) else part, of_numpy),
        "random": python_random.getstate(),
    }


@contextmanager
def undisturbed_globals() -> Iterator[None]:
    """Inside, the global generators are in new states, and no other thread is inside `keyed_globals`."""
    with globals_kept, _alone:
        torch.rand(())
        np.random.random()  # noqa: NPY002
        python_random.random()
        yield


def _torch_generators() -> list[torch.Generator]:
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    return [torch.default_generator, *gpus]
