"""Laws of hooks: each is called for every event in order, none changes what is learned, each may end a run."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

import fedsim
from fedsim import ClientError, ConfigError, Hook, RoundError, Wrapper
from fedsim.base.catalogue import Catalogue
from fedsim.experiment.hooks import HOOKS
from fedsim.experiment.hooks.stopping import EarlyStopping
from fedsim.experiment.progress import Bar, Plain
from fedsim.federated.simulation import Evaluation

COMMAND = [sys.executable, "-P", "-c", "from fedsim.cli import main; main()"]
CONFIG = {
    "rounds": 3,
    "data": {"name": "synthetic", "examples": 30, "test_examples": 12, "classes": 3, "clients": 3},
    "model": {"name": "cnn_bn", "widths": [2, 2]},
    "strategy": "fedavg",
    "cohort": {"name": "fixed", "clients": [0, 2]},
    "evaluate": {"every": 2},
    "runtime": "serial",
    "hooks": [],
}
THREADS = {"name": "threads", "workers": 2}
EVENTS = [
    *("before_run", "before_round", "before_client", "after_client", "before_evaluation", "after_evaluation"),
    *("after_round", "after_run"),
]
ROUND = ["before_round", "before_client 0", "after_client 0", "before_client 2", "after_client 2"]
TEST = ["before_evaluation", "after_evaluation"]


class Teller(Hook):
    """Writes down what it is told, and may do something then."""

    def __init__(self, heard=None, name="", do=None, at=None, **settings):
        super().__init__(**settings)
        self.heard, self.name, self.do, self.at = [] if heard is None else heard, name, do, at

    def hear(self, run, event, *about):
        assert threading.current_thread() is threading.main_thread()
        self.heard.append(" ".join(filter(None, [self.name, event, *map(str, about)])))
        if event == self.at:
            self.do(run)


def listener(event):
    def listen(self, run, *about):
        client = {"before_client": lambda client: [client], "after_client": lambda report: [report.client_id]}
        self.hear(run, event, *client.get(event, lambda *record: [])(*about))

    return listen


for event in EVENTS:
    setattr(Teller, event, listener(event))


def fails(error):
    def fail(*_):
        raise error

    return fail


def run(*hooks, out=None, **settings):
    return fedsim.run(CONFIG | settings, out=out, hooks=hooks)


def lines(folder):
    """Of rounds.jsonl, as any parser takes it: no NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in (folder / "rounds.jsonl").read_text().splitlines()]


# Events


def test_all_that_happens_is_told_in_its_order():
    teller = Teller()
    run(teller)
    first, second, third = ROUND, [*ROUND, *TEST], [*ROUND, *TEST]
    after = ["after_round"]
    assert teller.heard == ["before_run", *first, *after, *second, *after, *third, *after, "after_run"]


def test_in_threads_too_a_client_is_told_of_before_and_after_it_ran():
    teller = Teller()
    run(teller, runtime=THREADS, cohort="all", rounds=1)
    for client in range(3):
        assert teller.heard.count(f"before_client {client}") == teller.heard.count(f"after_client {client}") == 1
        before, after = (teller.heard.index(f"{when}_client {client}") for when in ("before", "after"))
        assert before < after
    assert teller.heard[:2] == ["before_run", "before_round"]
    assert teller.heard[-4:] == [*TEST, "after_round", "after_run"]


def test_hooks_are_told_by_priority_and_else_as_they_were_named():
    heard = []
    tellers = [
        Teller(heard, name, priority=p) for name, p in [("a", 60), ("b", 50), ("c", 10), ("d", 50), ("e", 60)]
    ]
    run(*tellers)
    *all_but_the_end, end = [[line.split()[0] for line in heard[i : i + 5]] for i in range(0, len(heard), 5)]
    assert all(order == list("cbdae") for order in all_but_the_end)
    assert end == list("eadbc")  # the first to begin is the last to end
    alone = Teller()
    run(alone)
    assert [line.split(maxsplit=1)[1] for line in heard[::5]] == alone.heard


class Looks(Hook):
    """What a hook sees of a run, in each event."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_run(self, run):
        self.seen.append(("before_run", run.simulation.number, len(run.records)))

    def before_round(self, run):
        self.seen.append(("before_round", run.simulation.number, len(run.records)))

    def before_evaluation(self, run, record):
        assert record["round"] == run.simulation.number == len(run.records) + 1
        assert record["fingerprint"] == run.simulation.fingerprint()
        assert "test_loss" not in record

    def after_evaluation(self, run, record):
        assert record["test_loss"] > 0
        assert 0 <= record["test_accuracy"] <= 1

    def after_round(self, run, record):
        assert record is run.records[-1]
        assert record == lines(run.folder.path)[-1]
        self.seen.append(("after_round", run.simulation.number, len(run.records)))

    def after_run(self, run):
        self.seen.append(("after_run", run.simulation.number, len(run.records)))


def test_a_hook_sees_the_run_as_it_is(tmp_path):
    looks = Looks()
    run(looks, out=tmp_path / "run", rounds=2)
    assert looks.seen == [
        ("before_run", 0, 0),
        ("before_round", 0, 0),
        ("after_round", 1, 1),
        ("before_round", 1, 1),
        ("after_round", 2, 2),
        ("after_run", 2, 2),
    ]


def test_an_absent_client_is_told_of_to_nobody():
    """Nor is one in a round that was given up."""
    teller = Teller()
    run(teller, rounds=1, availability={"deadline": 1e-3})
    assert teller.heard == ["before_run", "before_round", *TEST, "after_round", "after_run"]


def test_hooks_change_nothing_that_is_learned(tmp_path):
    every = [*HOOKS, {"name": "early_stopping", "metric": "test_accuracy"}]
    plain = run(out=tmp_path / "plain")
    watched = run(Teller(), out=tmp_path / "watched", hooks=every)
    assert [r["fingerprint"] for r in watched.rounds] == [r["fingerprint"] for r in plain.rounds]


# The end


FAULT = SimpleNamespace(error=None, after=0)  # what Breaks raises, and how many clients train before


@dataclass(frozen=True, kw_only=True)
class Breaks(Wrapper):
    """Raises the error of FAULT, if there is one, once so many clients have trained."""

    def client_update(self, server, client, local):
        if FAULT.error and FAULT.after == 0:
            raise FAULT.error
        FAULT.after -= 1
        return super().client_update(server, client, local)


BREAKS = {"name": "test_hooks:Breaks", "inner": "fedavg"}


@pytest.fixture
def breaks(monkeypatch):
    """Clients of the strategy BREAKS raise an error from now on, after so many that do not."""

    def breaks(error, after=0):
        monkeypatch.setattr(FAULT, "error", error)
        monkeypatch.setattr(FAULT, "after", after)

    return breaks


ENDS = {
    "success": (None, None, 2),
    "client": (KeyError("x"), ClientError, 1),
    "interrupt": (KeyboardInterrupt(), None, 1),
    "exit": (SystemExit(3), ClientError, 1),
}


@pytest.mark.parametrize(("error", "raised", "rounds"), ENDS.values(), ids=ENDS)
def test_the_end_is_told_however_a_run_ends(error, raised, rounds, breaks, tmp_path):
    """Once to each, when all is known; and the folder is free for a resume."""
    breaks(error, after=3)
    tellers, looks = [Teller(), Teller(priority=90)], Looks()
    if raised:
        with pytest.raises(raised):
            run(*tellers, looks, out=tmp_path / "run", rounds=2, strategy=BREAKS)
    else:
        result = run(*tellers, looks, out=tmp_path / "run", rounds=2, strategy=BREAKS)
        assert result.interrupted == (rounds < 2)
        assert len(result.rounds) == rounds
    for teller in tellers:
        assert teller.heard.count("after_run") == 1
        assert teller.heard[-1] == "after_run"
    assert looks.seen[-1] == ("after_run", rounds, rounds)
    breaks(None)
    assert len(fedsim.resume(tmp_path / "run").rounds) == 2


@pytest.mark.parametrize("event", EVENTS)
def test_a_hook_that_fails_is_named_with_event_file_and_line(event, tmp_path):
    """The run has failed; hooks that were told of its beginning are told of its end, and a resume goes on."""
    before, after = Teller(priority=10), Teller(priority=90)
    bad = Teller(do=fails(ValueError("no luck")), at=event)
    said = rf"^hook Teller, {event}: ValueError: no luck \(test_hooks\.py:\d+\)$"
    with pytest.raises(RoundError, match=said) as caught:
        run(before, bad, after, out=tmp_path / "run")
    assert isinstance(caught.value.__cause__, ValueError)
    assert before.heard.count("after_run") == 1
    assert after.heard.count("after_run") == ("before_run" in after.heard) == (event != "before_run")
    assert bad.heard.count("after_run") == (event != "before_run")
    assert len(fedsim.resume(tmp_path / "run").rounds) == 3
    assert lines(tmp_path / "run") == fedsim.resume(tmp_path / "run").rounds


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (ConfigError("a"), "before_run"),
        (ClientError("b"), "after_round"),
        (RoundError("c"), "after_round"),
        (OSError(28, "d", "e"), "after_round"),
    ],
    ids=repr,
)
def test_what_says_enough_by_itself_is_raised_as_it_is(error, event):
    with pytest.raises(type(error)) as caught:
        run(Teller(do=fails(error), at=event))
    assert caught.value is error


def test_in_a_run_a_config_error_of_a_hook_is_a_failure_of_the_run():
    with pytest.raises(RoundError, match=r"^hook Teller, after_round: a$"):
        run(Teller(do=fails(ConfigError("a")), at="after_round"))


def test_a_hook_that_fails_at_the_end_does_not_hide_what_ended_the_run():
    bad = Teller(do=fails(ValueError("late")), at="after_run")
    worse = Teller(do=fails(ValueError("early")), at="before_round")
    with pytest.raises(RoundError, match="early"):
        run(bad, worse)


def test_of_hooks_that_fail_at_the_end_the_first_is_raised_and_none_is_left_out():
    heard = []
    hooks = [Teller(heard, name, do=fails(ValueError(name)), at="after_run") for name in "ab"]
    with pytest.raises(RoundError, match=r"after_run: ValueError: b \("):
        run(*hooks)
    assert heard[-2:] == ["b after_run", "a after_run"]


def test_a_hook_that_is_interrupted_ends_the_run_as_an_interrupt_does(tmp_path):
    result = run(Teller(do=fails(KeyboardInterrupt()), at="after_round"), out=tmp_path / "run")
    assert result.interrupted
    assert len(result.rounds) == len(fedsim.resume(tmp_path / "run", {"rounds": 3}).rounds[:1]) == 1


def test_an_interrupt_while_a_lock_is_taken_again_is_one(tmp_path):
    """As at the end of a wait: of the interrupt Python then makes an error of the lock."""

    class Lock:
        """A condition's lock, whose thread is interrupted before it has it again."""

        def __init__(self):
            self.lock = threading.RLock()

        def __getattr__(self, name):
            return getattr(self.lock, name)

        def _acquire_restore(self, state):
            raise KeyboardInterrupt

    def wait(run):
        condition = threading.Condition(Lock())
        with condition:
            condition.wait(0.01)

    result = run(Teller(do=wait, at="after_round"), out=tmp_path / "run")
    assert result.interrupted
    assert len(result.rounds) == 1


def test_an_interrupt_among_the_last_words_keeps_nobody_from_them(tmp_path):
    """As when Ctrl-C is pressed twice: the others, and what saves the run, are told all the same."""
    heard = []
    hooks = [Teller(heard, name, do=fails(KeyboardInterrupt()), at="after_run") for name in "ab"]
    with suppress(KeyboardInterrupt):
        run(*hooks, out=tmp_path / "run", checkpoint={"every": None})
    assert heard[-2:] == ["b after_run", "a after_run"]
    assert checkpoints(tmp_path / "run") == [3]
    assert len(fedsim.resume(tmp_path / "run").rounds) == 3


def test_nothing_runs_on_when_a_hook_fails_among_clients():
    """And the round is as if it had not been."""
    looks = Looks()
    with pytest.raises(RoundError):
        run(looks, Teller(do=fails(ValueError()), at="after_client"), runtime=THREADS, cohort="all")
    assert looks.seen[-1] == ("after_run", 0, 0)


@pytest.mark.parametrize("event", EVENTS[1:-1])
def test_any_hook_may_end_a_run_after_the_round_under_way(event, tmp_path):
    ends, teller = Teller(do=lambda run: run.stop(f"by {event}"), at=event), Teller()
    result = run(ends, teller, out=tmp_path / "run", evaluate={"every": 1})
    assert teller.heard == ["before_run", *ROUND, *TEST, "after_round", "after_run"]
    assert (result.summary["stopped"], result.summary["rounds"]) == (f"by {event}", 1)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == result.summary
    assert not result.interrupted


def test_who_ends_a_run_first_says_why():
    one, other = (Teller(do=lambda run, why=why: run.stop(why), at="after_round") for why in ("one", "other"))
    assert run(one, other).summary["stopped"] == "one"


def test_after_an_interrupt_within_a_test_the_test_is_told_again(tmp_path):
    """The round itself is not: it was done, and has no line yet."""
    first, again = Teller(do=fails(KeyboardInterrupt()), at="before_evaluation"), Teller()
    run(first, out=tmp_path / "run", evaluate={"every": 1}, rounds=2)
    assert lines(tmp_path / "run") == []
    fedsim.resume(tmp_path / "run", hooks=[again])
    assert again.heard == ["before_run", *TEST, "after_round", *ROUND, *TEST, "after_round", "after_run"]


def test_a_run_that_a_hook_has_ended_before_its_last_test_is_tested_after_a_resume(tmp_path):
    """The round counts: it was done, and has no line yet."""
    ends = Teller(do=lambda run: run.stop("enough"), at="before_evaluation")
    run(
        ends,
        Teller(do=fails(KeyboardInterrupt()), at="after_evaluation"),
        out=tmp_path / "run",
        evaluate={"every": 1},
    )
    assert lines(tmp_path / "run") == []
    result = fedsim.resume(tmp_path / "run")
    assert (len(lines(tmp_path / "run")), result.summary["rounds"], result.summary["stopped"]) == (1, 1, "enough")


# Hooks by name

MINE = '''
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from fedsim import Hook


@dataclass(kw_only=True)
class Notes(Hook):
    """Writes a line a round."""

    path: str
    every: int = 1

    def before_run(self, run):
        Path(self.path).write_text("")

    def after_round(self, run, record):
        if record["round"] % self.every == 0:
            with Path(self.path).open("a") as file:
                file.write(f"{record['round']} {record['fingerprint']}\\\\n")


class Bare(Hook):
    def __init__(self, *, why: str = "enough"):
        self.why = why

    def after_round(self, run, record):
        run.stop(self.why)


def made(*, why: str = "made"):
    return Bare(why=why)


class Needs(Hook):
    def __init__(self, something):
        self.something = something


class Careless(Hook):
    def after_round(self, run, record):
        record["no such key"]


class NoHook:
    def after_round(self, run, record): ...


def number():
    return 3
'''.replace("\\\\", "\\")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with hooks of one's own, and a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_hooks.py").write_text(MINE)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def fedsim_(place, fedsim_):
    """Calls the command where that hook is."""
    return fedsim_


NOTES = "[{name: my_hooks:Notes, path: notes, every: 2}]"


def test_a_hook_of_your_own_in_a_config_by_the_command_and_from_python(place):
    """A file beside the config, in a process of its own, and as an object."""
    fingerprints = {r["round"]: r["fingerprint"] for r in run().rounds}
    expected = f"2 {fingerprints[2]}\n"

    run(hooks=yaml.safe_load(NOTES))
    assert Path("notes").read_text() == expected

    environment = os.environ | {"PYTHONPATH": str(place)}
    command = [*COMMAND, "run", "c.yaml", f"hooks={NOTES}", "--out", "run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    told = f"fedsim: hooks[0].name: imports my_hooks, which is not fedsim's: {place / 'my_hooks.py'}\n"
    assert (done.returncode, done.stderr) == (0, told)
    assert Path("notes").read_text() == expected
    assert yaml.safe_load(Path("run/config.yaml").read_text())["hooks"] == [
        {"name": "my_hooks:Notes", "priority": 50, "path": "notes", "every": 2}
    ]

    import my_hooks

    run(my_hooks.Notes(path="again", every=2))
    assert Path("again").read_text() == expected
    Path("notes").unlink()
    fedsim.run("run/config.yaml")
    assert Path("notes").read_text() == expected


@pytest.mark.parametrize(
    ("hook", "why"),
    [("my_hooks:Bare", "enough"), ({"name": "my_hooks:Bare", "why": "so"}, "so"), ("my_hooks:made", "made")],
    ids=str,
)
def test_a_hook_needs_no_dataclass(place, hook, why):
    assert run(hooks=[hook]).summary["stopped"] == why


def test_hooks_of_a_config_and_of_the_call_stand_in_one_order(place):
    """A hook that the config names comes before one of the call, where both have the same priority."""
    stopped = []
    late, early = (
        Teller(do=lambda run: stopped.append(run.stopped), at="after_round", priority=p) for p in (50, 49)
    )
    run(late, early, hooks=["my_hooks:Bare"])
    assert stopped == [None, "enough"]


def said_by(done):
    """What a command says besides the modules that it imports."""
    lines = done.err.splitlines(keepends=True)
    return "".join(line for line in lines if ", which is not fedsim's: " not in line)


WRONG = {
    "unknown": (["curvs"], r"hooks\[0\]\.name: 'curvs' is unknown; did you mean 'curves'\? allowed: stop_on_"),
    "second": (["curves", "x"], r"hooks\[1\]\.name: 'x' is unknown; .* or your own package\.module:attribute"),
    "option": ([{"name": "curves", "dpi": 3}], r"hooks\[0\]\.dpi: 'dpi' is unknown; allowed: priority"),
    "near": ([{"name": "early_stopping", "patienc": 3}], r"hooks\[0\]\.patienc: .* did you mean 'patience'"),
    "value": (
        [{"name": "early_stopping", "patience": 0}],
        r"hooks\[0\]\.patience: 0 should be a whole number >= 1",
    ),
    "metric": (
        [{"name": "early_stopping", "metric": "loss"}],
        r"hooks\[0\]\.metric: \"loss\" should be test_loss, test_accuracy or client_accuracy_mean",
    ),
    "min_delta": (
        [{"name": "early_stopping", "min_delta": -1}],
        r"hooks\[0\]\.min_delta: -1 should be a number >= 0",
    ),
    "priority": (
        [{"name": "curves", "priority": "first"}],
        r'hooks\[0\]\.priority: "first" should be a whole number',
    ),
    "no name": ([{"patience": 3}], r"hooks\[0\]\.name: missing; allowed: stop_on_non_finite, "),
    "no list": ("curves", r'hooks: "curves" should be a list, each a mapping, or a string'),
    "null": (None, r"hooks: null should be a list"),
    "no module": (["no_such:Hook"], r"hooks\[0\]\.name: there is no module 'no_such'; is its folder on "),
    "no class": (["my_hooks:Note"], r"hooks\[0\]\.name: my_hooks has no callable 'Note'"),
    "missing option": (["my_hooks:Notes"], r"hooks\[0\]\.path: missing; it should be a string"),
    "no hook": (
        ["curves", "my_hooks:NoHook"],
        r"hooks\[1\]\.name: my_hooks:NoHook returned an object of type NoHook; it should return a Hook",
    ),
    "a number": (
        ["my_hooks:number"],
        r"hooks\[0\]\.name: my_hooks:number returned an object of type int; it should",
    ),
    "arguments": (
        ["my_hooks:Needs"],
        r"hooks\[0\]\.name: my_hooks:Needs does not take the arguments with which .*something",
    ),
}


@pytest.mark.parametrize(("hooks", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_hook_is_one_line_that_names_it_and_leaves_no_folder(fedsim_, place, hooks, said):
    there = sorted(place.iterdir())
    with pytest.raises(ConfigError, match=f"^{said}") as caught:
        run(hooks=hooks, out=place / "run")
    assert "\n" not in str(caught.value)
    done = fedsim_("run", "c.yaml", f"hooks={json.dumps(hooks)}", "--out", "run")
    assert (done.status, done.out, said_by(done)) == (2, "", f"fedsim: {caught.value}\n")
    assert [path for path in sorted(place.iterdir()) if path.name != "__pycache__"] == there


def test_a_hook_of_your_own_that_fails_is_one_line_and_status_1(fedsim_, place):
    done = fedsim_("run", "c.yaml", "hooks=[my_hooks:Careless]", "--out", "run")
    assert done.status == 1
    assert re.fullmatch(
        r"fedsim: hook Careless, after_round: KeyError: 'no such key' \(my_hooks\.py:\d+\)\n", said_by(done)
    )
    assert "rounds done: 1; once the cause is removed, fedsim resume run continues" in done.out
    assert fedsim_("resume", "run", "hooks=[]").status == 0


def test_without_hooks_there_is_no_tensorboard_and_no_picture_and_all_else(fedsim_):
    usual = {
        "config.yaml",
        "rounds.jsonl",
        "partition.json",
        "model.safetensors",
        "checkpoints",
        ".lock",
        "summary.json",
    }
    done = fedsim_("run", "c.yaml", "hooks=[]", "--out", "none")
    assert (done.status, said_by(done)) == (0, "")
    assert "picture" not in done.out
    assert {path.name for path in Path("none").iterdir()} == usual
    Path("c.yaml").write_text(yaml.safe_dump({key: value for key, value in CONFIG.items() if key != "hooks"}))
    done = fedsim_("run", "c.yaml", "--out", "usual")
    assert {path.name for path in Path("usual").iterdir()} == {*usual, "curves.png", "tensorboard"}
    assert "picture: usual/curves.png" in done.out
    fingerprints = [json.loads(Path(run, "summary.json").read_text())["fingerprint"] for run in ("none", "usual")]
    assert fingerprints[0] == fingerprints[1]


def test_hooks_can_be_listed(fedsim_):
    done = fedsim_("list", "hooks")
    assert done.status == 0
    assert all(re.search(rf"^  {name} +\S", done.out, re.MULTILINE) for name in HOOKS)
    words = " ".join(fedsim_("list", "hooks", "early_stopping").out.split())
    assert "patience 10 a whole number >= 1" in words
    assert "metric test_loss test_loss, test_accuracy or client_accuracy_mean" in words
    assert "min_delta 0.0 a number >= 0" in words
    assert "priority 50 a whole number" in words


def test_the_hooks_of_the_catalogue_are_hooks():
    assert isinstance(HOOKS, Catalogue)
    for name in HOOKS:
        assert isinstance(HOOKS.make(name, Hook), Hook)


# Early stopping, by hand

STOPS = {  # metric, options, measured values, how many tests until it stops
    "never better": ("test_loss", {"patience": 2}, [1.0, 1.0, 1.0, 1.0], 3),
    "worse": ("test_loss", {"patience": 2}, [1.0, 1.1, 1.2, 1.3], 3),
    "always better": ("test_loss", {"patience": 1}, [4.0, 3.0, 2.0, 1.0], None),
    "better in time": ("test_loss", {"patience": 2}, [3.0, 3.5, 2.0, 2.5, 2.2, 1.0], 5),
    "not back to the best": ("test_loss", {"patience": 3}, [1.0, 9.0, 8.0, 7.0, 0.0], 4),
    "higher is better": ("test_accuracy", {"patience": 2}, [0.1, 0.2, 0.2, 0.15, 0.9], 4),
    "too little": ("test_loss", {"patience": 2, "min_delta": 0.5}, [3.0, 2.6, 2.5, 1.0], 3),
    "by little but often": ("test_loss", {"patience": 2, "min_delta": 0.5}, [3.0, 2.75, 2.25, 2.0, 1.75], 5),
    "just as much is not more": ("test_accuracy", {"patience": 1, "min_delta": 0.25}, [0.25, 0.5, 0.75], 2),
    "never finite": ("test_loss", {"patience": 2}, [nan, nan, nan], 2),
    "not finite any more": ("test_loss", {"patience": 2}, [1.0, inf, nan, nan], 3),
    "not finite at first": ("test_loss", {"patience": 2}, [inf, 1.0, 0.5], None),
    "of the clients": ("client_accuracy_mean", {"patience": 2}, [0.5, 0.4, 0.4, 0.6], 3),
}
stops = pytest.mark.parametrize(("metric", "options", "values", "tests"), STOPS.values(), ids=STOPS)


@dataclass(kw_only=True)
class Measured(Hook):
    """Has the tests of a run measure these values, one after the other."""

    values: list[float | str]  # a text where YAML has no number: nan, inf

    def before_evaluation(self, run, record):
        value = float(self.values[run.simulation.number // run.config.evaluate.every - 1])
        measured = Evaluation(value, value if isfinite(value) else 0.0)
        run.simulation.evaluate = lambda *_, **__: measured
        run.simulation.evaluate_clients = lambda *_, **__: {0: measured}


@stops
@pytest.mark.parametrize("every", [1, 2])
def test_early_stopping_by_hand(metric, options, values, tests, every):
    """Only tests count, whatever rounds lie between them."""
    stopping, measured = EarlyStopping(metric=metric, **options), Measured(values=values)
    evaluate = {"every": every, "clients": metric == "client_accuracy_mean"}
    result = run(measured, stopping, rounds=len(values) * every, evaluate=evaluate)
    assert result.summary["rounds"] == (tests or len(values)) * every
    if tests is None:
        assert result.summary["stopped"] is None
    else:
        said = rf"{metric} has not improved on \S+ in {options['patience']} tests"
        assert re.fullmatch(said, result.summary["stopped"])


@stops
def test_early_stopping_goes_on_where_it_stood(metric, options, values, tests, tmp_path):
    """A run that is interrupted at the last moment ends in the same round."""
    measured = {"name": "test_hooks:Measured", "values": [str(value) for value in values]}
    last = (tests or len(values)) - 1
    hooks = [measured, {"name": "early_stopping", "metric": metric, **options}]
    late = Teller(
        at="after_round", do=lambda run: fails(KeyboardInterrupt())() if len(run.records) == last else None
    )
    evaluate = {"clients": metric == "client_accuracy_mean"}
    run(late, out=tmp_path / "run", hooks=hooks, evaluate=evaluate, rounds=len(values))
    assert len(lines(tmp_path / "run")) == last
    result = fedsim.resume(tmp_path / "run")
    assert result.summary["rounds"] == last + 1
    assert (result.summary["stopped"] is None) == (tests is None)


def test_a_run_that_stopped_early_is_done(fedsim_):
    """Status 0, and said; a resume has nothing to do, but with more patience goes on."""

    def hooks(patience):
        measured = {"name": "test_hooks:Measured", "values": [3.0, 2.0, 2.5, 2.5, 2.5, 1.0, 0.5, 0.4]}
        return f"hooks={json.dumps([measured, {'name': 'early_stopping', 'patience': patience}])}"

    settings = ["rounds=8", "evaluate.every=1"]
    done = fedsim_("run", "c.yaml", *settings, hooks(2), "--out", "run")
    assert (done.status, said_by(done)) == (0, "")
    assert "stopped: test_loss has not improved on 2 in 2 tests\n" in done.out
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["rounds"], summary["stopped"]) == (4, "test_loss has not improved on 2 in 2 tests")
    done = fedsim_("resume", "run")
    assert (done.status, said_by(done)) == (0, "")
    assert "stopped: test_loss has not improved on 2 in 2 tests\n" in done.out
    assert json.loads(Path("run/summary.json").read_text())["fingerprint"] == summary["fingerprint"]
    done = fedsim_("resume", "run", hooks(4))
    assert done.status == 0
    assert "stopped" not in done.out
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["rounds"], summary["stopped"]) == (8, None)


def test_early_stopping_by_what_is_not_measured_is_told():
    with pytest.raises(ConfigError, match=r"early_stopping: client_accuracy_mean needs evaluate\.clients=true"):
        run(hooks=[{"name": "early_stopping", "metric": "client_accuracy_mean"}])


# What is not finite

DIVERGES = '''
from torch import nn


class Net(nn.Module):
    """Finite in training and in its weights, and not in a test."""

    def __init__(self, shape, classes, /):
        super().__init__()
        self.layer = nn.Linear(shape[0] * shape[1] * shape[2], classes)

    def forward(self, x):
        return self.layer(x.flatten(1)) * (1.0 if self.training else float("{value}"))
'''


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_test_that_is_not_finite_fails_the_run_unless_nobody_minds(fedsim_, monkeypatch, value):
    """Either way rounds.jsonl is JSON: what is not finite is null."""
    Path("net.py").write_text(DIVERGES.replace("{value}", value))
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG | {"model": "net:Net"}))
    done = fedsim_("run", "c.yaml", "hooks=[stop_on_non_finite, curves]", "--out", "run")
    said = "fedsim: round 2: test_loss is not finite; lower local.lr\n"
    assert (done.status, said_by(done)) == (1, said)
    assert [record.get("test_loss", "untested") for record in lines(Path("run"))] == ["untested", None]
    assert Path("run/curves.png").exists()
    assert not Path("run/summary.json").exists()
    done = fedsim_("resume", "run")
    assert (done.status, said_by(done)) == (1, said)

    done = fedsim_("resume", "run", "hooks=[]")
    assert done.status == 0
    assert [record.get("test_loss", "untested") for record in lines(Path("run"))] == ["untested", None, None]
    assert json.loads(Path("run/summary.json").read_text())["test_loss"] is None


def test_finite_tests_stop_nothing():
    assert run(hooks=["stop_on_non_finite"]).summary["stopped"] is None


# Checkpoints

KEPT = {
    "all rounds, three kept": ({}, [[1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]], [3, 4, 5]),
    "one kept": ({"keep": 1}, [[1], [2], [3], [4], [5]], [5]),
    "every other": ({"every": 2}, [[], [2], [2], [2, 4], [2, 4]], [2, 4, 5]),
    "every other, one kept": ({"every": 2, "keep": 1}, [[], [2], [2], [4], [4]], [5]),
    "only the end": ({"every": None}, [[], [], [], [], []], [5]),
    "rarely": ({"every": 50}, [[], [], [], [], []], [5]),
}


class Lists(Hook):
    """The checkpoints after each round."""

    def __init__(self):
        super().__init__(priority=200)
        self.seen = []

    def after_round(self, run, record):
        self.seen.append(checkpoints(run.folder.path))


def checkpoints(folder):
    return sorted(int(path.stem) for path in (folder / "checkpoints").glob("*.json"))


@pytest.mark.parametrize(("checkpoint", "seen", "last"), KEPT.values(), ids=KEPT)
def test_checkpoints_are_made_and_kept_as_the_config_says(checkpoint, seen, last, tmp_path):
    lists = Lists()
    run(lists, out=tmp_path / "run", rounds=5, checkpoint=checkpoint)
    assert lists.seen == seen
    assert checkpoints(tmp_path / "run") == last


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()], ids=repr)
def test_a_run_that_ends_early_leaves_a_checkpoint_whatever_the_config_says(error, tmp_path):
    bad = Teller(do=fails(error), at="after_round")
    try:
        run(bad, out=tmp_path / "run", checkpoint={"every": None})
    except RoundError:
        assert isinstance(error, ValueError)
    assert checkpoints(tmp_path / "run") == [1]
    assert [record["fingerprint"] for record in fedsim.resume(tmp_path / "run").rounds] == [
        record["fingerprint"] for record in run().rounds
    ]


# What a run shows


def console():
    return Console(file=io.StringIO(), force_terminal=True, width=100, soft_wrap=True, _environ={})


def shown(terminal):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue()).replace("\r", "\n")


def test_a_resumed_run_shows_the_rounds_that_are_left(tmp_path):
    run(Teller(do=fails(KeyboardInterrupt()), at="after_round"), out=tmp_path / "run")
    plain, bar = Console(file=io.StringIO(), soft_wrap=True, _environ={}), console()
    fedsim.resume(tmp_path / "run", hooks=[Plain(plain), Bar(bar)])
    assert [line[:11] for line in plain.file.getvalue().splitlines()] == ["round 2/3  ", "round 3/3  "]
    counts = re.findall(r"rounds  \S* ?\S* (\d)/3", shown(bar))
    assert (counts[0], counts[-1]) == ("1", "3")


def test_a_resumed_run_shows_the_round_whose_test_was_interrupted(tmp_path):
    run(Teller(do=fails(KeyboardInterrupt()), at="before_evaluation"), out=tmp_path / "run")
    plain, bar = Console(file=io.StringIO(), soft_wrap=True, _environ={}), console()
    fedsim.resume(tmp_path / "run", hooks=[Plain(plain), Bar(bar)])
    assert [line[:11] for line in plain.file.getvalue().splitlines()] == ["round 2/3  ", "round 3/3  "]
    counts = re.findall(r"rounds  \S* ?\S* (\d)/3", shown(bar))
    assert (counts[0], counts[-1]) == ("1", "3")


@pytest.mark.parametrize("hook", [Plain, Bar])
def test_who_is_dropped_is_shown(hook, breaks):
    breaks(KeyError("x"))
    terminal = console()
    with pytest.raises(RoundError, match=r"0 of \d+ clients are left"):
        run(hook(terminal), failures={"policy": "drop"}, strategy=BREAKS)
    for client in (0, 2):
        assert f"client {client} dropped: KeyError: 'x' (test_hooks.py:" in shown(terminal)


# Hooks and the checkpoint


class Sees(Hook):
    """Which checkpoints and results there are at an event."""

    def __init__(self, priority):
        super().__init__(priority=priority)
        self.rounds, self.end = [], None

    def after_round(self, run, record):
        self.rounds.append(checkpoints(run.folder.path))

    def after_run(self, run):
        names = {path.name for path in run.folder.path.iterdir()}
        self.end = checkpoints(run.folder.path), {"model.safetensors", "summary.json"} <= names


def test_the_checkpoint_lies_between_hooks_below_priority_100_and_those_above(tmp_path):
    """A hook from 100 on is called after the checkpoint of a round, and before that of the end."""
    below, above = Sees(99), Sees(100)
    run(above, below, out=tmp_path / "run", checkpoint={"every": 2})
    assert below.rounds == [[], [], [2]]
    assert above.rounds == [[], [2], [2]]
    assert below.end == ([2, 3], True)
    assert above.end == ([2], False)


def test_what_is_no_hook_is_refused_before_there_is_a_folder(tmp_path):
    for wrong in (Sees, object()):
        with pytest.raises(ConfigError, match=r"^hooks: "):
            run(wrong, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
