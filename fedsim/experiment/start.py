"""How a run starts: anew, or from its last checkpoint; both give the run and the hooks that its config names."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedsim.base.catalogue import Spec, validated
from fedsim.base.own_code import unread
from fedsim.errors import ConfigError, one_line
from fedsim.experiment.build import build, build_hooks
from fedsim.experiment.checked import OTHER_STRATEGY
from fedsim.experiment.checkpoint import Checkpoint, changes, train_again, versions
from fedsim.experiment.config import Config, load
from fedsim.experiment.folder import RunFolder, read_config
from fedsim.experiment.hook import Hook
from fedsim.experiment.run import Run
from fedsim.federated.simulation import Simulation
from fedsim.runtimes import RUNTIMES
from fedsim.runtimes.auto import is_exact, spec_text
from fedsim.training.recipe import Recipe
from fedsim.training.small_batches import named

Make = Callable[[Config], Simulation]
Started = tuple[Run, list[Hook]]
ROUNDING = "results agree as floating point does"
SMALLEST_LR = 2.0**-149  # above 0 in float32
MAX_LOOKED_AT = 100_000  # rounds whose learning rate is computed at the start


def new_run(config: Config, path: Path | None = None, stem: str | None = None, *, make: Make = build) -> Started:
    """A new run: in the new folder `path`, or a new runs/STEM-N, or without a folder. Raises ConfigError."""
    simulation, hooks = make(config), build_hooks(config)  # before the folder, for both may be refused
    notes = _notes(config, simulation)
    if path is None and stem is None:
        return Run(config, simulation, notes=notes), hooks
    if path is not None:
        folder = RunFolder.create(path, config, simulation.data)
    else:
        folder = RunFolder.number(stem or "", config, simulation.data)
    folder.checkpoints.start(simulation)
    return Run(config, simulation, folder, notes=notes), hooks


def resumed_run(
    path: Path,
    overrides: Mapping[str, Any],
    force: bool = False,
    *,
    make: Make = build,
    max_round: int | None = None,
) -> Started:
    """The run in a folder, at its last checkpoint, or at the last one of at most `max_round` rounds.

    Raises ConfigError where settings changed that change the result, unless by `force`; and where another process
    is running it.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: is no folder of a run; it has no config.yaml")
    values = read_config(path)
    config, before = load(values, overrides), load(values)
    folder = RunFolder(path)
    try:
        saved, notes = folder.checkpoints.latest(path, max_round)
        if saved is None and (path / "summary.json").exists():
            raise ConfigError(
                f"{path}: has no checkpoints, and is finished; put them back, or {train_again(path)}"
            )
        simulation, hooks = make(config), build_hooks(config)
        if saved is None:
            notes += _notes(config, simulation)
            notes += _changed_settings(before.model_dump(mode="json"), config, [], force)
            notes += ["no checkpoint: starts with round 1"] if folder.begun else []
            folder.checkpoints.start(simulation)
            folder.go_on(config, simulation.data, None)
            return Run(config, simulation, folder, notes=notes), hooks
        checkpoint, server = saved
        validated(Config, checkpoint.config, f"{folder.checkpoints.folder}: config")
        if config.rounds < checkpoint.round:
            raise ConfigError(f"rounds: {config.rounds}, and {path} has done {checkpoint.round}")
        same_data = simulation.digest() == checkpoint.data
        others = [] if same_data else ["data or model: other examples, owners, frozen weights or teacher"]
        notes += _changed_settings(checkpoint.config, config, others, force)
        folder.checkpoints.restore(simulation, checkpoint, server)
        notes += _changed_runtime(checkpoint, simulation, RUNTIMES.resolve(config.runtime))
        notes += _changed_versions(checkpoint.versions)
        notes += _notes(config, simulation, checkpoint)
        check = partial(_check_not_ended, checkpoint.config, config)
        # Last: what was refused changes nothing.
        records = folder.go_on(config, simulation.data, checkpoint.log, check)
        # What hooks have ended may be made longer; what the strategy has ended, only by another strategy.
        ended = ("strategy",) if records and records[-1].get("stopped") else ("rounds", "hooks")
        same_end = all(getattr(config, key) == checkpoint.config.get(key) for key in ended)
        stopped = checkpoint.stopped if same_end else None
        return Run(config, simulation, folder, records, checkpoint.seconds, notes, stopped), hooks
    except BaseException:
        folder.close()
        raise


def _check_not_ended(before: Mapping[str, Any], config: Config, records: list[dict[str, Any]]) -> None:
    """Raise ConfigError where a run is to be longer that its strategy has ended, which only another one can."""
    why = records[-1].get("stopped") if records else None
    if why and config.strategy == before.get("strategy") and config.rounds != before.get("rounds"):
        raise ConfigError(f"rounds: {config.rounds}, and the strategy ended the run: {why}; {OTHER_STRATEGY}")


def _changed_settings(before: Mapping[str, Any], config: Config, others: list[str], force: bool) -> list[str]:
    """What is not as it was, in words; raises ConfigError where it changes the result, unless by `force`.

    An option that was added since then has the default with which results are as before.
    """
    with unread(), suppress(ConfigError):  # of settings that are no longer there
        before = load(before).model_dump(mode="json")
    result, free = changes(before, config.model_dump(mode="json"))
    result += others
    if result and not force:
        raise ConfigError(f"{'; '.join(result)}: this changes the result; --force accepts it")
    return [f"changed: {change}" for change in [*result, *free]]


def _changed_runtime(checkpoint: Checkpoint, simulation: Simulation, now: Spec) -> list[str]:
    """Let the runtime go on as it did; a note if it is another one whose results differ by rounding.

    Raises ConfigError if the clients are nodes, and other nodes than those that keep the states.
    """
    runtime, before = simulation.runtime, checkpoint.runtime or checkpoint.config.get("runtime", {})
    before = {"name": before} if isinstance(before, str) else before
    now = runtime.choice or now
    if checkpoint.runtime:
        try:
            if runtime.restore_choice(checkpoint.runtime, simulation.work):
                return []
        except ConfigError as error:
            if simulation.data.clients_are_remote:
                raise
            return [f"changed: {error}; it was {spec_text(before)}, and is chosen anew; {ROUNDING}"]
    same = before == now or (is_exact(before) and is_exact(now))
    return [] if same else [f"changed: runtime: {spec_text(now)}, and was {spec_text(before)}; {ROUNDING}"]


def _changed_versions(before: Mapping[str, str]) -> list[str]:
    now = versions()
    return [
        one_line(f"changed: {name} {now.get(name)}, and was {was}; {ROUNDING}")
        for name, was in before.items()
        if now.get(name) != was
    ]


def _notes(config: Config, simulation: Simulation, checkpoint: Checkpoint | None = None) -> list[str]:
    """What the user should know before the rounds to come; raises ConfigError for an invalid learning rate."""
    notes, recipe, done = list[str](), simulation.recipe, checkpoint.round if checkpoint else 0
    if left_out := simulation.left_out:
        why = next(iter(left_out.values()))
        notes.append(f"failures.policy: drop leaves out {named([*left_out])} in all rounds; each {why}")
    if done < config.rounds <= recipe.warmup:
        short = f"{recipe.warmup} rounds, and the run has {config.rounds}"
        notes.append(f"local.warmup: {short}; local.lr is not reached, and local.schedule does not begin")
    own_length = config.local["schedule"].get("rounds")
    length = own_length + recipe.warmup if own_length else config.rounds
    still = _rounds_without_steps(recipe, done, config.rounds)
    if still:
        longer = f"local.schedule.rounds={config.rounds - recipe.warmup}"
        other = longer if length < config.rounds else "another local.schedule or local.lr"
        goes_on = f"to go on learning, stop and resume with {other} --force"
        way = goes_on if checkpoint else f"{other} has steps there"
        notes.append(f"local.schedule: the learning rate is 0 {still}, where clients do not train; {way}")
    elif checkpoint and checkpoint.config["rounds"] < config.rounds > length:
        notes.append(f"local.schedule is over after {length} rounds; what follows has its last learning rate")
    return notes


def _rounds_without_steps(recipe: Recipe, done: int, rounds: int) -> str:
    """Which of the rounds after `done` have a learning rate of 0, in words; raises ConfigError."""
    numbers = range(done, min(rounds, done + MAX_LOOKED_AT))
    still = [number + 1 for number in numbers if recipe.check_schedule(number) < SMALLEST_LR]
    if not still:
        return ""
    return f"in round {still[0]}" if len(still) == 1 else f"in {len(still)} rounds from round {still[0]} on"
