"""Federated learning: simulate it, study non-IID data, take it to real machines."""

from fedsim.errors import ClientError as ClientError
from fedsim.errors import ConfigError as ConfigError
from fedsim.errors import RoundError as RoundError
from fedsim.experiment import Result as Result
from fedsim.experiment import resume as resume
from fedsim.experiment import run as run
from fedsim.hooks import Hook as Hook
from fedsim.local import LocalObjective as LocalObjective
from fedsim.recipe import Recipe as Recipe
from fedsim.simulation import Simulation as Simulation
from fedsim.strategy import Strategy as Strategy
from fedsim.strategy import Wrapper as Wrapper
from fedsim.task import Task as Task
from fedsim.types import Batch as Batch
from fedsim.types import RoundInfo as RoundInfo
from fedsim.types import State as State
from fedsim.types import Update as Update
