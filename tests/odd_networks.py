"""Small networks that users bring: each kind of layer that has a state, a draw or a shape of its own."""

import math

import torch
from torch import nn


def linear(shape, classes, *, bias: bool = True):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes, bias=bias))


def dropout(shape, classes, *, rate: float = 0.5):
    return nn.Sequential(nn.Dropout(rate), *linear(shape, 8), nn.ReLU(), nn.Dropout(rate), nn.Linear(8, classes))


def normed(shape, classes):
    """Batch norm and layer norm over features."""
    return nn.Sequential(*linear(shape, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, classes))


def untracked(shape, classes):
    """Batch norm without running statistics."""
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return nn.Sequential(*linear(shape, 8), norm, nn.ReLU(), nn.Linear(8, classes))


def spectral(shape, classes):
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(math.prod(shape), 8))
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(8, classes))


def lazy(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(classes))


def double(shape, classes):
    return linear(shape, classes).double()


class Tied(nn.Module):
    """One weight in two layers, and a frozen scale."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 8), nn.Linear(inputs, 8)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.last = nn.Linear(8, classes)

    def forward(self, x):
        x = x.flatten(1)
        return self.last(torch.relu(self.first(x)) + self.scale * self.second(x))


def tied(shape, classes):
    return Tied(math.prod(shape), classes)


class Recurrent(nn.Module):
    """Reads an image line by line."""

    def __init__(self, width, classes):
        super().__init__()
        self.gru, self.last = nn.GRU(width, 8, batch_first=True), nn.Linear(8, classes)

    def forward(self, x):
        return self.last(self.gru(x.flatten(1, -2) if x.dim() > 2 else x[:, None])[0][:, -1])


def recurrent(shape, classes):
    return Recurrent(shape[-1], classes)


class RunningMean(nn.Module):
    """Subtracts a running mean, which it writes in place or assigns."""

    def __init__(self, inputs, classes, assigned):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.assigned, self.last = assigned, nn.Linear(inputs, classes)

    def forward(self, x):
        x = x.flatten(1)
        if self.training and self.assigned:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        elif self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.last(x - self.mean)


def running_mean(shape, classes, *, assigned: bool = False):
    return RunningMean(math.prod(shape), classes, assigned)


class Counting(nn.Module):
    """Warms up by a counter of its own."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.last = nn.Linear(inputs, classes)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.last(x.flatten(1)) * (self.calls / 10).clamp(max=1)


def counting(shape, classes):
    return Counting(math.prod(shape), classes)


class Remembering(Counting):
    """Keeps the last batch's mean as a plain attribute, which goes from client to client."""

    last_mean = 0.0

    def forward(self, x):
        x = x.flatten(1)
        out = self.last(x) + self.last_mean
        self.last_mean = x.detach().mean()
        return out


def remembering(shape, classes):
    return Remembering(math.prod(shape), classes)


class TwoOutputs(Counting):
    """As many tutorials: logits and probabilities."""

    def forward(self, x):
        logits = self.last(x.flatten(1))
        return logits, logits.softmax(-1)


def two_outputs(shape, classes):
    return TwoOutputs(math.prod(shape), classes)


class Auxiliary(Counting):
    """A second head in training only."""

    def forward(self, x):
        logits = self.last(x.flatten(1))
        return (logits, logits * 0.5) if self.training else logits


def auxiliary(shape, classes):
    return Auxiliary(math.prod(shape), classes)
