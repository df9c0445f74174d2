"""Processes that start at once: a server that has imported everything forks one for each `fedsim` command.

Importing torch and its friends takes seconds, a run of a few rounds a tenth of one; to kill hundreds of runs, they
should start warm. Started as a script, with a socket's path, this is the server; imported, the other end of it.
"""

import faulthandler
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WARM = {  # a run that imports what any other here needs
    "rounds": 1,
    "data": {"name": "synthetic", "examples": 20, "test_examples": 5, "classes": 2, "clients": 2},
    "model": {"name": "cnn_bn", "widths": [2, 2]},
    "strategy": "fedavg",
    "cohort": "all",
    "local": {"lr": 0.1, "batch_size": 5},
    "runtime": "serial",
}


@dataclass
class Done:
    """How a process ended: its exit status, or minus the signal that killed it; and what it said."""

    status: int
    out: str
    err: str
    seconds: float


class Process:
    """A command under way; whoever leaves it, kills it."""

    def __init__(self, server, request):
        self._files = [Path(request["out"]), Path(request["err"])]
        for path in self._files:
            path.touch()  # as it may be killed before it does
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(server)
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._lines = self._socket.makefile()
        self.pid = json.loads(self._lines.readline())["pid"]

    def send(self, number):
        """A signal, unless it has ended."""
        self._socket.sendall(b"%d\n" % number)

    def wait(self):
        told = json.loads(self._lines.readline())
        self._lines.close()
        self._socket.close()
        out, err = (path.read_text() for path in self._files)
        return Done(told["status"], out, err, told["seconds"])


class Forks:
    """Starts commands by a server in a folder of its own. Any thread may.

    With `disk`, a number of bytes, they see in `self.disk` a disk of that size, empty. Raises OSError where this
    process may not make one.
    """

    def __init__(self, folder, disk=0):
        self._folder = tempfile.TemporaryDirectory(dir=folder)
        self.path = f"{self._folder.name}/socket"
        self._count = 0
        self._lock = threading.Lock()
        one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        serve = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", __file__, self.path]
        if disk:
            place = Path(self._folder.name, "disk")
            place.mkdir()
            mount = f'mount -t tmpfs -o size={disk} none {place} && exec "$@"'
            serve = ["unshare", "--mount", "sh", "-c", mount, "sh", *serve]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE if disk else None}
        self._server = subprocess.Popen(serve, **pipes, text=True, env=os.environ | one)
        ready = self._server.stdout.readline()
        if not ready:
            raise OSError(self._server.communicate()[1].strip())
        self.threads = int(ready)
        self.disk = Path(f"/proc/{self._server.pid}/root{place}") if disk else None  # for other processes too

    def start(self, *argv, cwd, prepare=(), kills=(), limit=120.0):
        """`fedsim ARGV` in `cwd`. `prepare` names a function here and its arguments, called before the command.

        `kills` are pairs of seconds, from the fork on, and a signal. After `limit` seconds it counts as hung.
        """
        with self._lock:
            self._count += 1
            out, err = (f"{self._folder.name}/{self._count}.{kind}" for kind in ("out", "err"))
        request = {"argv": [str(part) for part in argv], "cwd": str(cwd), "out": out, "err": err}
        return Process(self.path, request | {"prepare": list(prepare), "kills": list(kills), "limit": limit})

    def run(self, *argv, **how):
        return self.start(*argv, **how).wait()

    def close(self):
        self._server.stdin.close()  # which ends it
        self._server.wait(10)
        self._server.stdout.close()
        if self._server.stderr:
            self._server.stderr.close()
        self._folder.cleanup()


# What goes on before a command, in its process


def jumping_clock():
    """The time of day goes back and forth by days."""
    import time

    real, jumps = time.time, iter([0, 86400.0, -86400.0, 3600.0, -1e6, 5.0] * 10**6)
    time.time = lambda: real() + next(jumps)
    import fedsim.experiment.hooks.tensorboard

    fedsim.experiment.hooks.tensorboard.time = time.time


def small_files(limit):
    """No file may grow beyond so many bytes: what a disk does that is full, and works everywhere."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it anyway
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def powerless():
    """Give up root's right to write where nobody may."""
    import ctypes

    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    libc.capget(header, data)
    data[0] &= ~0b110  # of the effective ones, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    libc.capset(header, data)


def old_draft(name):
    """What a process with this one's number has left."""
    (Path(f".{name}.{os.getpid()}.draft")).mkdir()


RUN = (  # the files in which a run is kept whole
    *("/fedsim/experiment/", "/fedsim/runtimes/", "/fedsim/federated/simulation.py", "/fedsim/federated/store.py"),
    "/fedsim/base/files.py",
)


def interrupt_at(line, number=signal.SIGINT):
    """A signal as the interpreter comes to the so-many-th line of RUN's files that it executes."""
    lines = _Lines(lambda count: count == line and signal.raise_signal(number))
    sys.settrace(lines)
    threading.settrace(None)


def own_modules():
    """Let configs name modules of the working directory."""
    sys.path.insert(0, os.getcwd())


def own_words(tests, folder=None, change=None):
    """Let configs name modules of the tests; with `folder`, the process dies as by `die_in`."""
    sys.path.insert(0, tests)
    if folder:
        die_in(folder, change)


def interrupt_in_test(number):
    """A signal while the global model is tested the so-many-th time."""
    from fedsim.federated.simulation import Simulation

    evaluate, tests = Simulation.evaluate, []

    def interrupted(self, *args, **options):
        tests.append(1)
        if len(tests) == number:
            signal.raise_signal(signal.SIGINT)
        return evaluate(self, *args, **options)

    Simulation.evaluate = interrupted


def interrupt_in_picture():
    """A signal as the curves are drawn."""
    import fedsim.report.plot

    drawn = fedsim.report.plot.curves

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return drawn(*args)

    fedsim.report.plot.curves = interrupted


def count_lines(path):
    """Write to a file how many lines of RUN's files `fedsim` has executed, at the end."""
    from fedsim.cli import commands

    lines, main = _Lines(lambda count: None), commands.app

    def counted():
        try:
            main()
        finally:
            sys.settrace(None)
            Path(path).write_text(str(lines.count))

    commands.app = counted
    sys.settrace(lines)


class _Lines:
    """A tracer of RUN's files."""

    def __init__(self, tell):
        self.tell, self.count, self.known = tell, 0, {}

    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename
        if name not in self.known:
            self.known[name] = any(text in name for text in RUN)
        return self.local if self.known[name] else None

    def local(self, frame, event, arg):
        if event == "line":
            self.count += 1
            self.tell(self.count)
        return self.local


def snapshots(folder, to):
    """Copy a folder to TO/000000 and so on whenever a file is about to change, and when one is half written."""
    import shutil

    number = iter(range(10**6))

    def copy(*_):
        if os.path.exists(folder):
            shutil.copytree(folder, f"{to}/{next(number):06}")

    _before_changes(copy)


def die_at(change):
    """SIGKILL at the so-many-th such moment, from 0; before the folder is there, none counts."""
    number = iter(range(10**6))

    def die(*_):
        if next(number) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    _before_changes(die)


def die_in(folder, change):
    """The same, where moments count from when a folder is there."""
    number = iter(range(10**6))

    def die(*_):
        if os.path.exists(folder) and next(number) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    _before_changes(die)


def fail_in(folder, change, error, lasting):
    """OSError at the so-many-th such moment; with `lasting` all that takes room fails from then on."""
    number, failed = iter(range(10**6)), False

    def fail(how, path):
        nonlocal failed
        first = os.path.exists(folder) and next(number) == change
        if first or (failed and how in TAKES_ROOM):
            failed = lasting
            raise OSError(error, os.strerror(error), *([] if path is None else [str(path)]))

    _before_changes(fail)


def power_losses(folder, to):
    """What a disk may hold when power fails, at each such moment, in two folders TO/000000 and so on.

    In one of them names are as they were when their folder was last synchronised; in the other they are as they
    are, but of what the files hold, and in both, there is only what was when they were last synchronised.
    """
    content, names, number = {}, {}, iter(range(10**6))  # by inode: what is on disk
    fsync, open_ = os.fsync, Path.open

    def listing(path):
        return [(entry.name, entry.inode(), entry.is_dir()) for entry in os.scandir(path)]

    def remember(path):
        if path.is_dir():
            names[path.stat().st_ino] = listing(path)
        else:
            content[path.stat().st_ino] = path.read_bytes()

    def synced(handle):
        fsync(handle)
        remember(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def opened(self, mode="r", *args, **options):
        file = open_(self, mode, *args, **options)
        if mode == "xb":  # perhaps with the inode of one that is gone
            content.pop(os.fstat(file.fileno()).st_ino, None)
        return file

    def image(path, inode, to, by_name):
        to.mkdir()
        for name, below, is_folder in names.get(inode, []) if by_name else listing(path):
            if is_folder:
                image(path / name, below, to / name, by_name)
            else:
                (to / name).write_bytes(content.get(below, b""))

    def lose(*_):
        if os.path.exists(folder):
            for by_name in (True, False):
                image(Path(folder), os.stat(folder).st_ino, Path(f"{to}/{next(number):06}"), by_name)

    for path in Path(folder).glob("**"):  # of one that is resumed
        for each in (path, *path.iterdir()):
            remember(each)
    os.fsync, Path.open = synced, opened
    _before_changes(lose)


TAKES_ROOM = ("mkdir", "open", "write")


def _before_changes(tell):
    """Have `tell` called before each change to files that fedsim makes, and halfway through each write.

    With the name of what is about to happen, and the path that its errors would have.
    """
    busy = False

    def once(how, path=None):
        nonlocal busy
        if not busy:  # what `tell` does itself is not told
            busy = True
            try:
                tell(how, path)
            finally:
                busy = False

    def told(name):
        function = getattr(os, name)

        def call(*args, **options):
            once(name, None if name == "fsync" else args[0])
            return function(*args, **options)

        setattr(os, name, call)

    for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
        told(name)
    open_ = Path.open

    def opened(self, mode="r", *args, **options):
        if mode in ("xb", "ab"):
            once("open", self)
            return _Torn(open_(self, mode, *args, **options), once)
        return open_(self, mode, *args, **options)

    Path.open = opened


class _Torn:
    """A file that is written in two halves."""

    def __init__(self, file, once):
        self.file, self.once = file, once

    def write(self, content):
        half = len(content) // 2
        self.once("write")
        self.file.write(content[:half])
        self.file.flush()
        self.once("write")
        self.file.write(content[half:])
        self.file.flush()
        return len(content)

    def truncate(self, size):
        self.once("truncate")
        return self.file.truncate(size)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


# The server


def _serve(path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fedsim
        import fedsim.cli.commands

        with tempfile.TemporaryDirectory() as folder:
            fedsim.run(WARM, out=f"{folder}/run")
    gc.collect()
    gc.freeze()  # so that children need not copy what they do not change
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(len(os.listdir("/proc/self/task")), flush=True)  # a fork copies one thread: there should be no other
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in ready:
            server.close()
            return
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _watch(connection)
            finally:
                os._exit(0)
        connection.close()


def _watch(connection):
    """Fork a command, send it signals, tell how it ended."""
    lines = connection.makefile()
    request = json.loads(lines.readline())
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in the command, until it handles them
    pid = os.fork()
    if pid == 0:
        connection.close()
        _command(request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    start = monotonic()
    with ExitStack() as stack:
        ended = os.pidfd_open(pid)
        stack.callback(os.close, ended)
        connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        due = sorted([*((start + after, number) for after, number in request["kills"])])
        due.append((start + request["limit"], signal.SIGKILL))
        hung = False
        while True:
            ready, _, _ = select.select([ended, connection], [], [], max(due[0][0] - monotonic(), 0))
            if ended in ready:
                break
            if connection in ready:
                line = lines.readline()  # one signal at a time
                os.kill(pid, int(line or signal.SIGKILL))
                if not line:
                    break
            elif due[0][0] <= monotonic():
                os.kill(pid, due.pop(0)[1])
                hung = not due
                if hung:
                    break
    status = "hung" if hung else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(json.dumps({"status": status, "seconds": monotonic() - start}).encode() + b"\n")


def _command(request):
    status = 1
    try:
        os.chdir(request["cwd"])
        for number, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["out"], os.O_WRONLY | os.O_CREAT),
            (2, request["err"], os.O_WRONLY | os.O_CREAT),
        ):
            file = os.open(path, flags, 0o666)
            os.dup2(file, number)
            os.close(file)
        faulthandler.enable()  # were it to crash, standard error would say where
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us behind a `&`
        sys.argv = ["fedsim", *request["argv"]]
        import fedsim.cli

        fedsim.cli.exit_on_interrupt()  # as main does first of all
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if request["prepare"]:
            name, *args = request["prepare"]
            globals()[name](*args)
        fedsim.cli.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
