"""The server of a federation that `flwr run` starts: Flower's ServerApp, in which fedsim's rounds run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedsim.errors import ConfigError, printable
from fedsim.experiment.build import build
from fedsim.experiment.config import Config
from fedsim.experiment.execute import execute
from fedsim.experiment.progress import Plain
from fedsim.experiment.start import Make, Started, new_run, resumed_run
from fedsim.federated.simulation import Simulation
from fedsim.flower.app import checked, overrides_of, values_of
from fedsim.flower.internals import Link
from fedsim.runtimes import RUNTIMES

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the experiment of the app's config; what ends it early is raised, and fails the Flower run."""
    console = Console(soft_wrap=True)
    try:
        run, hooks = begin(context.run_config, on(grid))
        assert run.folder is not None
        console.out(f"results: {run.folder.path.resolve()}", highlight=False)
        for note in run.notes:
            console.out(printable(note), highlight=False)
        execute(run, [*hooks, Plain(console)])
    except ConfigError as error:  # its line is all that there is to know
        raise ConfigError(printable(error)) from None


def on(grid: Grid) -> Make:
    """How a simulation is made whose clients are the nodes of this grid."""

    def make(config: Config) -> Simulation:
        return build(
            config, runtime=lambda task, data: RUNTIMES.bind(config.runtime)(task, data, lambda: Link.inside(grid))
        )

    return make


def begin(settings: Mapping[str, Any], make: Make) -> Started:
    """The run that an app's config asks for: a new one, or an old one that goes on; raises ConfigError."""
    out, resume, name = (str(settings.get(key, "")) for key in ("out", "resume", "name"))
    if out and resume:
        raise ConfigError("out, resume: one of the two; a run that goes on has its folder")
    if resume:
        return resumed_run(Path(resume).expanduser(), overrides_of(settings), make=make)
    config = checked(values_of(settings))
    return new_run(config, Path(out).expanduser() if out else None, name or "run", make=make)
