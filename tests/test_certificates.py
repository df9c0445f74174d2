"""Certificates and keys of a federation: who can shake hands with whom, and that nothing is lost or shown."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedsim.errors import ConfigError
from fedsim.flower import certificates
from fedsim.flower.certificates import make

BIN = Path(sys.executable).parent


def shake_hands(lab, server_name, ca):
    """What a client that trusts `ca` gets of a server with the keys of `lab`, over a real TLS connection."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(lab / "server.pem", lab / "server.key")
    client = ssl.create_default_context(cafile=ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    near, far = socket.socketpair()
    failed = []

    def serve():
        try:
            with server.wrap_socket(far, server_side=True) as opened:
                opened.sendall(b"hello")
        except OSError as error:  # the other side did not trust it
            failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(near, server_hostname=server_name) as opened:
            return opened.recv(5)
    finally:
        near.close()
        thread.join(10)
        far.close()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "lab"
    make(folder, ["Lab.example.org", "10.0.0.5", "fd00::5"], ["hospital-a", "hospital-b"])
    return folder


@pytest.mark.parametrize("name", ["lab.example.org", "10.0.0.5", "fd00::5", "localhost", "127.0.0.1"])
def test_a_client_with_the_ca_trusts_the_server_by_each_of_its_names(lab, name):
    assert shake_hands(lab, name, lab / "ca.crt") == b"hello"


def test_a_client_trusts_no_other_name_and_no_other_ca(lab, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match=r"other\.example\.org"):
        shake_hands(lab, "other.example.org", lab / "ca.crt")
    make(tmp_path / "other", ["lab.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(lab, "lab.example.org", tmp_path / "other" / "ca.crt")


def test_a_server_can_vouch_for_nobody(lab):
    """Neither key makes a CA of the server."""
    server = x509.load_pem_x509_certificate((lab / "server.pem").read_bytes())
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    ca = x509.load_pem_x509_certificate((lab / "ca.crt").read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    server.verify_directly_issued_by(ca)


def test_a_nodes_key_is_one_that_flower_takes(lab):
    for name in ("hospital-a", "hospital-b"):
        key = load_ssh_private_key((lab / "nodes" / name).read_bytes(), None)
        public = (lab / "nodes" / f"{name}.pub").read_bytes()
        assert load_ssh_public_key(public) == key.public_key()
        assert key.curve.name == "secp384r1"
        assert public.endswith(f" {name}\n".encode())


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_nobody_else_reads_keys(tmp_path, mask):
    before = os.umask(mask)
    try:
        make(tmp_path / "lab", ["x"], ["a"])
        make(tmp_path / "lab", nodes=["b"])
    finally:
        os.umask(before)
    private = {
        path.name for path in (tmp_path / "lab").rglob("*") if path.is_file() and not path.stat().st_mode & 0o077
    }
    assert private >= {"ca.key", "server.key", "a", "b"}
    assert not (tmp_path / "lab").stat().st_mode & 0o077
    assert not (tmp_path / "lab" / "nodes").stat().st_mode & 0o077


def test_nodes_are_added_and_nothing_is_overwritten(tmp_path, fedsim_):
    lab = tmp_path / "lab"
    assert fedsim_("certificates", lab, "--server", "x", "--node", "a").status == 0
    before = contents(lab)
    assert fedsim_("certificates", lab, "--node", "b").status == 0
    assert contents(lab).items() >= before.items()
    assert {str(path) for path in contents(lab).keys() - before.keys()} == {"nodes/b", "nodes/b.pub"}
    before = contents(lab)
    for arguments in (["--node", "c", "--node", "a"], ["--server", "y", "--node", "c"]):
        result = fedsim_("certificates", lab, *arguments)
        assert result.status == 2
        assert result.err.count("\n") == 1
        assert contents(lab) == before


def test_it_says_what_goes_where(tmp_path, fedsim_):
    lab = tmp_path / "lab"
    said = fedsim_("certificates", lab, "--server", "x", "--node", "a").out
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert lines.keys() == {str(lab / path) for path in contents(lab)}
    assert "stays here" in lines[f"{lab}/ca.key"]
    assert "no other" in lines[f"{lab}/server.key"]
    assert "no other" in lines[f"{lab}/nodes/a"]


def test_keys_can_be_made_on_the_nodes_own_machine(tmp_path):
    """So that they never travel; no CA is made there."""
    make(tmp_path / "keys", nodes=["a"])
    assert {path.name for path in contents(tmp_path / "keys")} == {"a", "a.pub"}


def test_a_renewed_certificate_has_the_same_key_and_names_or_new_ones(tmp_path):
    lab = tmp_path / "lab"
    make(lab, ["old.example.org"], days=1)
    before = contents(lab)
    made = make(lab, days=30, renew=True)
    assert [each.path for each in made] == [lab / "server.pem"]
    assert {str(path) for path, content in contents(lab).items() if content != before[path]} == {"server.pem"}
    assert shake_hands(lab, "old.example.org", lab / "ca.crt") == b"hello"
    make(lab, ["new.example.org"], renew=True)
    assert shake_hands(lab, "new.example.org", lab / "ca.crt") == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(lab, "old.example.org", lab / "ca.crt")


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_nothing(tmp_path, monkeypatch, there):
    """A full disk at any of the files."""
    lab = tmp_path / "lab"
    if there:
        make(lab, nodes=["old"])
    before, real = contents(tmp_path), certificates._write
    for place in range(6):
        left = iter(range(place))

        def write(*arguments, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            real(*arguments)

        monkeypatch.setattr(certificates, "_write", write)
        with pytest.raises(OSError, match="No space left"):
            make(lab, ["x"], ["a"])
        assert contents(tmp_path) == before
        assert lab.exists() == there


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to make"),
        (["--server", "https://lab.example.org"], "without a port"),
        (["--server", "lab.example.org:8000"], "without a port"),
        (["--server", "10.0.0.256"], "machine's name or address"),
        (["--server", "-x"], "machine's name or address"),
        (["--server", ""], "machine's name or address"),
        (["--server", "a" * 64], "machine's name or address"),
        (["--server", "zürich.example"], "machine's name or address"),
        (["--node", "../a"], "should be letters"),
        (["--node", "a.pub"], "not ending in .pub"),
        (["--node", ""], "should be letters"),
        (["--node", "a\nb"], "should be letters"),
        (["--node", "a", "--node", "a"], "given twice"),
        (["--server", "x", "--days", "0"], "from 1 to 3650"),
        (["--server", "x", "--days", "4000"], "from 1 to 3650"),
        (["--renew"], "has no ca.crt"),
    ],
)
def test_what_it_cannot_use_is_one_clear_line(tmp_path, fedsim_, arguments, said):
    result = fedsim_("certificates", tmp_path / "lab", *arguments)
    assert result.status == 2
    assert said in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_renewal_needs_the_ca_that_made_it(tmp_path):
    make(tmp_path / "lab", ["x"])
    make(tmp_path / "other", ["x"])
    shutil.copy(tmp_path / "other" / "ca.key", tmp_path / "lab" / "ca.key")
    with pytest.raises(ConfigError, match=r"is not the key of"):
        make(tmp_path / "lab", renew=True)
    (tmp_path / "lab" / "ca.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        make(tmp_path / "lab", renew=True)


def test_a_certificate_does_not_outlive_its_ca(tmp_path):
    make(tmp_path / "lab", ["x"])
    with pytest.raises(ConfigError, match=r"longer than the CA is valid"):
        make(tmp_path / "lab", days=3650, renew=True)


@pytest.mark.parametrize(
    ("years", "said"),
    [(-3, "expired.*; this machine's clock shows 20"), (1, "not yet valid.*; is this machine's clock right")],
)
def test_a_certificate_of_another_time_leads_to_the_clock(tmp_path, monkeypatch, years, said):
    """And may be tried again: the clock is set right, or the certificate renewed."""
    pytest.importorskip("flwr")
    from fedsim.flower.internals import LinkError, Superlink, listed

    class Elsewhen(certificates.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + years * timedelta(days=365)

    monkeypatch.setattr(certificates, "datetime", Elsewhen)
    make(tmp_path / "lab", ["127.0.0.1"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "lab" / "server.pem", tmp_path / "lab" / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with suppress(OSError), server.wrap_socket(listening.accept()[0], server_side=True):
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        superlink = Superlink(
            f"127.0.0.1:{listening.getsockname()[1]}", (tmp_path / "lab" / "ca.crt").read_bytes()
        )
        with pytest.raises(LinkError, match=said) as caught:
            listed(superlink)
        thread.join()
    assert caught.value.again


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "lab").write_text("")
    with pytest.raises(ConfigError, match=r"should be a folder"):
        make(tmp_path / "lab", nodes=["a"])


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch, fedsim_):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "fedsim.flower.certificates")
    result = fedsim_("certificates", tmp_path / "lab", "--node", "a")
    assert (result.status, "pip install -e '.[flower]'" in result.err) == (2, True)


@pytest.mark.slow
def test_flower_takes_them(tmp_path, monkeypatch):
    """A SuperLink with TLS and authentication: the registered node comes online, the other one is refused."""
    pytest.importorskip("flwr")
    make(tmp_path / "lab", ["127.0.0.1"], ["known", "unknown"])
    lab, (port, *local) = tmp_path / "lab", free_ports(3)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink.lab]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{lab}/ca.crt"\n'
    )
    started = [
        start(
            tmp_path / "superlink.log",
            "flower-superlink",
            f"--port={port}",
            f"--ssl-ca-certfile={lab}/ca.crt",
            f"--ssl-certfile={lab}/server.pem",
            f"--ssl-keyfile={lab}/server.key",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        )
    ]
    try:
        trust = ssl.create_default_context(cafile=lab / "ca.crt")
        wait_until(lambda: healthy(port, trust))
        flwr("supernode", "register", lab / "nodes" / "known.pub", "lab", "--name=known")
        for name, own in zip(("known", "unknown"), local, strict=True):
            started.append(
                start(
                    tmp_path / f"{name}.log",
                    "flower-supernode",
                    f"--superlink=127.0.0.1:{port}",
                    f"--root-certificates={lab}/ca.crt",
                    f"--auth-supernode-private-key={lab}/nodes/{name}",
                    f"--port={own}",
                    "--max-retries=2",
                )
            )
        wait_until(lambda: [node["status"] for node in nodes()] == ["online"])
        assert started[2].wait(60) != 0
        assert [node["status"] for node in nodes()] == ["online"]
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def start(log, program, *arguments):
    with log.open("w") as file:
        return subprocess.Popen([BIN / program, *arguments], stdout=file, stderr=file)


def flwr(*arguments):
    done = subprocess.run([BIN / "flwr", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def nodes():
    return json.loads(flwr("supernode", "list", "lab", "--format=json"))["nodes"]


def healthy(port, trust):
    try:
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/health", context=trust) as answer:
            return answer.status == 200
    except OSError:
        return False


def free_ports(number):
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
