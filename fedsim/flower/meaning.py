"""What labels and numbers mean on a node, compared with what they mean in the federation."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from fedsim.data import FederatedData
from fedsim.data.dataset import difference_of_classes
from fedsim.errors import ConfigError
from fedsim.flower.plan import Examples, names_digest

SAME_LIST = "set data.classes to the same list on both sides"
MOST_RATIO = 8.0  # of the largest values of two parts of one data set; that of 8 to 12 bits is 16


def check_meaning(own: FederatedData, form: Examples, given: Mapping[str, Any]) -> None:
    """Raise ConfigError where labels or numbers mean something else here than in the federation.

    `own` are a node's examples with its own normalisation, cropped as the federation's. `given` are the options of
    its dataset that its owner has set: a node takes the federation's mean and std unless they are among them.
    """
    set_by_owner = {name for name, value in given.items() if value is not None}
    _check_classes(own, form, "classes" in set_by_owner)
    compared: list[tuple[str, Any, Any]] = [
        ("examples have shape", [*own.shape], [*form.shape]),
        ("examples have dtype", own.form["dtype"], form.dtype),
    ]
    if form.whole_shape:
        compared.append(("before the crop, examples have shape", [*own.whole_shape], [*form.whole_shape]))
    if own.preparation and form.preparation:
        compared.append(("files become numbers by", own.preparation, form.preparation))
    for what, here, there in compared:
        if here != there:
            raise ConfigError(f"data: {what} {here}, and the federation's {there}")
    if set_by_owner & {"mean", "std"}:
        _check_normalisation(own, form)


def notes_on(data: FederatedData, form: Examples) -> Iterator[str]:
    """What cannot be compared or looks odd, a line each, for those who read the logs of both sides."""
    if not (data.class_names and form.class_names):
        without = [who for who, names in (("node", data.class_names), ("server", form.class_names)) if not names]
        whose = " and the ".join(without)
        yield f"the data of the {whose} has no names of classes, so whether labels mean the same is not checked"
    if form.largest is not None:
        here, there = data.largest_value(), form.largest
        if max(here, there) > MOST_RATIO * min(here, there):
            which = f"less than 1/{MOST_RATIO:g} of" if here < there else f"more than {MOST_RATIO:g} times"
            yield f"the largest value of some examples is {which} the server's; are both on the same scale?"


def _check_classes(own: FederatedData, form: Examples, given: bool) -> None:
    here, there = own.class_names, form.class_names
    if here and isinstance(there, str):
        if names_digest(here) != there:
            other = f"the names of the {len(here)} classes here are not the federation's"
            raise ConfigError(f"data.classes: {other}; {SAME_LIST}")
    elif here and there and (difference := difference_of_classes(here, there, "here", "in the federation")):
        raise ConfigError(f"data.classes: {difference}, whose classes are {', '.join(there)}; {SAME_LIST}")
    if (here or given) and own.num_classes != form.classes:
        raise ConfigError(
            f"data.classes: {own.num_classes} here, and {form.classes} in the federation; {SAME_LIST}"
        )


def _check_normalisation(own: FederatedData, form: Examples) -> None:
    channels, white = own.shape[0] if len(own.shape) == 3 else 1, own.white_value
    ours = _mean_and_std(own.form["scale"], own.form["shift"], channels, white)
    theirs = _mean_and_std(form.scale, form.shift, channels, white)
    for name, here, there in zip(("mean", "std"), ours, theirs, strict=True):
        if here != there:
            way = "set the same on both sides, or leave data.mean and data.std out here"
            way += "; a server's image_folder without them has ImageNet's"
            raise ConfigError(f"data.{name}: [{here}] here, and [{there}] in the federation; {way}")


def _mean_and_std(scale: Sequence[float], shift: Sequence[float], channels: int, white: float) -> tuple[str, str]:
    """The mean and the standard deviation of each channel, to six digits, which float32 keeps."""
    scales, shifts = ([*values] or [empty] for values, empty in ((scale, 1.0), (shift, 0.0)))
    most = max(channels, len(scales), len(shifts))
    scales, shifts = (values * most if len(values) == 1 else values for values in (scales, shifts))
    std = [1 / (white * each) if each else inf for each in scales]
    mean = [each * other for each, other in zip(shifts, std, strict=False)]
    return ", ".join(f"{each:.6g}" for each in mean), ", ".join(f"{each:.6g}" for each in std)
