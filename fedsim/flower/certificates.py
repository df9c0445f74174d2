"""A federation's certificates and keys: a CA, the server's certificate, and a key pair for each node.

Nodes verify the server by the CA's certificate (TLS 1.3, RFC 8446; X.509, RFC 5280); the server verifies a node by
its public key (P-384, with which Flower's SuperNodes sign). Only their owner can read files with private keys.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from fedsim.base.files import DRAFT, sync_folder, uninterrupted, write
from fedsim.errors import ConfigError, missing_extra, one_line

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    raise missing_extra("fedsim certificates", "cryptography", "flower") from error

DAYS = 825  # of a server's certificate: the most that Apple's systems accept from a private CA
CA_DAYS = 3650
BACKDATED = timedelta(hours=1)  # a certificate's start lies in the past, for clocks that are slow
LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
HOST = re.compile(rf"(\*\.)?{LABEL}(\.{LABEL})*")
NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOCAL = ("localhost", "127.0.0.1")  # names of the server for processes on its machine

CA, CA_KEY, SERVER, SERVER_KEY, NODES = "ca.crt", "ca.key", "server.pem", "server.key", "nodes"


class Made(NamedTuple):
    """A file that was written, and the machine where it belongs."""

    path: Path
    place: str


def make(
    folder: Path, servers: Sequence[str] = (), nodes: Sequence[str] = (), days: int = DAYS, renew: bool = False
) -> list[Made]:
    """Write certificates and keys for `servers` (names and addresses of one server) and `nodes` (names).

    With `servers`: a CA, and the server's key and certificate for `days`. With `nodes`: a key pair each. With
    `renew`: a new certificate of the server by the existing CA, for the same key, and the same names or `servers`.
    Nothing else is overwritten. Raises ConfigError or OSError, and then nothing is written.
    """
    hosts, names = _hosts(servers), _names(nodes)
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"--days: {days} should be from 1 to {CA_DAYS}")
    if not (hosts or names or renew):
        raise ConfigError("certificates: nothing to make; give --server, --node or --renew")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: should be a folder")
    if renew and not (folder / CA).exists():
        raise ConfigError(f"--renew: {folder} has no {CA}; --server without --renew makes it")
    if hosts and not renew and (folder / CA).exists():
        raise ConfigError(f"--server: {folder} already has certificates; --renew replaces the server's")
    keys = {f"{NODES}/{name}{ending}": content for name in names for ending, content in _key_pair(name).items()}
    made = keys if renew else keys | (_authority(hosts, days) if hosts else {})
    certificate = _renewed(folder, hosts, days) if renew else None
    with uninterrupted():
        _place(folder, made)
        if certificate:
            write(folder / SERVER, certificate)
    return [
        Made(folder / name, _where(folder, name)) for name in [*([SERVER] if certificate else []), *sorted(made)]
    ]


def _hosts(servers: Sequence[str]) -> list[x509.GeneralName]:
    found = dict[x509.GeneralName, None]()
    for server in [*servers, *(LOCAL if servers else ())]:
        with suppress(ValueError):
            found[x509.IPAddress(ip_address(server))] = None
            continue
        name = server.lower()
        if not HOST.fullmatch(name) or len(name) > 253 or name.rpartition(".")[2].isdecimal():
            raise ConfigError(
                f"--server: {one_line(server)!r} should be a machine's name or address, "
                "such as lab.example.org or 10.0.0.5, without a port"
            )
        found[x509.DNSName(name)] = None
    return list(found)


def _names(nodes: Sequence[str]) -> Sequence[str]:
    for name in nodes:
        if not NODE.fullmatch(name) or name.endswith((".pub", DRAFT)):
            raise ConfigError(
                f"--node: {one_line(name)!r} should be letters, digits, '.', '_' and '-', not ending in .pub"
            )
        if nodes.count(name) > 1:
            raise ConfigError(f"--node: {name} is given twice")
    return nodes


def _key_pair(name: str) -> dict[str, bytes]:
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return {
        "": key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        ".pub": public + f" {name}\n".encode(),
    }


def _authority(hosts: list[x509.GeneralName], days: int) -> dict[str, bytes]:
    """A new CA, and a server's key with a certificate by it."""
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    name = _name(f"fedsim CA {uuid4().hex[:8]}")  # so that the CAs of two federations differ in name
    public = ca_key.public_key()
    ca = (
        _begun(name, name, public, public, datetime.now(UTC) + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA384())
    )
    return {
        CA: ca.public_bytes(Encoding.PEM),
        CA_KEY: _pem(ca_key),
        SERVER: _server_certificate(ca, ca_key, server_key.public_key(), hosts, days),
        SERVER_KEY: _pem(server_key),
    }


def _renewed(folder: Path, hosts: list[x509.GeneralName], days: int) -> bytes:
    """A new certificate for the server's existing key."""
    try:
        ca = x509.load_pem_x509_certificate((folder / CA).read_bytes())
        old = x509.load_pem_x509_certificate((folder / SERVER).read_bytes())
        key = load_pem_private_key((folder / CA_KEY).read_bytes(), None)
        names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise ConfigError(f"--renew: the certificates in {folder} cannot be read: {one_line(error)}") from None
    public = old.public_key()
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(public, ec.EllipticCurvePublicKey):
        raise ConfigError(f"--renew: the keys in {folder} were not made by `fedsim certificates`")
    if key.public_key() != ca.public_key():
        raise ConfigError(f"--renew: {folder / CA_KEY} is not the key of {folder / CA}")
    return _server_certificate(ca, key, public, hosts or list(names), days)


def _server_certificate(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    hosts: list[x509.GeneralName],
    days: int,
) -> bytes:
    """A certificate of a server, signed by the CA."""
    end = datetime.now(UTC) + timedelta(days=days)
    if end > ca.not_valid_after_utc:
        raise ConfigError(
            f"--days: {days} is longer than the CA is valid, until {ca.not_valid_after_utc:%Y-%m-%d}"
        )
    built = (
        _begun(_name("fedsim server"), ca.subject, public, ca_key.public_key(), end)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return built.sign(ca_key, hashes.SHA384()).public_bytes(Encoding.PEM)


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuers: ec.EllipticCurvePublicKey,
    end: datetime,
) -> x509.CertificateBuilder:
    """What every certificate says; with both key identifiers, which a strict check of RFC 5280 asks for."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public(name: str) -> bool:
    return name.endswith((".crt", ".pem", ".pub"))


def _place(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files or none, and overwrite nothing."""
    if not contents:
        return
    new, hidden = not folder.exists(), f".{folder.name}.{uuid4().hex[:8]}{DRAFT}"
    draft = folder.with_name(hidden) if new else folder / hidden
    draft.mkdir(parents=True, mode=0o700)
    done = list[Path]()
    try:
        for name, content in contents.items():
            _write(draft / name, content, 0o644 if _public(name) else 0o600)
        if new:
            draft.rename(folder)
        for name in () if new else contents:
            (folder / name).parent.mkdir(exist_ok=True, mode=0o700)
            (folder / name).hardlink_to(draft / name)  # unlike renaming, this replaces no file
            done.append(folder / name)
        for changed in {folder.parent, folder, *((folder / name).parent for name in contents)}:
            sync_folder(changed)
    except BaseException as error:
        for path in done:
            path.unlink()
        if isinstance(error, FileExistsError):
            raise ConfigError(f"{error.filename2 or error.filename}: exists; nothing is overwritten") from None
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(exist_ok=True, mode=0o700)
    path.touch(mode)  # before it has content that others could read
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _where(folder: Path, name: str) -> str:
    """The machine where a file belongs."""
    if name == CA_KEY:
        return "stays here, best offline: whoever has it can pretend to be the server"
    if name == CA:
        return "to every machine: it verifies the server"
    if name in (SERVER, SERVER_KEY):
        return "to the server" + (" and no other machine" if name == SERVER_KEY else "")
    node = Path(name).name
    if _public(name):
        return f"to the server, where `flwr supernode register` lets {node[:-4]} join"
    return f"to the machine of {node} and no other machine"
