"""All that fedsim takes from inside flwr, in one place: a contract test says what changed when flwr does.

`Link` drives a Flower run from this process, `Member` is a SuperNode that is this process; `listed`, `register`
and `unregister` do what `flwr supernode` does. They speak with an ordinary SuperLink, on its wire and with its
authentication. What cannot go on is told as a LinkError: nothing here ends the process, signals it or writes to
its output. Objects are read without unpickling anything, and no more memory is taken than the caller allows.
"""

from fedsim.errors import ConfigError
from fedsim.flower import FLWR, needs_flwr

needs_flwr("flower")

try:
    from fedsim.flower.internals.connection import LinkError, Superlink
    from fedsim.flower.internals.control import Listed, listed, public_key_bytes, register, unregister
    from fedsim.flower.internals.link import Kind, Link, Reply, build_fab
    from fedsim.flower.internals.member import Member
except ImportError as error:
    raise ConfigError(f"flower: flwr cannot be imported: {error}; pip install --force-reinstall '{FLWR}'") from error

__all__ = [
    "Kind",
    "Link",
    "LinkError",
    "Listed",
    "Member",
    "Reply",
    "Superlink",
    "build_fab",
    "listed",
    "public_key_bytes",
    "register",
    "unregister",
]
