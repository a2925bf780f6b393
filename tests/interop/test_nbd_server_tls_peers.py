"""Our NBD server with TLS and the clients of QEMU and libnbd: who is let in, and who is not, on either side."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest

from lamina.cli.personality import personality
from lamina.filters.delay import Delay
from lamina.image import Image
from lamina.limits import KIB, MIB
from lamina.nbd import Export, Server
from lamina.nbd.access_rules import AccessRules
from lamina.nbd.tls import allow_list, server_context
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from tests.certificates import CLIENT_SUBJECT, write_certificates
from tests.conftest import NbdTools, Qemu
from tests.nbd_load import Disk, disks, exports_of, nothing_left, until
from tests.nbd_peers import running

#: Disks that are played through everything, the fine and the coarse one; plain connections play them all.
CLIENTS = ("qemu7", "qemu10", "nbd_tools", "nbd_tools_new")


class Pki(NamedTuple):
    """Folders of certificates. `bare`: the authority alone. `stranger`: of another authority, `impostor`: a client whose
    certificate another authority signed, which trusts ours."""

    good: Path
    bare: Path
    stranger: Path
    impostor: Path


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    root = tmp_path_factory.mktemp("pki")
    good, stranger = write_certificates(root / "good"), write_certificates(root / "stranger")
    bare, impostor = root / "bare", root / "impostor"
    for folder in (bare, impostor):
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes((good / "ca-cert.pem").read_bytes())
    for name in ("client-cert.pem", "client-key.pem"):
        (impostor / name).write_bytes((stranger / name).read_bytes())
        (impostor / name).chmod(0o600)
    return Pki(good, bare, stranger, impostor)


@contextmanager
def guarded(
    folder: Path, certificates: Path, *, verify: bool = False, allow: Sequence[str] | None = None, tls: str = "require"
) -> Iterator[tuple[Server, dict[str, Disk]]]:
    with (
        nothing_left(),
        disks(folder) as found,
        Server(
            exports_of(found),
            unix=str(folder / "socket"),
            host="127.0.0.1",
            port=0,
            tls=tls,
            context=server_context(certificates, verify_peer=verify),
            allow=None if allow is None else allow_list(allow),
        ) as server,
    ):
        yield server, found


class Client(NamedTuple):
    """How one of the peers copies an export into a file, with a folder of certificates."""

    name: str
    copy: Callable[[Server, str, Path, Path], CompletedProcess[str]]


def port_of(server: Server) -> str:
    return server.uris[1].rpartition("/")[0].rpartition(":")[2]


def qemu_target(server: Server, export: str, certificates: Path, *, host: str = "localhost") -> list[str]:
    """The words that make QEMU's programs open an export under TLS."""
    return [
        "--object",
        f"tls-creds-x509,id=t,dir={certificates},endpoint=client",
        "--image-opts",
        f"driver=nbd,export={export},server.type=inet,server.host={host},server.port={port_of(server)},tls-creds=t",
    ]


def libnbd_uri(server: Server, export: str, certificates: Path) -> str:
    return f"nbds://localhost:{port_of(server)}/{export}?tls-certificates={certificates}"


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    peer: Qemu | NbdTools = request.getfixturevalue(request.param)
    if isinstance(peer, Qemu):

        def with_qemu(server: Server, export: str, certificates: Path, to: Path) -> CompletedProcess[str]:
            words = qemu_target(server, export, certificates)
            return peer.img("convert", *words[:3], "-O", "raw", words[3], to, check=False)

        return Client(request.param, with_qemu)

    def with_libnbd(server: Server, export: str, certificates: Path, to: Path) -> CompletedProcess[str]:
        words = ("--connections=2", libnbd_uri(server, export, certificates), to)
        return peer.run("nbdcopy", *words, check=False)

    return Client(request.param, with_libnbd)


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the server logged so far."""
    caplog.set_level(logging.INFO, "lamina.nbd")
    return lambda: [record.getMessage() for record in caplog.records]


def is_refused(done: CompletedProcess[str], server: Server) -> None:
    """The client failed, and no export was opened for it, nor anything asked of one."""
    assert done.returncode, f"{done.args} was let in"
    stats = server.stats()
    assert not [name for name in ("READ", "BLOCK_STATUS") if stats.get(name)], stats


@pytest.mark.parametrize("verify", [False, True], ids=["x509", "x509-of-both"])
def test_every_disk_under_tls(
    client: Client, pki: Pki, verify: bool, tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    certificates = pki.good if verify else pki.bare
    with guarded(tmp_path, pki.good, verify=verify, allow=[CLIENT_SUBJECT] if verify else None) as (server, found):
        for name, disk in found.items():
            done = client.copy(server, name, certificates, tmp_path / "copy")
            assert not done.returncode, done.stderr
            assert (tmp_path / "copy").read_bytes() == disk.seen()
        opened = [line for line in told() if " opened " in line]
        manner = "extended headers" if client.name in ("qemu10", "nbd_tools_new") else "structured replies"
        assert opened
        assert all(f"(TLS, {manner})" in line for line in opened)


def test_a_server_of_another_authority_is_refused_by_the_client(client: Client, pki: Pki, tmp_path: Path) -> None:
    with guarded(tmp_path, pki.stranger) as (server, _):
        is_refused(client.copy(server, "raw", pki.good, tmp_path / "copy"), server)


def test_a_certificate_for_another_host_is_refused_by_the_client(client: Client, pki: Pki, tmp_path: Path) -> None:
    elsewhere = write_certificates(tmp_path / "elsewhere", server_names=("DNS:elsewhere.example",), authority=pki.good)
    with guarded(tmp_path, elsewhere) as (server, _):
        is_refused(client.copy(server, "raw", pki.good, tmp_path / "copy"), server)


@pytest.mark.parametrize("who", ["bare", "impostor"])
def test_a_client_without_a_good_certificate_is_refused(
    client: Client, pki: Pki, who: str, tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    with guarded(tmp_path, pki.good, verify=True) as (server, found):
        is_refused(client.copy(server, "raw", getattr(pki, who), tmp_path / "copy"), server)
        assert not [line for line in told() if " opened " in line]
        assert not client.copy(server, "raw", pki.good, tmp_path / "copy").returncode
        assert (tmp_path / "copy").read_bytes() == found["raw"].content


def test_a_client_that_is_not_on_the_list_is_refused(
    client: Client, pki: Pki, tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    """Its certificate is good, and its name begins like one on the list (CVE-2013-6410)."""
    with guarded(tmp_path, pki.good, verify=True, allow=[CLIENT_SUBJECT + "X", "dns:client.example.org"]) as (
        server,
        _,
    ):
        is_refused(client.copy(server, "raw", pki.good, tmp_path / "copy"), server)
        until(lambda: any("not on the list" in line for line in told()), "the server does not say why")
        assert not [line for line in told() if " opened " in line]


def test_a_client_in_the_clear_is_refused(qemu: Qemu, libnbd: NbdTools, pki: Pki, tmp_path: Path) -> None:
    """And is told nothing, neither names nor their number."""
    with guarded(tmp_path, pki.good) as (server, _):
        for uri in (f"nbd://localhost:{port_of(server)}/raw", f"nbd+unix:///raw?socket={tmp_path}/socket"):
            is_refused(qemu.img("info", uri, check=False), server)
            is_refused(libnbd.run("nbdinfo", "--json", uri, check=False), server)
            listed = libnbd.run("nbdinfo", "--list", uri, check=False)
            is_refused(listed, server)
            assert "chain" not in listed.stdout + listed.stderr


def test_optional_tls_serves_both(qemu: Qemu, pki: Pki, tmp_path: Path, told: Callable[[], list[str]]) -> None:
    with guarded(tmp_path, pki.good, tls="allow") as (server, _):
        qemu.img("info", *qemu_target(server, "raw", pki.bare))
        qemu.img("info", f"nbd://localhost:{port_of(server)}/raw")
        opened = [line for line in told() if " opened " in line]
        assert ["TLS" in line for line in opened] == [True, False]


def test_writes_and_patterns_under_tls(qemu: Qemu, pki: Pki, tmp_path: Path) -> None:
    with guarded(tmp_path, pki.good, verify=True, allow=["dns:client.example"]) as (server, found):
        commands = ["write -P 0x41 1000 3M", "write -z 64k 512", "flush", "read -P 0x41 1M 1M", "read -P 0 64k 512"]
        words = [word for command in commands for word in ("-c", command)]
        done = qemu.io(*words, *qemu_target(server, "chain", pki.good))
        assert "verification failed" not in done.stdout
        now = found["chain"].now()
        assert now[1000 : 1000 + (3 << 20)] == b"A" * 64536 + bytes(512) + b"A" * ((3 << 20) - 65048)


def test_fio_verifies_under_tls(nbd_tools: NbdTools, pki: Pki, tmp_path: Path) -> None:
    """fio lets no URI name a folder of certificates, so nbdkit speaks TLS for it."""
    words = "--ioengine=nbd --rw=randwrite --bs=4k --iodepth=16 --size=4m --verify=crc32c --verify_fatal=1"
    fio = f"{nbd_tools.path('fio')} --name=verify {words} --verify_state_save=0 --aux-path={tmp_path} --output-format=json"
    with guarded(tmp_path, pki.good, verify=True) as (server, _):
        place = (f"uri=nbds://localhost:{port_of(server)}/qcow2", f"tls-certificates={pki.good}")
        done = nbd_tools.run("nbdkit", "-U", "-", "nbd", *place, "--run", f"{fio} --uri=$uri")
        assert json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["error"] == 0
        assert server.stats()["bytes_written"] == 4 << 20


def test_libnbd_over_a_unix_socket_under_tls(libnbd: NbdTools, pki: Pki, tmp_path: Path) -> None:
    """Nothing in such a URI names a host, so libnbd is told the name that the certificate must have, or checks none."""
    with guarded(tmp_path, pki.good, verify=True) as (server, found):
        uri = f"nbds+unix:///raw?socket={tmp_path}/socket&tls-certificates={pki.good}&tls-verify-peer=false"
        told = json.loads(libnbd.run("nbdinfo", "--json", uri).stdout)
        assert told["TLS"] is True
        libnbd.run("nbdcopy", uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == found["raw"].content
        assert server.uris[0].startswith("nbds+unix:///raw?socket=")


def test_nbd_client_lists_under_tls(nbd_tools: NbdTools, pki: Pki, tmp_path: Path) -> None:
    with guarded(tmp_path, pki.good, verify=True) as (server, _):
        keys = ("-certfile", "client-cert.pem"), ("-keyfile", "client-key.pem"), ("-cacertfile", "ca-cert.pem")
        words = [word for option, name in keys for word in (option, str(pki.good / name))]
        where = ("-l", "localhost", port_of(server))
        assert "chain: the chain disk" in nbd_tools.run("nbd-client", *where, *words).stdout
        is_refused(nbd_tools.run("nbd-client", *where, check=False), server)


def test_replies_of_many_threads_under_tls(libnbd: NbdTools, pki: Pki, tmp_path: Path) -> None:
    """Slow storage is read by the pool, whose threads send while requests are received: what they have encrypted and not
    yet sent is not what TLS itself wants to say, and no reason to put the client out."""
    content = random.Random(1).randbytes(MIB) * 32
    storage = MemoryStorage(len(content))
    storage.write(0, memoryview(content))
    with (
        nothing_left(),
        Image(Delay(Child(storage, "image"), read_ms=2)) as image,
        Server(
            [Export(image, "slow")], host="127.0.0.1", port=0, tls="require", context=server_context(pki.good)
        ) as server,
    ):
        port = server.uri.rpartition("/")[0].rpartition(":")[2]
        uri = f"nbds://localhost:{port}/slow?tls-certificates={pki.good}"
        for size in (64 * KIB, 256 * KIB, MIB):
            words = ("--connections=1", "--requests=64", f"--request-size={size}", uri, tmp_path / "copy")
            libnbd.run("nbdcopy", *words)
            assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.parametrize(
    ("rules", "admitted"),
    [
        ("authz-simple,id=a,identity=C=DE,,O=Lamina tests,,CN=client", True),
        ("authz-simple,id=a,identity=CN=client,,O=Lamina tests,,C=DE", False),
        ("authz-list,id=a", False),
        ("authz-list,id=a,policy=allow", True),
        ("authz-list,id=a,rules.0.match=C=DE*,rules.0.policy=allow,rules.0.format=glob", True),
        ("authz-list,id=a,rules.0.match=*CN=[c]lient,rules.0.policy=allow,rules.0.format=glob", False),
        ("authz-list,id=a,policy=allow,rules.0.match=*O=Lamina*,rules.0.policy=deny,rules.0.format=glob", False),
    ],
)
def test_rules_admit_whom_qemu_nbd_admits(qemu: Qemu, pki: Pki, rules: str, admitted: bool, tmp_path: Path) -> None:
    """The same objects of a command line, for the peer's server and for ours."""
    credentials = f"tls-creds-x509,id=t,endpoint=server,dir={pki.good},verify-peer=on"
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    words = ["--object", credentials, "--object", rules, "--tls-creds", "t", "--tls-authz", "a"]
    (word,) = [each for each in personality("qemu-nbd", {}).command_line([*words, "disk"]) if "--tls-rules" in each]
    (tmp_path / "ours").mkdir()
    with (
        disks(tmp_path / "ours") as found,
        Server(
            exports_of(found),
            host="127.0.0.1",
            port=0,
            tls="require",
            context=server_context(pki.good, verify_peer=True),
            allow=AccessRules.from_text(word.partition("=")[2]),
        ) as server,
    ):
        port = server.uris[0].rpartition("/")[0].rpartition(":")[2]
        client = f"tls-creds-x509,id=t,dir={pki.good},endpoint=client"
        target = f"driver=nbd,export=raw,server.type=inet,server.host=localhost,server.port={port},tls-creds=t"
        done = qemu.img("info", "--object", client, "--image-opts", target, check=False)
        assert (done.returncode == 0) is admitted, done.stderr
    place = tmp_path / "theirs"
    program = qemu.peer.qemu_img.replace("qemu-img", "qemu-nbd")
    with running([program, *words, "-t", "-r", "-f", "raw", "-k", place, disk], place):
        target = f"driver=nbd,server.type=unix,server.path={place},tls-creds=t,tls-hostname=localhost"
        done = qemu.img("info", "--object", client, "--image-opts", target, check=False)
        assert (done.returncode == 0) is admitted, done.stderr
