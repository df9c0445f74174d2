"""The picture of a run."""

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from fedsim.files import write
from fedsim.hooks import Hook

if TYPE_CHECKING:
    from fedsim.experiment import Run


@dataclass(kw_only=True)
class Curves(Hook):
    """Loss and accuracy against rounds, in `curves.png` of the run's folder, when the run ends or is stopped."""

    def after_run(self, run: "Run") -> None:
        if run.folder:
            from fedsim.plot import curves
            from fedsim.report import read_run

            picture = BytesIO()
            curves([read_run(run.folder.path)], picture)
            write(run.folder.path / "curves.png", picture.getvalue())
