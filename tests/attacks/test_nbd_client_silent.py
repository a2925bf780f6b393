"""Servers that fall silent: each command that waits for one ends, with one line that names the export and the right status.

A server here answers honestly until it has said so many bytes, or was asked for the nth time; then it holds the connection,
and neither says nor reads anything any more.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamina.cli.main import main
from lamina.errors import LaminaError
from lamina.nbd import wire
from lamina.nbd.client import Client

from ..nbd_fake_server import Behave, FakeServer, Serve, answer, requests, shake, starting
from ..nbd_scripts import GO, SIZE, STRUCTURED, info_export

#: The long form: silence at every byte, and a trickle instead of silence.
LONG = bool(os.environ.get("LAMINA_HOSTILE_SERVERS"))
#: What an honest server has said when transmission begins.
AGREED = len(STRUCTURED) + len(info_export()) + len(GO)
HEADER = wire.STRUCTURED_REPLY.size

STAGES = {
    "before the greeting": 0,
    "behind the greeting": 18,
    "among the options": len(STRUCTURED) - 7,
    "behind GO": AGREED,
    "in the header of a reply": AGREED + HEADER // 2,
    "in a payload": AGREED + HEADER + 11,
}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with starting(tmp_path) as start:
        yield start


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """What silent servers wait for."""
    event = threading.Event()
    yield event
    event.set()


def silent_after(limit: int, hold: threading.Event, *, trickle: float = 0.0) -> Behave:
    """Honest for the first `limit` bytes. With `trickle` what comes then comes byte by byte, each after so many seconds."""

    def behave(sock: socket.socket, number: int) -> None:
        left = limit

        def send(data: bytes) -> None:
            nonlocal left
            sock.sendall(data[:left])
            rest = data[left:]
            left -= min(len(data), left)
            if rest:
                for byte in rest if trickle else b"":
                    if hold.wait(trickle):
                        return
                    sock.sendall(bytes([byte]))
                hold.wait(60)
                raise ConnectionError

        if not limit:
            hold.wait(60)
            return
        shake(sock, SIZE, send=send)
        disk = bytearray(SIZE)
        for asked in requests(sock):
            send(answer(disk, asked))

    return behave


def deaf(hold: threading.Event, *, reads: int = 0) -> Behave:
    """Agrees to everything and then reads `reads` bytes, and no more."""

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE * 64)
        while reads and sock.recv(reads):
            if hold.wait(0.05):
                return
        hold.wait(60)

    return behave


def ends(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status of the command `argv` and what it says on standard error; it must not hang."""
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(main(argv)), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), f"{argv} hangs"
    return status[0], capsys.readouterr().err


COMMANDS: dict[str, Callable[[str, Path], list[str]]] = {
    "info": lambda uri, folder: ["info", "--timeout", "0.2", uri],
    "info of the export": lambda uri, folder: ["info", "--list", "--content", "--timeout", "0.2", uri],
    "map": lambda uri, folder: ["map", "-f", "raw", "--timeout", "0.2", uri],
    "map of a context": lambda uri, folder: ["map", "--context", "base:allocation", "--timeout=0.2", uri],
    "convert": lambda uri, folder: ["convert", "--timeout", "0.2", "-f", "raw", "-O", "raw", uri, str(folder / "out")],
    "convert to": lambda uri, folder: [
        "convert",
        "-n",
        "--timeout",
        "0.2",
        "-f",
        "raw",
        "-O",
        "raw",
        str(folder / "in"),
        uri,
    ],
    "copy": lambda uri, folder: ["copy", "--reconnect", "0", "--timeout", "0.2", uri, str(folder / "out")],
    "copy to": lambda uri, folder: ["copy", "--reconnect", "0", "--timeout", "0.2", str(folder / "in"), uri],
    "compare": lambda uri, folder: ["compare", "-f", "raw", "-F", "raw", "--timeout", "0.2", uri, str(folder / "in")],
    "check": lambda uri, folder: ["check", "-f", "qcow2", "--timeout", "0.2", uri],
    "io": lambda uri, folder: ["io", "-f", "raw", "--timeout", "0.2", "-c", "read 0 4k", uri],
    "io flush": lambda uri, folder: ["io", "-f", "raw", "--timeout", "0.2", "-c", "write 0 4k", "-c", "flush", uri],
}
#: Exit statuses for an error, where it is not 1.
STATUS = {"compare": 2}


#: All commands agree in the same way: silence before they have is shown with one or two, unless this is the long form.
CASES = [
    (command, stage)
    for command in COMMANDS
    for stage, limit in STAGES.items()
    if LONG or limit >= AGREED or command in ("info", "convert to")
]


@pytest.mark.parametrize(("command", "stage"), CASES)
def test_each_command_ends(
    command: str, stage: str, serve: Serve, hold: threading.Event, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_bytes(b"i" * SIZE)
    limits = [STAGES[stage]]
    if LONG:
        order = list(STAGES.values())
        following = dict(zip(order, [*order[1:], order[-1] + 20], strict=True))
        limits = list(range(STAGES[stage], following[STAGES[stage]], 3))
    for limit in limits:
        for trickle in (0.0, 0.02) if LONG else (0.0,):
            server = serve(silent_after(limit, hold, trickle=trickle))
            status, said = ends(COMMANDS[command](server.uri, tmp_path), capsys)
            if status == 0:
                assert limit > AGREED or command == "copy to", said  # which agrees about less
                assert said == ""
                continue
            assert status == STATUS.get(command, 1), said
            lines = said.splitlines()
            assert len(lines) == 1 or (command == "io flush" and len(lines) == 2), said
            for line in lines:
                assert line.startswith(f"lamina: {server.uri}: "), "the error names the export"
                assert "within 0.2 s" in line
            assert not (tmp_path / "out").exists()


def test_a_server_that_takes_nothing(
    serve: Serve, hold: threading.Event, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The socket is full, and nobody reads there; or a few bytes now and then."""
    (tmp_path / "in").write_bytes(b"i" * (16 << 20))
    for reads in (0, 100):
        uri = serve(deaf(hold, reads=reads)).uri
        for words in (
            ["convert", "-n", "-f", "raw", "-O", "raw", "--timeout", "0.5", str(tmp_path / "in"), uri],
            ["copy", "--timeout", "0.5", "--reconnect", "0", str(tmp_path / "in"), uri],
            ["io", "-f", "raw", "--timeout", "0.5", "-c", "write 0 16M", uri],
        ):
            status, said = ends(words, capsys)
            assert (status, said.count("\n")) == (1, 1), said
            assert "no reply within 0.5 s" in said


def test_a_trickle_is_silence(serve: Serve, hold: threading.Event) -> None:
    """One byte after the other, in a header or in the payload, is no progress."""
    for limit in (AGREED, AGREED + HEADER + 8):
        server = serve(silent_after(limit, hold, trickle=0.01))
        with (
            Client.connect(server.uri, request_timeout=0.3) as client,
            pytest.raises(LaminaError, match="no reply within"),
        ):
            client.read(0, 65536)


def test_what_keeps_moving_ends_too(serve: Serve, hold: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that moves just enough each time is given up when it took many times its limit."""
    from lamina.nbd.client import times

    monkeypatch.setattr(times, "STEP", 64)
    monkeypatch.setattr(times, "_TIMES", 3)

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        reply = answer(bytearray(SIZE), next(requests(sock)))
        for at in range(0, len(reply), 70):
            if hold.wait(0.05):
                return
            sock.sendall(reply[at : at + 70])

    with (
        Client.connect(serve(behave).uri, request_timeout=0.3) as client,
        pytest.raises(LaminaError, match="too slowly"),
    ):
        client.read(0, 65536)


def test_a_slow_flush_is_waited_for_and_so_is_what_stands_behind_it() -> None:
    from lamina.nbd.client.request import Sent
    from lamina.nbd.client.times import Clock, Times

    clock = Clock(Times(0.0, 600.0))
    read, flush = Sent(wire.CMD_READ, 0, 512), Sent(wire.CMD_FLUSH)
    read.begun = flush.begun = time.monotonic()
    assert clock.overdue([read], "uri") is not None
    assert clock.overdue([read, flush], "uri") is None
    assert Times() == (60.0, 600.0, 10.0)
    clock.press()
    assert clock.pressed
    clock.progress()
    assert not clock.pressed


def test_the_time_limit_is_an_option_of_nodes_and_of_uris(serve: Serve, hold: threading.Event) -> None:
    import lamina

    server = serve(silent_after(AGREED, hold))
    for source in ({"driver": "nbd", "uri": server.uri, "timeout": "0.2"}, f"{server.uri}&timeout=0.2"):
        with (
            lamina.open({"driver": "raw", "file": source}) as image,
            pytest.raises(LaminaError, match=r"within 0\.2 s"),
        ):
            image.read(0, 512)


def test_a_close_waits_a_short_time(serve: Serve, hold: threading.Event) -> None:
    """Beside threads that wait: each of them ends, with an error."""
    server = serve(silent_after(AGREED, hold))
    client = Client.connect(server.uri, connections=2)
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(client.read(0, 512))
        except LaminaError as error:
            outcome.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    closer = threading.Thread(target=client.close, daemon=True)
    closer.start()
    for thread in (closer, *threads):
        thread.join(20)
        assert not thread.is_alive()
    assert len(outcome) == 6
    assert all(isinstance(one, LaminaError) for one in outcome)
    # Also where the socket is full.
    client = Client.connect(serve(deaf(hold)).uri)
    pending = threading.Thread(target=lambda: outcome.append(failing_write(client)), daemon=True)
    pending.start()
    pending.join(0.3)
    closer = threading.Thread(target=client.close, daemon=True)
    closer.start()
    for thread in (closer, pending):
        thread.join(20)
        assert not thread.is_alive()


def failing_write(client: Client) -> LaminaError | None:
    try:
        client.write(0, bytes(16 << 20))
    except LaminaError as error:
        return error
    return None


def test_a_close_ends_an_attempt_to_connect_again(serve: Serve, hold: threading.Event) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        if number:
            hold.wait(60)
            return
        shake(sock, SIZE)
        next(requests(sock))

    client = Client.connect(serve(behave).uri, reconnect=1000, handshake_timeout=1000)
    reader = threading.Thread(target=lambda: outcome_of(client), daemon=True)
    reader.start()
    reader.join(0.5)
    assert reader.is_alive()
    closer = threading.Thread(target=client.close, daemon=True)
    closer.start()
    for thread in (closer, reader):
        thread.join(20)
        assert not thread.is_alive()


def outcome_of(client: Client) -> None:
    with pytest.raises(LaminaError):
        client.read(0, 512)


def test_lost_connections_are_made_anew_with_pauses(serve: Serve) -> None:
    """A server that accepts, agrees, and drops the first request is not asked thousands of times."""

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for _ in requests(sock):
            return

    server = serve(behave)
    with Client.connect(server.uri, reconnect=1.5) as client, pytest.raises(LaminaError):
        client.read(0, 512)
    assert 3 <= server.connections <= 12


def test_what_is_no_socket_is_called_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    for name, words in {
        "file": "regular file, and no socket",
        "folder": "directory, and no socket",
        "pipe": "named pipe, and no socket",
        "dead": "nobody listens",
        "none": "No such file",
    }.items():
        uri = f"nbd+unix:///x?socket={tmp_path / name}"
        status, said = ends(["info", uri], capsys)
        assert (status, said.count("\n")) == (1, 1)
        assert uri in said
        assert words in said


def test_a_socket_whose_queue_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody accepts: that ends, too."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(0)
        waiting = socket.socket(socket.AF_UNIX)
        with waiting:
            waiting.connect(str(tmp_path / "socket"))
            uri = f"nbd+unix:///x?socket={tmp_path / 'socket'}"
            status, said = ends(["info", "--timeout", "0.2", uri], capsys)
            assert (status, said.count("\n")) == (1, 1)
            assert uri in said


def test_a_child_does_not_speak_on_the_connection_of_its_parent(tmp_path: Path) -> None:
    """It refuses requests, and its close tells the server nothing."""

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            sock.sendall(answer(bytearray(b"d" * SIZE), asked))

    with FakeServer(tmp_path / "socket", behave) as server, Client.connect(server.uri) as client:
        assert client.read(0, 4) == b"dddd"
        child = os.fork()
        if not child:
            status = 3
            try:
                try:
                    client.read(0, 4)
                except LaminaError as error:
                    status = 0 if "process" in str(error) else 4
                client.close()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.read(5, 4) == b"dddd"
