"""How fast augmented batches are made: fedsim's against torchvision's, of the same rows, for `fedsim bench`.

fedsim changes a batch at a time, in one thread, where the data lies. The other side is what one writes without it:
torchvision's v2 transforms, an image at a time, in a DataLoader with as many processes as cores.

Differs: torchvision has no cutout of several squares, so there is a small one here.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from fedsim.base.catalogue import Spec
from fedsim.base.devices import one_thread
from fedsim.base.machine import cores
from fedsim.bench.plain import batch_rows
from fedsim.bench.turns import Seconds, Side
from fedsim.experiment.build import build_dataset
from fedsim.experiment.config import Config
from fedsim.federated.simulation import Simulation
from fedsim.training.local import ClientObjective
from fedsim.training.replica import Replica
from fedsim.types import Job, Stream, random

FEDSIM = "augmented batches, fedsim"
TORCHVISION = "augmented batches, torchvision in a DataLoader"


@dataclass(frozen=True)
class Cutout:
    """`fedsim.data.augment.cutout` of one image (C, H, W)."""

    holes: int
    length: int

    def __call__(self, image: Tensor) -> Tensor:
        """A copy with black squares."""
        image = image.clone()
        for _ in range(self.holes):
            top, left = (int(torch.randint(side, ())) - self.length // 2 for side in image.shape[1:])
            image[:, max(top, 0) : max(top + self.length, 0), max(left, 0) : max(left + self.length, 0)] = 0
        return image


OF_IMAGE: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "random_crop": lambda size, padding: v2.RandomCrop(size, padding),
    "flip": lambda size, p: v2.RandomHorizontalFlip(p),
    "rotation": lambda size, degrees, interpolation: v2.RandomRotation(
        degrees, v2.InterpolationMode(interpolation)
    ),
    "color_jitter": lambda size, **widths: v2.ColorJitter(**widths),
    "cutout": lambda size, holes, length: Cutout(holes, length),
    "random_resized_crop": lambda size, **options: v2.RandomResizedCrop(size, **options),
}
OF_BATCH = {"mixup": v2.MixUp, "cutmix": v2.CutMix}


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images (C, H, W) with their labels (), each changed when it is asked for."""

    def __init__(self, x: Tensor, y: Tensor, change: Callable[[Tensor], Tensor]):
        self.x, self.y, self.change = x, y, change

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.change(self.x[place]), self.y[place]


@dataclass(frozen=True)
class Collate:
    """Examples to a batch (B, C, H, W) with labels (B,), or (B, classes) where `mixers` mixed them."""

    mixers: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]

    def __call__(self, examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The batch."""
        x, y = default_collate(examples)
        for mix in self.mixers:
            x, y = mix(x, y)
        return x, y


def input_sides(config: Config, simulation: Simulation) -> dict[str, AbstractContextManager[Side]]:
    """Sides that make the first round's batches; fedsim's alone where torchvision lacks an entry of the list.

    `simulation` is the config's, with its `local.augment`; its examples are images.
    """
    known = all(spec["name"] in OF_IMAGE | OF_BATCH for spec in config.local["augment"])
    theirs = {TORCHVISION: _torchvision(config, simulation)} if known else {}
    return {FEDSIM: _fedsim(simulation), **theirs}


def input_line(seconds: Seconds[str], serial: str, steps: int) -> str:
    """Milliseconds a batch, and fedsim's as a share of a client step of the side `serial`."""
    share = median(i / s for i, s in zip(seconds[FEDSIM], seconds[serial], strict=True))
    ours = f"augmented batch: {1000 * median(seconds[FEDSIM]) / steps:.2f} ms, {share:.1%} of a client step"
    if TORCHVISION not in seconds:
        return f"{ours}; torchvision lacks an entry"
    return f"{ours}; by torchvision {1000 * median(seconds[TORCHVISION]) / steps:.2f} ms"


def pipeline(config: Config, simulation: Simulation) -> tuple[Images, list[list[int]], Collate]:
    """What a DataLoader takes: the first round's images, which of them make each batch, and how."""
    data, specs = simulation.data, config.local["augment"]
    dataset = build_dataset(config)
    rows, batches = list[Tensor](), list[list[int]]()
    for client in simulation.sample():
        own, start = torch.from_numpy(data.rows(client)), sum(map(len, rows))
        stream = random(simulation.seed, Stream.BATCHES, 0, client)
        batches += [(start + at).tolist() for at in batch_rows(simulation.recipe, len(own), stream, own.device)]
        rows.append(own)
    chosen, size = torch.cat(rows), list(data.shape[1:])
    changes = [OF_IMAGE[spec["name"]](size, **_options(spec)) for spec in specs if spec["name"] in OF_IMAGE]
    if list(dataset.x_train.shape[2:]) != size:
        changes.append(v2.CenterCrop(size))
    changes.append(v2.ToDtype(torch.float32, scale=True))
    if dataset.mean:
        changes.append(v2.Normalize(dataset.mean, dataset.std))
    mixers = [_mixer(spec, data.num_classes) for spec in specs if spec["name"] in OF_BATCH]
    return Images(dataset.x_train[chosen], data.labels[chosen], v2.Compose(changes)), batches, Collate(mixers)


def _options(spec: Spec) -> Spec:
    return {key: value for key, value in spec.items() if key != "name"}


def _mixer(spec: Spec, classes: int) -> v2.Transform:
    return v2.RandomApply([OF_BATCH[spec["name"]](alpha=spec["alpha"], num_classes=classes)], spec["p"])


@contextmanager
def _fedsim(simulation: Simulation) -> Iterator[Side]:
    task, home, recipe = simulation.task, simulation.runtime.home, simulation.recipe
    replica, data = Replica(task, home), simulation.data.to(home)
    buffers = task.initial_buffers.to(home)
    clients = [
        ClientObjective(replica, data, Job(k, 0, None), buffers, recipe, simulation.seed)
        for k in simulation.sample()
    ]

    def side() -> None:
        with one_thread():
            for client in clients:
                for _ in client.batches():
                    pass
        _finish(home)

    yield side


@contextmanager
def _torchvision(config: Config, simulation: Simulation) -> Iterator[Side]:
    """The processes start in the first pass, which is not counted, and stay; a fork beside threads may hang."""
    home = simulation.runtime.home
    images, batches, collate = pipeline(config, simulation)
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=cores(),
        collate_fn=collate,
        pin_memory=home.type == "cuda",
        multiprocessing_context="spawn",
        persistent_workers=True,
    )

    def side() -> None:
        for x, y in loader:
            x.to(home, non_blocking=True)
            y.to(home, non_blocking=True)
        _finish(home)

    yield side


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
