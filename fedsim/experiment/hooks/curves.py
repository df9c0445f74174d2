"""The picture of a run."""

from dataclasses import dataclass
from io import BytesIO

from fedsim.base.files import write
from fedsim.experiment.hook import Hook
from fedsim.experiment.run import Run


@dataclass(kw_only=True)
class Curves(Hook):
    """Draws loss and accuracy by round into `curves.png` of the run's folder, when the run ends or is stopped."""

    def after_run(self, run: Run) -> None:
        if run.folder:
            from fedsim.report.plot import curves
            from fedsim.report.runs import read_run

            picture = BytesIO()
            curves([read_run(run.folder.path)], picture)
            write(run.folder.path / "curves.png", picture.getvalue())
