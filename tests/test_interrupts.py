"""Law 4, stop anywhere, same end: an interrupt, a disk that is full and one that fails end a run in a line, and a
resume has the end of one never stopped.
"""

import errno
import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from forks import Forks
from small_run import left, refused, resumed, rounds_done, rounds_logged, snapshots, whole, write

# Interrupts

EARLY = "fedsim: interrupted\n"  # before the run began
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)


@SIGNALS
def test_an_interrupt_at_random_leaves_a_checkpoint_of_all_that_was_done(forks, folder, number):
    """Though by itself it would save none before the end."""
    write(folder, rounds=20, checkpoint={"every": None}, runtime="threads")
    expected = whole(forks, folder)
    rng, patience, interrupts, how = random.Random(0), 0.12, 0, ["run", "c.yaml", "--out=run"]
    while (done := forks.run(*how, cwd=folder, kills=[(rng.uniform(0.04, patience), number)])).status:
        assert done.status == 130, str(done)
        interrupts, patience, logged = interrupts + 1, 1.05 * patience, rounds_logged(folder / "run")
        assert rounds_done(folder / "run") in (logged, logged + 1)
        if done.err != EARLY:
            assert done.err.endswith(f"after round {logged} of 20; fedsim resume run goes on\n")
        how = ["resume", "run"] if (folder / "run").exists() else how
    assert interrupts > 1
    assert left(folder / "run") == expected


MINE = """
import os, signal
from fedsim import Hook

class Descriptor:
    def __set_name__(self, owner, name):  # Python 3.11 raises RuntimeError where this raises anything
        if os.path.exists("interrupt"):
            signal.raise_signal(signal.SIGINT)

class Mine(Hook):
    descriptor = Descriptor()
"""


@pytest.mark.parametrize("command", ["run c.yaml", "resume done", "sweep c.yaml seed=0,1 --jobs=1"])
def test_an_interrupt_while_a_module_of_the_config_is_imported_ends_in_a_line(forks, folder, command):
    (folder / "mine.py").write_text(MINE)
    write(folder, rounds=1, hooks=["mine:Mine"])
    told = f"fedsim: hooks[0].name: imports mine, which is not fedsim's: {folder}/mine.py\n"
    done = forks.run("run", "c.yaml", "--out=done", cwd=folder, prepare=["own_modules"])
    assert (done.status, done.err) == (0, told), str(done)
    (folder / "interrupt").touch()
    done = forks.run(*command.split(), cwd=folder, prepare=["own_modules"])
    assert (done.status, done.err) == (130, told + EARLY), str(done)
    assert not (folder / "runs").exists()


def interrupted_at_lines(forks, folder, lines):
    """A signal at each of these shares of all the lines that a run executes."""
    write(folder, rounds=4, checkpoint={"every": None})
    expected = whole(forks, folder)
    done = forks.run("run", "c.yaml", "--out=count", cwd=folder, prepare=["count_lines", "lines"])
    assert done.status == 0, str(done)
    most = int((folder / "lines").read_text())

    def one(share):
        line, number = int(share * most), [signal.SIGINT, signal.SIGTERM][int(share * 1e6) % 2]
        name = f"line{line}"
        done = forks.run("run", "c.yaml", f"--out={name}", cwd=folder, prepare=["interrupt_at", line, number])
        if done.status == 0:  # after the last round an interrupt waits for the end
            assert left(folder / name) == expected, line
            return
        assert done.status == 130, (line, done)
        if not (folder / name).exists():
            return
        logged = rounds_logged(folder / name)
        assert rounds_done(folder / name) in (logged, logged + 1), line
        assert resumed(forks, folder, name) == expected, line
        shutil.rmtree(folder / name)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, lines))


def test_an_interrupt_at_any_line_leaves_no_wrong_checkpoint(forks, folder):
    rng = random.Random(0)
    interrupted_at_lines(forks, folder, [rng.random() for _ in range(8)])


@pytest.mark.slow
def test_an_interrupt_at_each_of_a_thousand_lines_leaves_no_wrong_checkpoint(forks, folder):
    interrupted_at_lines(forks, folder, [i / 1000 for i in range(1, 1000)])


def test_a_round_that_was_interrupted_before_its_test_is_tested_on_resume(forks, folder):
    write(folder, checkpoint={"every": None})
    expected = whole(forks, folder)
    for number in (1, 2):
        name = f"run{number}"
        done = forks.run("run", "c.yaml", f"--out={name}", cwd=folder, prepare=["interrupt_in_test", number])
        assert done.status == 130
        assert (rounds_done(folder / name), rounds_logged(folder / name)) == (2 * number, 2 * number - 1)
        assert resumed(forks, folder, name) == expected


def test_an_interrupt_of_the_picture_loses_no_round(forks, folder):
    """One that comes when all rounds are done, and nothing is saved yet, waits until it is."""
    write(folder, checkpoint={"every": None}, hooks=["curves", "tensorboard"])
    expected = whole(forks, folder)
    done = forks.run("run", "c.yaml", "--out=run", cwd=folder, prepare=["interrupt_in_picture"])
    assert done.status == 0, str(done)
    assert left(folder / "run") == expected


# Disks that are full, or fail


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """Commands that see a disk of their own, of 256 KiB."""
    try:
        forks = Forks(tmp_path_factory.mktemp("disk"), disk=2**18)
    except OSError as error:
        pytest.skip(f"a disk of one's own is not allowed here: {error}")
    yield forks
    forks.close()


def starved(done, run):
    """It ended with status 1 and one line that names a file and the reason; nothing was lost."""
    assert done.status == 1, str(done)
    assert done.err.startswith((f"fedsim: {run}/", f"fedsim: {run}: ")), str(done)
    assert done.err.count("\n") == 1, str(done)


PICTURES = pytest.param(["curves", "tensorboard"], marks=pytest.mark.slow)


@pytest.mark.parametrize("hooks", [["tensorboard"], PICTURES], ids="-".join)
def test_a_disk_that_is_full_ends_a_run_in_a_line_and_with_room_it_goes_on(small_disk, hooks):
    folder, page = small_disk.disk, 4096
    write(folder, evaluate={"every": 1, "clients": True}, rounds=6, hooks=hooks)
    expected = whole(small_disk, folder)
    shutil.rmtree(folder / "whole")
    ends = set()
    for pages in [*range(2, 17, 2), 24] if "curves" in hooks else [*range(3, 17, 2), 24]:  # that are free
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(folder).free - pages * page))
        done = small_disk.run("run", "c.yaml", "--out=run", cwd=folder)
        ballast.unlink()
        if done.status:
            starved(done, "run")
            assert "No space left on device" in done.err
            ends.add(rounds_done(folder / "run"))
        assert resumed(small_disk, folder, "run") == expected, pages
        shutil.rmtree(folder / "run")
    assert ends >= {0, 1, 2}
    assert len(ends) > 3


def test_files_that_may_not_grow_end_a_run_in_a_line_and_then_it_goes_on(forks, folder):
    write(folder, rounds=12, evaluate={"every": 1, "clients": True})
    expected = whole(forks, folder)
    ends = set()
    for limit in (1700, 1850, 2500, 3300, 4000, 4500, 5000):
        name = f"run{limit}"
        done = forks.run("run", "c.yaml", f"--out={name}", cwd=folder, prepare=["small_files", limit])
        starved(done, name)
        assert "File too large" in done.err
        ends.add(rounds_done(folder / name))
        assert resumed(forks, folder, name) == expected, limit
    assert len(ends) > 2


def test_a_disk_that_fails_at_many_changes_ends_a_run_in_a_line_and_then_it_goes_on(forks, folder):
    failed_at_changes(forks, folder, errno.EIO, False, 29)


@pytest.mark.slow
@pytest.mark.parametrize(("error", "lasting"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_a_disk_that_fails_at_any_change_ends_a_run_in_a_line_and_then_it_goes_on(forks, folder, error, lasting):
    failed_at_changes(forks, folder, error, lasting, 1)


def failed_at_changes(forks, folder, error, lasting, step):
    """Have each `step`th change to a run's files fail; with `lasting` all that takes room fails from then on."""
    write(folder, rounds=3, evaluate={"every": 1}, hooks=["curves", "tensorboard"])
    expected = whole(forks, folder)
    (folder / "at").mkdir()
    forks.run("run", "c.yaml", "--out=run", cwd=folder, prepare=["snapshots", "run", "at"])

    def end(change):
        name = f"run{change}"
        fault = ["fail_in", name, change, error, lasting]
        done = forks.run("run", "c.yaml", f"--out={name}", cwd=folder, prepare=fault)
        assert os.strerror(error) in done.err or done.status == 0, str(done)  # nothing depends on a folder's draft
        if done.status == 2:
            refused(done, f"{name}: cannot be made")
            assert not (folder / name).exists()
            return forks.run("run", "c.yaml", f"--out={name}", cwd=folder).status
        if done.status == 0:  # but for pictures and the like, which are only told
            assert all(line.startswith(f"fedsim: {name}/") for line in done.err.splitlines()), str(done)
        else:
            starved(done, name)
        found = resumed(forks, folder, name)
        shutil.rmtree(folder / name)
        assert found == expected, change
        return 0

    with ThreadPoolExecutor(3) as pool:
        assert not any(pool.map(end, range(4 % step, len(snapshots(folder)), step)))
