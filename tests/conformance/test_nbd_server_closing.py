"""An image that is closed beside the requests of its clients: what was acknowledged is there, and the rest is refused."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import lamina
from lamina.limits import KIB, MIB
from lamina.nbd import Export, Server
from lamina.nbd import wire as w

from ..nbd_load import nothing_left
from ..nbd_raw import PATIENCE, Gone, dial

ROUNDS = 20 if "LAMINA_HOSTILE_CLIENTS" not in os.environ else 500


@pytest.mark.parametrize("how", ["the image first", "the server first"])
def test_what_was_acknowledged_is_there(tmp_path: Path, how: str) -> None:
    for number in range(ROUNDS):
        path = tmp_path / f"disk{number}"
        lamina.create(path, "qcow2", MIB, cluster_size=4 * KIB)
        image = lamina.open(path, format="qcow2", read_only=False)
        written: list[int] = []
        begun = threading.Event()
        with nothing_left():
            server = Server([Export(image, "disk", writable=True)], unix=str(tmp_path / "socket")).start()

            def write(server: Server = server, written: list[int] = written, begun: threading.Event = begun) -> None:
                with suppress(Gone), dial(tmp_path / "socket") as raw:
                    raw.begin("disk")
                    for offset in range(0, MIB, 4 * KIB):
                        reply = raw.write(offset, b"w" * 4 * KIB)
                        if reply.error:
                            assert reply.error in (w.EIO, w.ESHUTDOWN)
                            return
                        written.append(offset)
                        begun.set()

            thread = threading.Thread(target=write)
            thread.start()
            assert begun.wait(PATIENCE)
            first, second = (image.close, server.close) if how == "the image first" else (server.close, image.close)
            first()
            other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT | os.O_TRUNC)  # the number is free again
            try:
                second()
                thread.join(PATIENCE)
                assert not thread.is_alive()
                assert os.fstat(other).st_size == 0
            finally:
                os.close(other)
        with lamina.open(path, format="qcow2") as again:
            for offset in written:
                assert again.read(offset, 4 * KIB) == b"w" * 4 * KIB
        path.unlink()
