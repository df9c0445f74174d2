"""What came out of a run."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedsim.hooks import Hook

if TYPE_CHECKING:
    from fedsim.experiment import Run


@dataclass(kw_only=True)
class Results(Hook):
    """The global model, and where the run reached its end, summary.json; before other hooks look for them."""

    priority: int = field(default=90, init=False)

    def after_run(self, run: "Run") -> None:
        if run.folder:
            model = run.simulation.task.state_dict(run.simulation.server)
            run.folder.finish(model, None if run.failure else run.summary)
