"""A tree of image files: which are for training, and the class and the owner of each.

Below the root, the path of a file is train or test, then its class, then anything; where there is neither train/
nor test/, it begins with the class. One more folder on the way, at any level, may name the owner:
`hospital_a/train/cat/1.png` has its owner at level 0, `train/cat/patient_7/1.png` at level 2.
"""

import csv
import io
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedsim.base.reading import open_regular
from fedsim.data.dataset import composed, holdout_mask
from fedsim.data.image_file import EXTENSIONS
from fedsim.errors import ConfigError, printable, reason
from fedsim.types import Stream, random

PARTS = ("train", "test")
WHOLE = ""  # the only part of a tree that has neither
MAX_LIST_BYTES = 2**30  # of a list of owners
log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """An image file."""

    path: str
    label: int
    owner: str | None  # None where it is not asked for


class Folder(NamedTuple):
    """A folder of the tree, and the images that lie in it, not deeper."""

    path: str
    names: tuple[str, ...]  # from the class on: of the folders on the way, without train or test, and the owner's
    owner: str | None
    images: list[str]


class Tree(NamedTuple):
    """The samples for training and for testing, sorted by label and path, and the classes by label."""

    train: list[Sample]
    test: list[Sample]
    classes: list[str]


def find_samples(
    root: Path,
    test_share: float | None,
    classes: list[str] | None,
    owner: int | str | None,
    owner_list: Path | None,
    seed: int,
) -> Tree:
    """The image files below `root`; raises ConfigError where the tree and the options do not fit together.

    `owner` is the level of the owners' folders, or a pattern of the path; `owner_list` is a CSV file. Training
    samples have owners if one of them is set.
    """
    if owner is not None and owner_list is not None:
        raise ConfigError("data.owner_list: data.owner is set, too; allowed: one of them")
    if not os.path.isdir(root):
        raise ConfigError(f"data.root: {printable(root)}: no such folder")
    try:
        folders = _find_folders(root, owner if isinstance(owner, int) else None)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # a folder may not be read, too deep a tree
        raise ConfigError(f"data.root: {printable(root)}: {error}") from error
    if not classes:
        _check_nesting(root, folders, owner)
    _check_parts(root, folders, test_share, classes)
    index = _class_index(root, folders, classes)
    samples = {part: _samples(found, index) for part, found in folders.items()}
    if not any(samples.values()):
        raise ConfigError(f"data.root: {printable(root)} has no images; allowed: {', '.join(EXTENSIONS)}")
    if not classes:
        part = WHOLE if WHOLE in folders else "train"
        _check_complete(root / part if os.path.isdir(root / part) else root, samples[part], index)
    train = samples.get(WHOLE) or samples.get("train", [])
    if isinstance(owner, str):
        train = _owned_by_pattern(root, train, owner)
    elif owner_list is not None:
        train = _owned_by_list(root, train, owner_list)
    if WHOLE not in folders:
        return Tree(train, samples.get("test", []), [*index])
    groups = np.unique([f"{label} {owner}" for _, label, owner in train], return_inverse=True)[1]
    in_test = holdout_mask(groups, test_share or 0, random(seed, Stream.DATASET))
    kept, held_out = ([train[i] for i in np.flatnonzero(mask)] for mask in (~in_test, in_test))
    return Tree(kept, held_out, [*index])


def _find_folders(root: Path, level: int | None) -> dict[str, list[Folder]]:
    """All folders of each part: train, test, or both, or else WHOLE. Logs what is left out."""
    parts = [part for part in PARTS if os.path.isdir(root / part)]
    if level == 0 and parts:
        raise ConfigError(f"data.owner: level 0 of {printable(root)} is {parts[0]}/; the next level is 1")
    found, left_out = dict[str, list[Folder]](), Counter[str]()
    for path, files in _walk([root / part for part in parts or [WHOLE]]):
        parents = os.path.relpath(path, root).split(os.sep)
        names = tuple(composed(name) for name in parents if name != os.curdir)
        images = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
        owner = names[level] if level is not None and level < len(names) else None
        if owner is None and level is not None and names and images:
            image = printable(os.path.join(path, images[0]))
            raise ConfigError(f"data.owner: {image} lies too high in the tree to have a folder at level {level}")
        names = tuple(name for i, name in enumerate(names) if i != level)
        part = names[0] if names and names[0] in PARTS else WHOLE
        names = names[1:] if part else names
        found.setdefault(part, []).append(Folder(path, names, owner, images))
        others = set(files).difference(images) if names else ()
        left_out.update(os.path.splitext(file)[1].lower() or "without an extension" for file in others)
    outside = [folder for folders in found.values() for folder in folders if not folder.names]
    if len(found) > 1:
        outside += found.pop(WHOLE, [])
    left_out["images outside class folders"] += sum(len(folder.images) for folder in outside)
    if parts:
        beside = [entry for entry in os.scandir(root) if entry.is_dir() and entry.name not in parts]
        left_out["folders beside train/ and test/"] += len([dir for dir in beside if dir.name[0] != "."])
    if left_out := +left_out:
        kinds = ", ".join(f"{count} {printable(kind)}" for kind, count in left_out.most_common(5))
        log.warning("data.root: %s: left out are files of these kinds: %s", printable(root), kinds)
    return found


def _walk(tops: list[Path]) -> Iterator[tuple[str, list[str]]]:
    """The folders `tops` and all below them, with their files; hidden folders and files are left out.

    Follows symbolic links; raises ConfigError where they lead to a folder twice, as the tree may then be endless.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = set[tuple[int, int]]()
    walks = (os.walk(top, onerror=refuse, followlinks=True) for top in tops)
    for folder, subfolders, files in chain.from_iterable(walks):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            raise ConfigError(f"data.root: symbolic links lead to {printable(folder)} twice; remove one of them")
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, [name for name in files if not name.startswith(".")]


def _check_nesting(root: Path, folders: dict[str, list[Folder]], owner: int | str | None) -> None:
    """Raise ConfigError where all images lie deeper than in class folders, which are perhaps owners' folders."""
    holders = [folder.names for found in folders.values() for folder in found if folder.images and folder.names]
    if not holders or any(len(names) == 1 for names in holders):
        return
    level, (outer, inner, *_) = int(WHOLE not in folders), map(printable, holders[0])
    levels = "" if isinstance(owner, int) else f"data.owner: {level} if {outer} is an owner"
    if levels and inner not in PARTS:
        levels += f", or {level + 1} if {inner} is one"
    found = f"the folders of {printable(root)} that should be classes, such as {outer}, have no image of their own"
    raise ConfigError(
        f"data.root: {found}, only folders, such as {inner}; set {levels or 'data.owner to another level'}, "
        "or data.classes if they are classes"
    )


def _check_parts(
    root: Path, folders: dict[str, list[Folder]], test_share: float | None, classes: list[str] | None
) -> None:
    """Raise ConfigError where the options do not fit the parts of the tree."""
    parts = [part for part in PARTS if part in folders]
    if len(parts) == 1 and not classes:
        lacking = "test" if parts == ["train"] else "train"
        raise ConfigError(
            f"data.root: {printable(root)} has {parts[0]}/ but not {lacking}/; it should have both or neither, or "
            "data.classes should name the class folders in the order of the labels"
        )
    if bool(parts) == (test_share is not None):
        found = f"has {' and '.join(f'{part}/' for part in parts)}" if parts else "has no train/ and test/"
        raise ConfigError(
            f"data.test_share: {printable(root)} {found}, so it should be {'left out' if parts else 'set'}"
        )


def _class_index(root: Path, folders: dict[str, list[Folder]], classes: list[str] | None) -> dict[str, int]:
    """The label of each class folder; raises ConfigError where folders and `classes` do not fit."""
    names = {part: {folder.names[0] for folder in found if folder.names} for part, found in folders.items()}
    if not classes:
        known = names[WHOLE if WHOLE in names else "train"]
        if unknown := names.get("test", known) - known:
            listed = printable(", ".join(sorted(unknown)))
            raise ConfigError(f"data.root: {printable(root)}/test has class folders that train/ lacks: {listed}")
        return {name: label for label, name in enumerate(sorted(known))}
    classes = list(map(composed, classes))
    if repeated := [name for i, name in enumerate(classes) if name in classes[:i]]:
        raise ConfigError(f"data.classes: {printable(repeated[0])} appears twice")
    for part in names:
        if unknown := names[part] - set(classes):
            listed = printable(", ".join(sorted(unknown)))
            raise ConfigError(
                f"data.classes: should also name these folders of {printable(root / part)}: {listed}"
            )
    return {name: label for label, name in enumerate(classes)}


def _samples(folders: list[Folder], index: dict[str, int]) -> list[Sample]:
    """The images in and below the class folders."""
    inside = sorted((index[folder.names[0]], folder.path, folder) for folder in folders if folder.names)
    return [
        Sample(os.path.join(path, image), label, folder.owner)
        for label, path, folder in inside
        for image in folder.images
    ]


def _check_complete(at: Path, samples: list[Sample], index: dict[str, int]) -> None:
    found = {sample.label for sample in samples}
    if missing := [name for name, label in index.items() if label not in found]:
        raise ConfigError(
            f"data.root: {printable(at)} has no images of the classes {printable(', '.join(missing))}; "
            f"allowed: files that end in {', '.join(EXTENSIONS)}"
        )


def _owned_by_pattern(root: Path, samples: list[Sample], pattern: str) -> list[Sample]:
    """The samples with the owners that `pattern` finds in their paths."""
    try:
        finder = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"data.owner: {printable(pattern)} is not a regular expression: {error}") from None
    owned = []
    for sample in samples:
        name = _name(root, sample)
        match = finder.search(name)
        owner = match and match[1 if finder.groups else 0]
        if not owner:
            raise ConfigError(f"data.owner: {printable(pattern)} finds no owner in {printable(name)}")
        owned.append(sample._replace(owner=owner))
    return owned


def _owned_by_list(root: Path, samples: list[Sample], path: Path) -> list[Sample]:
    """The samples with the owners that the CSV file at `path` has for them."""
    at, owners = f"data.owner_list: {printable(path)}", dict[str, str]()
    try:
        with open_regular(path, links=True) as file:
            content = file.read(MAX_LIST_BYTES + 1)
        if len(content) > MAX_LIST_BYTES:
            raise ConfigError(f"{at} has more than {MAX_LIST_BYTES} bytes")
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        if not {"file", "owner"} <= set(rows.fieldnames or ()):
            raise ConfigError(f"{at} should begin with a line of column names, of which two are file and owner")
        for row in rows:
            name, owner = posixpath.normpath(row["file"] or ""), row["owner"]
            if not owner or owners.setdefault(name, owner) != owner:
                problem = "another owner than a line before" if owner else "no owner"
                raise ConfigError(f"{at}, line {rows.line_num}, has {problem} for {printable(name)}")
    except ConfigError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{at} cannot be read as a CSV file in UTF-8 ({reason(error)})") from None
    for sample in samples:
        if (name := _name(root, sample)) not in owners:
            raise ConfigError(f"{at} has no owner for {printable(name)}")
    return [sample._replace(owner=owners[_name(root, sample)]) for sample in samples]


def _name(root: Path, sample: Sample) -> str:
    """The path below `root`, with / on every system."""
    return Path(os.path.relpath(sample.path, root)).as_posix()
