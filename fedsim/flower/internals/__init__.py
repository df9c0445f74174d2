"""All that fedsim takes from inside flwr, in one place: a contract test says what changed when flwr does.

`Link` drives a Flower run from this process, `NodeLink` makes this process a node, as a SuperNode is; `listed`,
`register` and `unregister` do what `flwr supernode` does. They use an ordinary SuperLink's protocol and
authentication. A failed connection is a LinkError: nothing here ends the process, signals it or writes to its
output. Reading unpickles nothing, and takes no more memory than the caller allows.
"""

from fedsim.errors import ConfigError
from fedsim.flower import FLWR, needs_flwr

needs_flwr("flower")

try:
    from fedsim.flower.internals.connection import LinkError, Superlink
    from fedsim.flower.internals.control import Listed, listed, public_key_bytes, register, unregister
    from fedsim.flower.internals.link import Kind, Link, Reply, build_fab
    from fedsim.flower.internals.node_link import NodeLink, key_pair
except ImportError as error:
    raise ConfigError(f"flower: flwr is incomplete: {error}; pip install --force-reinstall '{FLWR}'") from error

__all__ = [
    "Kind",
    "Link",
    "LinkError",
    "Listed",
    "NodeLink",
    "Reply",
    "Superlink",
    "build_fab",
    "key_pair",
    "listed",
    "public_key_bytes",
    "register",
    "unregister",
]
