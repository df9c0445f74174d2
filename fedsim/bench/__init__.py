"""How fast clients train, and what fedsim's own work costs: `fedsim bench`.

Figures are medians over turns: the cases of a table take one pass each in every turn, after a turn that does not
count, so that what else the machine does falls on all of them; ratios are taken turn by turn.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fedsim.base.catalogue import unknown
from fedsim.base.files import check_writable
from fedsim.bench.aggregation import aggregation
from fedsim.bench.federation import flower
from fedsim.bench.figures import Result, picture, save, show
from fedsim.bench.programs import check_peers
from fedsim.bench.scaling import actors, cohort, idle, population
from fedsim.bench.sides import compare
from fedsim.bench.startup import startup
from fedsim.errors import ConfigError
from fedsim.experiment.config import Config

STUDIES: dict[str, Callable[[Config, int, Console], Result]] = {
    "actors": actors,
    "population": population,
    "cohort": cohort,
    "idle": idle,
    "aggregation": aggregation,
    "startup": startup,
    "flower": flower,
}


def bench(
    config: Config,
    repeats: int,
    console: Console,
    out: Path | None = None,
    *,
    peers: Sequence[str] = (),
    sides: Sequence[str] = (),
    studies: Sequence[str] = (),
    drawing: Path | None = None,
) -> list[Result]:
    """Time the sides on a config's first round or, where `studies` are named, make those; prints a table for each.

    `sides` are patterns of names, `peers` other simulators to compare with. With `out` the figures are written as
    JSON, and pictures where a study has some to `drawing`, or next to the JSON. Raises ConfigError, ClientError or
    RoundError.
    """
    for path, at in ((out, "--out"), (drawing, "--picture")):
        if path is not None and path.exists():
            raise ConfigError(f"{at}: {path} exists; name another file")
        if path is not None:
            check_writable(path, at)
    for name in studies:
        if name not in STUDIES:
            raise ConfigError(f"--study: {unknown(name, STUDIES)}")
    check_peers(peers)
    if studies and (peers or sides):
        raise ConfigError(f"--{'peers' if peers else 'sides'}: cannot be combined with --study")
    if drawing is not None and not studies:
        raise ConfigError("--picture needs a study; name one with --study")
    found = list[Result]()
    todo = [STUDIES[name] for name in studies] or [_comparison(peers, sides)]
    for study in todo:
        found.append(study(config, repeats, console))
        show(found[-1], config, console)
        if out is not None:
            save(out, found, config)
    drawing = drawing or (None if out is None else out.with_suffix(".png"))
    if drawing is not None and any(each.curves for each in found):
        picture(found, drawing)
        console.out(f"picture: {drawing}")
    return found


def _comparison(peers: Sequence[str], sides: Sequence[str]) -> Callable[[Config, int, Console], Result]:
    return lambda config, repeats, console: compare(config, repeats, console, peers, sides)
