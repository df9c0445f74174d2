"""The version of fedsim, which pyproject.toml reads here: it holds in a checkout that is not installed, too."""

VERSION = "0.1.0"
