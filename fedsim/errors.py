"""What can go wrong, by whose fault it is."""


class ConfigError(ValueError):
    """The user's input cannot be used. One line: which key or file, what was wrong, what is allowed."""


class ClientError(RuntimeError):
    """One client failed in one round; the cause is chained."""


class RoundError(RuntimeError):
    """A round cannot count: too few clients answered, or what they sent does not add up."""
