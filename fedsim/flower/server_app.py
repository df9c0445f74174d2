"""Flower's ServerApp: the process that `flwr run` starts on the server, in which fedsim's rounds run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedsim.base.files import expanded
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
    """Run or resume the experiment of the app's config; an error fails the Flower run."""
    console = Console(soft_wrap=True)
    try:
        run, hooks = begin(context.run_config, on(grid))
        assert run.folder is not None
        console.out(f"results: {run.folder.path.resolve()}", highlight=False)
        for note in run.notes:
            console.out(printable(note), highlight=False)
        execute(run, [*hooks, Plain(console)])
    except ConfigError as error:  # its text is enough
        raise ConfigError(printable(error)) from None


def on(grid: Grid) -> Make:
    """A function that builds a simulation whose clients are the nodes of this grid."""

    def make(config: Config) -> Simulation:
        return build(
            config, runtime=lambda task, data: RUNTIMES.bind(config.runtime)(task, data, lambda: Link.inside(grid))
        )

    return make


def begin(settings: Mapping[str, Any], make: Make) -> Started:
    """The run that an app's config asks for, new or resumed; raises ConfigError."""
    out, resume, name = (str(settings.get(key, "")) for key in ("out", "resume", "name"))
    if out and resume:
        raise ConfigError("out, resume: set only one of them; a resumed run stays in its folder")
    if resume:
        return resumed_run(expanded(Path(resume), "resume"), overrides_of(settings), make=make)
    config = checked(values_of(settings))
    return new_run(config, expanded(Path(out), "out") if out else None, name or "run", make=make)
