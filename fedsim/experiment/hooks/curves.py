"""The picture of a run."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from fedsim.base.files import write
from fedsim.errors import reason
from fedsim.experiment.hook import Hook
from fedsim.experiment.run import Run


@dataclass(kw_only=True)
class Curves(Hook):
    """Draws loss and accuracy by round into `curves.png` of the run's folder, when the run ends or is stopped.

    A picture that cannot be drawn or written does not fail the run: the run's results are whole without it.
    """

    def after_run(self, run: Run) -> None:
        if run.folder:
            try:
                self._draw(run.folder.path)
            except Exception as error:
                run.warn(f"{run.folder.path / 'curves.png'}: cannot be written: {reason(error)}")

    def _draw(self, folder: Path) -> None:
        from fedsim.report.plot import curves
        from fedsim.report.runs import read_run

        picture = BytesIO()
        curves([read_run(folder)], picture)
        write(folder / "curves.png", picture.getvalue())
