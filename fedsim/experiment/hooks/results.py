"""What came out of a run."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedsim.experiment.hooks import Hook

if TYPE_CHECKING:
    from fedsim.experiment.run import Run


@dataclass(kw_only=True)
class Results(Hook):
    """The global model and its running mean, and where the run reached its end, summary.json.

    Before other hooks look for them.
    """

    priority: int = field(default=90, init=False)

    def after_run(self, run: "Run") -> None:
        if run.folder:
            task, server, ema = run.simulation.task, run.simulation.server, run.simulation.ema
            means = None if ema is None else task.state_dict(ema)
            run.folder.finish(task.state_dict(server), means, None if run.failure else run.summary)
