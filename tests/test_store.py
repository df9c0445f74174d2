"""Laws of what clients keep: a store is a dict, whatever fits in memory and wherever it goes on."""

import errno
import gc
import signal
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from conftest import make_simulation, make_strategy, trace
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import save_file

from fedsim import ClientError, RoundError, Wrapper
from fedsim.federated import store as module
from fedsim.federated.simulation import Failures
from fedsim.federated.store import ClientStore

LARGE = 2**31
FORMS = (
    {"c": (torch.float32, (5,))},
    {
        "a.b": (torch.bfloat16, (3,)),
        "a": (torch.float64, ()),
        ".": (torch.int64, (2, 1)),
        "0.a": (torch.bool, (4,)),
    },
    {"nothing": (torch.float32, (0, 3))},
)


@pytest.fixture(autouse=True)
def _unsynchronised(monkeypatch):
    """No law here is of a loss of power, and waiting for the disk takes most of the time."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def random_state(form, seed):
    """Any bits at all: nan, infinity and -0.0 among them."""
    rng, state = np.random.default_rng(seed), {}
    for name, (dtype, shape) in form.items():
        number = int(np.prod(shape))
        bits = torch.tensor(list(rng.bytes(number * dtype.itemsize)), dtype=torch.uint8)
        state[name] = (bits % 2 == 0 if dtype == torch.bool else bits.view(dtype)).reshape(shape)
    return state


def bits_of(state):
    """Names in order, types, shapes and bytes."""
    return [
        (name, value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in sorted(state.items())
    ]


def contents(store):
    return {client: bits_of(state) for client, state in store.items()}


def held(store):
    """Bytes of all tensors in memory that the store leads to, wherever it has them."""
    found, left = {}, [vars(store)]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            found[id(value)] = value.nbytes
        elif isinstance(value, dict | list | tuple):
            left += value.values() if isinstance(value, dict) else value
    return sum(found.values())


def on_disk(folder):
    """Bytes of the tensors in each segment, by its name."""
    sizes = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        sizes[path.name] = len(content) - 8 - int.from_bytes(content[:8], "little")
    return sizes


class StoreMachine(RuleBasedStateMachine):
    """A store, and the dicts that say what it should hold."""

    def __init__(self):
        super().__init__()
        self.temporary, self.patch = TemporaryDirectory(), pytest.MonkeyPatch()
        self.folder = Path(self.temporary.name)
        self.patch.setattr(module, "SEGMENT_BYTES", 70)
        self.patch.setattr(module, "MAX_CLIENTS_PER_SEGMENT", 4)
        self.patch.setattr(module, "write", self.write)
        self.fails_in, self.failed = 0, False
        self.seed = 0
        self.checkpoints = []  # files, and what they hold

    @initialize(form=st.sampled_from(FORMS), memory=st.sampled_from([0, 50, 100, LARGE]))
    def begin(self, form, memory):
        self.form = form
        self.open(memory, [], {})

    def open(self, memory, files, expected):
        self.store = ClientStore(self.folder, memory=memory)
        self.pin()
        self.store.restore(files)
        self.now, self.staged, self.failed = dict(expected), {}, False

    def pin(self):
        self.store.pinned = {file.name for files, _ in self.checkpoints for file in files}

    def write(self, path, content, **options):
        self.fails_in -= 1
        if self.fails_in == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return WRITE(path, content, **options)

    @contextmanager
    def disk_may_be_full(self):
        try:
            yield
        except OSError:
            self.failed = True
            self.store.discard()  # as a round does that fails
            self.staged = {}

    @rule(client=st.integers(0, 7))
    def stage(self, client):
        self.seed += 1
        state = random_state(self.form, self.seed)
        with self.disk_may_be_full():
            self.staged[client] = bits_of(state)
            self.store.stage(client, state)
            self.failed = False

    @rule(cohort=st.lists(st.integers(0, 7), min_size=3, unique=True), dropped=st.integers(0, 3))
    def round(self, cohort, dropped):
        for client in cohort:
            self.stage(client)
        for client in cohort[:dropped]:
            self.discard_one(client)
        self.commit()
        self.tidy()

    @rule()
    def commit(self):
        self.store.commit()
        self.now |= self.staged
        self.staged = {}

    @rule()
    def discard(self):
        self.store.discard()
        self.staged = {}

    @rule(client=st.integers(0, 7))
    def discard_one(self, client):
        self.store.discard(client)
        self.staged.pop(client, None)

    @rule(client=st.integers(0, 8))
    def read(self, client):
        with self.disk_may_be_full():
            state = self.store.get(client)
            assert (state and bits_of(state)) == self.now.get(client)

    @rule()
    def read_all(self):
        with self.disk_may_be_full():
            assert contents(self.store) == self.now

    @rule()
    def tidy(self):
        with self.disk_may_be_full():
            self.store.tidy()
            sizes = on_disk(self.folder)
            assert sizes.keys() >= self.store.pinned
            if not self.staged:
                free = sum(size for name, size in sizes.items() if name not in self.store.pinned)
                assert free <= 2 * sum(len(bits) for state in self.now.values() for *_, bits in state)

    @rule()
    def checkpoint(self):
        with self.disk_may_be_full():
            files = self.store.flush()
            assert on_disk(self.folder).keys() >= {file.name for file in files}
            self.checkpoints.append((files, dict(self.now)))
            self.pin()

    @precondition(lambda self: self.checkpoints)
    @rule()
    def drop_a_checkpoint(self):
        self.checkpoints.pop(0)
        self.pin()

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data(), memory=st.sampled_from([0, 50, 100, LARGE]))
    def reopen(self, data, memory):
        self.open(memory, *data.draw(st.sampled_from(self.checkpoints)))

    @rule(number=st.integers(1, 3))
    def fail(self, number):
        """The disk will be full at one of the next writes."""
        self.fails_in = number

    @invariant()
    def it_holds_whom_the_dict_holds(self):
        assert len(self.store) == len(self.now)
        assert sorted(self.store) == sorted(self.now)
        assert all((client in self.store) == (client in self.now) for client in range(9))

    @invariant()
    def it_holds_no_more_in_memory_than_it_may(self):
        assert held(self.store) <= self.store.memory or self.failed

    @invariant()
    def what_checkpoints_name_is_there(self):
        assert self.store.pinned <= {path.name for path in self.folder.iterdir()}

    def teardown(self):
        self.fails_in = 0
        try:
            if hasattr(self, "store"):
                self.read_all()
                self.checkpoint()
                for checkpoint in self.checkpoints:
                    self.open(0, *checkpoint)
                    self.read_all()
        finally:
            self.patch.undo()
            self.temporary.cleanup()


WRITE = module.write
TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


CELL = {"c": (torch.float32, (5,))}


@pytest.fixture
def small(monkeypatch):
    """Segments of three clients."""
    monkeypatch.setattr(module, "SEGMENT_BYTES", 60)


def keep(store, states):
    for client, state in states.items():
        store.stage(client, state)
    store.commit()


def used_store(folder, staged):
    """One with states in memory and on disk, what is staged too, and with segments to write anew and to delete."""
    store = ClientStore(folder, memory=50)
    for clients in ((0, 1, 2, 3), (4, 5, 6), (0, 1, 4, 5), (6, 7)):
        keep(store, {client: random_state(CELL, 10 + client) for client in clients})
    now, files = contents(store), on_disk(folder)
    if staged:
        for client in (2, 8, 9, 5):
            store.stage(client, random_state(CELL, 20 + client))
        store.discard(8)
        assert on_disk(folder) != files
    assert held(store)
    return store, now


def read_all(store):
    assert len(contents(store)) == 8


ACTIONS = {
    "stage": lambda store: store.stage(0, random_state(CELL, 30)),
    "discard": lambda store: store.discard(),
    "commit": lambda store: store.commit(),
    "tidy": lambda store: store.tidy(),
    "flush": lambda store: store.flush(),
    "read": read_all,
}


def check_nothing_is_lost(store, now):
    """What it says it has it has, in memory and on disk; and it goes on."""
    store.discard()
    assert contents(store) == now
    assert held(store) <= store.memory + 20  # an interrupt may miscount one state
    store.tidy()
    other = ClientStore(store.folder)
    other.restore(store.flush())
    assert contents(other) == now


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that Python did not close
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ACTIONS)
def test_an_interrupt_at_any_line_loses_nothing(action, step, small, tmp_path):
    line, done = 1 - step, False
    while not done:
        line += step
        folder = tmp_path / str(line)
        folder.mkdir()
        store, now = used_store(folder, staged=action in ("stage", "discard", "commit"))
        after = now | {client: bits_of(random_state(CELL, 20 + client)) for client in (2, 9, 5)}
        with interrupt_at(line) as interrupt:
            try:
                ACTIONS[action](store)
            except KeyboardInterrupt:
                interrupt.raised = True
        done = not interrupt.raised
        committed = action == "commit" and len(store) == len(after)
        check_nothing_is_lost(store, after if committed else now)


class Interrupt:
    raised = False


@contextmanager
def interrupt_at(line):
    """Ctrl-C when so many lines of the store and of what it writes with have begun."""
    lines, files = 0, {module.__file__, sys.modules["fedsim.base.files"].__file__}

    def count(frame, event, argument):
        nonlocal lines
        if event == "line" and (lines := lines + 1) == line:
            signal.raise_signal(signal.SIGINT)
        return count

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: count if frame.f_code.co_filename in files else None)
    try:
        yield Interrupt()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_a_write_that_fails_loses_nothing(error, when, small, tmp_path, monkeypatch):
    """Each of a history's writes in turn fails once; what was under way is done again then."""
    writes = fails_at = 0

    def write(path, content, **options):
        nonlocal writes
        writes += 1
        if writes == fails_at and when == "before":
            raise error
        file = WRITE(path, content, **options)
        if writes == fails_at:
            raise error
        return file

    monkeypatch.setattr(module, "write", write)
    for fails_at in range(1, 30):
        folder = tmp_path / str(fails_at)
        folder.mkdir()
        store, now, writes = ClientStore(folder, memory=100), {}, 0
        for number, clients in enumerate([(0, 1, 2, 3, 4, 5, 6), (2, 3, 7), (0, 1, 4, 8), (2, 5, 9), (6, 7)]):
            states = {client: random_state(CELL, 10 * number + client) for client in clients}
            once_more(partial(keep, store, states), store, now)
            now |= {client: bits_of(state) for client, state in states.items()}
            once_more(store.tidy, store, now)
            files = once_more(store.flush, store, now)
            other = ClientStore(folder)
            other.pinned = {path.name for path in folder.iterdir()}
            other.restore(files)
            assert contents(other) == now
        store.tidy()
        assert on_disk(folder).keys() == {file.name for file in store.flush()}
    assert writes < fails_at  # so every one has failed


def once_more(action, store, now):
    try:
        return action()
    except (OSError, KeyboardInterrupt):
        store.discard()
        assert contents(store) == now
        return action()


def test_who_is_discarded_does_not_come_back(small, tmp_path):
    """Though its state lies in a segment with others that count, and that a checkpoint names."""
    store = ClientStore(tmp_path, memory=40)
    keep(store, {0: random_state(CELL, 0)})
    for client in range(3):
        store.stage(client, random_state(CELL, 10 + client))
    assert max(on_disk(tmp_path).values()) == 3 * 20  # all three in one segment
    store.discard(0)
    store.discard(1)
    store.commit()
    now = contents(store)
    assert now.keys() == {0, 2}
    other = ClientStore(tmp_path)
    other.restore(store.flush())
    assert contents(other) == now == {0: bits_of(random_state(CELL, 0)), 2: bits_of(random_state(CELL, 12))}


def test_who_is_staged_twice_has_the_later_state(small):
    """Whether the earlier one is on disk by then or not."""
    store = ClientStore(memory=40)
    for client, seed in ((0, 1), (1, 2), (0, 3), (2, 4), (0, 5)):
        store.stage(client, random_state(CELL, seed))
        assert held(store) <= 40
    store.commit()
    assert list(store) == [1, 2, 0]
    assert contents(store) == {
        client: bits_of(random_state(CELL, seed)) for client, seed in ((0, 5), (1, 2), (2, 4))
    }


def test_what_was_staged_is_newer_than_what_was_written_meanwhile(small, tmp_path):
    store = ClientStore(tmp_path, memory=40)
    keep(store, {client: random_state(CELL, client) for client in (0, 1, 2)})
    (old,) = store.flush()
    keep(store, {1: random_state(CELL, 4), 2: random_state(CELL, 2)})
    for client in (0, 1, 3):
        store.stage(client, random_state(CELL, 10 + client))
    store.tidy()
    assert not (tmp_path / old.name).exists()  # what it had of client 0 was written anew
    store.flush()
    store.commit()
    resumed = ClientStore(tmp_path)
    resumed.restore(store.flush())
    seeds = {0: 10, 1: 11, 2: 2, 3: 13}
    assert contents(resumed) == {client: bits_of(random_state(CELL, seed)) for client, seed in seeds.items()}


def test_a_segment_that_is_mostly_outdated_is_written_anew(small, tmp_path):
    store = ClientStore(tmp_path, memory=60)
    keep(store, {client: random_state(CELL, client) for client in (0, 1, 2)})
    (old,) = store.flush()
    keep(store, {0: random_state(CELL, 10)})
    store.tidy()
    assert (tmp_path / old.name).exists()
    keep(store, {1: random_state(CELL, 11)})
    store.tidy()
    assert not (tmp_path / old.name).exists()
    assert contents(store) == {
        client: bits_of(random_state(CELL, seed)) for client, seed in ((0, 10), (1, 11), (2, 2))
    }


def test_a_segment_goes_with_the_last_checkpoint_that_needs_it(small, tmp_path):
    """Also where a process that was killed has made that."""
    store = ClientStore(tmp_path, memory=0)
    keep(store, {0: random_state(CELL, 0)})
    first = store.flush()
    store.pinned = {file.name for file in first}
    keep(store, {0: random_state(CELL, 1)})
    second = store.flush()
    resumed = ClientStore(tmp_path)
    resumed.pinned = {file.name for file in [*first, *second]}
    resumed.restore(second)
    resumed.tidy()
    assert on_disk(tmp_path).keys() == resumed.pinned
    resumed.pinned = {file.name for file in second}
    resumed.tidy()
    assert on_disk(tmp_path).keys() == resumed.pinned


BASE = torch.arange(24.0).reshape(4, 6)
SUBNORMAL = torch.tensor([1], dtype=torch.int32).view(torch.float32)
KINDS = {
    "bfloat16": {"x": torch.tensor([1.0, float("nan"), -0.0, float("inf")], dtype=torch.bfloat16)},
    "float16": {"x": torch.randn(3).half()},
    "float64": {"x": torch.tensor([0.1, -0.0, float("-inf")], dtype=torch.double)},
    "subnormal": {"x": SUBNORMAL},
    "integers": {"x": torch.tensor([2**63 - 1, -(2**63)]), "y": torch.tensor([255], dtype=torch.uint8)},
    "bool": {"x": torch.tensor([True, False])},
    "complex": {"x": torch.tensor([1 + 2j, float("nan")])},
    "0-dim": {"x": torch.tensor(3.0), "n": torch.tensor(7)},
    "empty": {"x": torch.empty(0), "y": torch.empty(0), "z": torch.empty(2, 0, 3, dtype=torch.int64)},
    "transposed": {"x": BASE.T},
    "strided": {"x": BASE[::2, 1::3]},
    "expanded": {"x": torch.ones(1).expand(5)},
    "channels_last": {"x": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)},
    "shared": {"x": BASE, "y": BASE, "z": BASE[1], "row": BASE.reshape(-1)[:3]},
    "parameter": {"x": torch.nn.Parameter(torch.randn(3))},
    "names": {
        "a.b": torch.ones(1),
        "a": torch.zeros(1),
        ".": torch.ones(2),
        "": torch.ones(3),
        "1.a": torch.ones(4),
    },
    "more names": {"__metadata__": torch.ones(1), 'é "\n\\': torch.ones(2), "model/0 weight": torch.ones(3)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_the_same_bit_for_bit_once_on_disk(kind, tmp_path):
    """Also beside that of a client whose number begins or ends with the same digits."""
    states = {
        client: KINDS[kind] if client in (1, 21) else {"x": torch.ones(2)} for client in (1, 11, 21, 111, 12)
    }
    store = ClientStore(tmp_path, memory=0)
    keep(store, states)
    other = ClientStore(tmp_path, memory=0)
    other.restore(store.flush())
    for each in (store, other):
        assert contents(each) == {client: bits_of(state) for client, state in states.items()}


def test_entries_come_in_one_order_from_memory_and_from_disk(tmp_path):
    """A strategy that walks through them must not depend on what fits in memory."""
    state = {"b": torch.ones(1), "c": torch.ones(1, dtype=torch.double), "a": torch.ones(1, dtype=torch.uint8)}
    orders = set()
    for memory in (0, LARGE):
        store = ClientStore(memory=memory)
        keep(store, {0: state})
        orders.add(tuple(store[0]))
    assert len(orders) == 1


def test_a_state_without_entries_is_refused():
    """A segment could not tell that the client has one; fedsim stages none."""
    store = ClientStore()
    with pytest.raises(ValueError, match="client 3: the state has no entries"):
        store.stage(3, {})
    assert not store


def test_a_state_that_no_file_can_hold_is_refused():
    store = ClientStore(memory=0)
    with pytest.raises(RoundError, match=r"^torch.complex128 .*cannot be written"):
        store.stage(3, {"x": torch.ones(2, dtype=torch.complex128)})
    store.discard()
    store.commit()
    assert not store


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def garble(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def of_others(path):
    save_file({"2.c": torch.ones(5)}, path)


@pytest.mark.parametrize("harm", [Path.unlink, truncate, garble, of_others, lambda path: path.write_bytes(b"")])
def test_a_broken_segment_fails_the_read_naming_file_and_client(harm, tmp_path):
    """In one line; others read on, and a client that is trained anew has a state again."""
    store = ClientStore(tmp_path, memory=0)
    keep(store, {1: random_state(CELL, 1)})
    (broken,) = tmp_path.iterdir()
    keep(store, {2: random_state(CELL, 2)})
    harm(broken)
    with pytest.raises(RoundError) as caught:
        store[1]
    message = str(caught.value)
    assert message.startswith(f"{broken}: state of client 1: ")
    assert "\n" not in message
    assert bits_of(store[2]) == bits_of(random_state(CELL, 2))
    keep(store, {1: random_state(CELL, 3)})
    assert bits_of(store[1]) == bits_of(random_state(CELL, 3))


def test_files_that_are_no_segments_are_refused(tmp_path):
    store = ClientStore(tmp_path, memory=0)
    keep(store, {1: random_state(CELL, 1)})
    (file,) = store.flush()
    for harm in (truncate, garble, Path.unlink):
        harm(tmp_path / file.name)
        with pytest.raises(ValueError, match=file.name):
            ClientStore(tmp_path).restore([file])


def test_without_a_folder_a_temporary_one_is_made_when_needed_and_goes_with_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = ClientStore(memory=100)
    keep(store, {client: random_state(CELL, client) for client in range(5)})
    store.tidy()
    assert contents(store).keys() == set(range(5))
    assert not list(tmp_path.iterdir())
    keep(store, {5: random_state(CELL, 5)})
    (folder,) = tmp_path.iterdir()
    assert on_disk(folder)
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_write_costs_what_changed(tmp_path, monkeypatch):
    """Over many rounds, at most 2.5 times as much: what is written anew is not more than what was replaced."""
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2**20)
    written = 0

    def write(path, content, **options):
        nonlocal written
        written += len(content)
        return WRITE(path, content, **options)

    monkeypatch.setattr(module, "write", write)
    store, rng, size, rounds = ClientStore(tmp_path), np.random.default_rng(0), 2**12, 500
    keep(store, {client: {"c": torch.zeros(size // 4)} for client in range(1000)})
    store.flush()
    written = 0
    for number in range(rounds):
        cohort = [int(client) for client in rng.choice(1000, 10, replace=False)]
        keep(store, {client: {"c": torch.full((size // 4,), float(number))} for client in cohort})
        store.tidy()
        store.pinned = {file.name for file in store.flush()}
        store.tidy()
        if not number:
            assert written < 1.1 * 10 * size  # 10 of 1000, and no others
    assert written <= 2.5 * rounds * 10 * size
    assert sum(on_disk(tmp_path).values()) <= 2.1 * 1000 * size


RUNTIMES = ["serial", {"name": "threads", "workers": 2}]


@pytest.mark.parametrize(("name", "little"), [("scaffold", 2000), ("fedbn", 100)])
@pytest.mark.parametrize("runtime", RUNTIMES, ids=["serial", "threads"])
def test_a_run_is_the_same_however_little_fits_in_memory(runtime, name, little):
    def run(memory):
        simulation = make_simulation(name, runtime=runtime, cohort={"name": "uniform", "size": 4})
        simulation.clients = ClientStore(memory=memory)
        shown = trace(simulation, rounds=4)
        return shown, simulation.clients.folder

    (expected, nothing), (small, folder) = run(LARGE), run(little)
    assert small == expected
    assert nothing is None
    assert folder


@dataclass(frozen=True, kw_only=True)
class Faulty(Wrapper):
    """Some clients fail, and some send more than others."""

    bad: set[int] = field(default_factory=set)
    odd: set[int] = field(default_factory=set)

    def client_update(self, server, client, local):
        if local.client_id in self.bad:
            raise OSError("no space left")
        update = super().client_update(server, client, local)
        if local.client_id in self.odd:
            return update._replace(message=update.message | {"more": local.num_steps.float()})
        return update


@pytest.mark.parametrize("runtime", RUNTIMES, ids=["serial", "threads"])
def test_a_failed_round_leaves_the_store_as_it_was(runtime):
    """In memory and on disk, though some of it was written there."""
    strategy = Faulty(inner=make_strategy("scaffold"))
    simulation = make_simulation(strategy, runtime=runtime)
    simulation.clients = store = ClientStore(memory=2000)
    expected = trace(make_simulation("scaffold"), rounds=3)
    assert trace(simulation, rounds=2) == expected[:2]
    before, files = contents(store), on_disk(store.folder)
    strategy.bad.add(5)
    for _ in range(3):
        with pytest.raises(ClientError, match="round 3, client 5"):
            simulation.round()
        assert contents(store) == before
        assert held(store) <= 2000
    if runtime == "serial":  # in threads client 5 may be the first to end
        assert on_disk(store.folder) != files
    strategy.bad.clear()
    assert trace(simulation, rounds=1) == expected[2:]
    free = sum(on_disk(store.folder).values())
    assert free <= 2 * sum(value.nbytes for state in store.values() for value in state.values())


def test_a_dropped_client_keeps_what_it_had_after_a_resume(tmp_path):
    """Though what it would have kept was on disk already, in one file with what the others keep."""
    strategy = Faulty(inner=make_strategy("scaffold"))
    simulation = make_simulation(strategy, failures=Failures(policy="drop"))
    simulation.clients = store = ClientStore(tmp_path)
    simulation.round()
    store.memory = held(store) - 1
    before = contents(store)
    strategy.odd.update({3, 4, 5})
    assert simulation.round().failed.keys() == {"3", "4", "5"}
    assert len(on_disk(tmp_path)) == 2
    resumed = ClientStore(tmp_path)
    resumed.restore(store.flush())
    assert contents(resumed) == contents(store)
    assert all((bits_of(resumed[client]) == before[client]) == (client > 2) for client in before)
