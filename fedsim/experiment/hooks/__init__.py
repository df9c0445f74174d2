"""The hooks that a config can name; what a hook is stands in fedsim/experiment/hook.py."""

from fedsim.base.catalogue import Catalogue

HOOKS = Catalogue(
    "hooks",
    "fedsim.experiment.hooks",
    {
        "stop_on_non_finite": "stopping:StopOnNonFinite",
        "early_stopping": "stopping:EarlyStopping",
        "tensorboard": "tensorboard:TensorBoard",
        "curves": "curves:Curves",
    },
)
