"""Certificates for tests: an authority, a server and a client, in the folder layout of QEMU, nbdkit and libnbd.

Made with the `openssl` command, which any system with TLS has. Keys are of the curve P-256: making one takes no time.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

SERVER_NAMES = ("DNS:localhost", "DNS:nbd.example", "IP:127.0.0.1", "IP:::1")
CLIENT_NAMES = ("DNS:client.example", "email:client@example.org", "URI:urn:lamina:client", "IP:192.0.2.7")
#: The subject of the client's certificate, as RFC 4514 writes it.
CLIENT_SUBJECT = "CN=client,O=Lamina tests,C=DE"

_CONFIG = """\
[ca]
default_ca = here
[here]
dir = {folder}/ca
database = $dir/index.txt
new_certs_dir = $dir
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
copy_extensions = none
default_crl_days = 3650
[any]
countryName = optional
organizationName = optional
commonName = supplied
[req]
distinguished_name = empty
[empty]
[authority]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
"""


def write_certificates(
    folder: Path,
    *,
    server_names: Sequence[str] = SERVER_NAMES,
    client_names: Sequence[str] = CLIENT_NAMES,
    expired: bool = False,
    authority: Path | None = None,
    client: bool = True,
) -> Path:
    """Write `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, and for a `client` the same, into `folder`; return it.

    Each call makes a new authority, so two folders do not trust one another, unless `authority` names the folder of an
    earlier call, whose authority then signs. `expired`: both certificates ended in 2020. Names are as OpenSSL writes
    alternative names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    signer = folder if authority is None else authority
    if authority is None:
        _make_authority(folder)
    else:
        (folder / "ca-cert.pem").write_bytes((authority / "ca-cert.pem").read_bytes())
    _make_certificate(folder, signer, "server", server_names, "serverAuth", expired)
    if client:
        _make_certificate(folder, signer, "client", client_names, "clientAuth", expired)
    return folder


def revoke(folder: Path, role: str) -> None:
    """Revoke the certificate of `role` ("server" or "client") in a folder that has its own authority: `ca-crl.pem`."""
    _openssl("ca", "-config", folder / "ca.cnf", *_signer(folder), "-revoke", folder / f"{role}-cert.pem")
    _openssl("ca", "-config", folder / "ca.cnf", *_signer(folder), "-gencrl", "-out", folder / "ca-crl.pem")


def _make_authority(folder: Path) -> None:
    (folder / "ca").mkdir()
    (folder / "ca" / "index.txt").touch()
    (folder / "ca.cnf").write_text(_CONFIG.format(folder=folder))
    _make_key(folder / "ca-key.pem")
    subject = ("-subj", "/O=Lamina tests/CN=authority", "-extensions", "authority")
    key, out = folder / "ca-key.pem", folder / "ca-cert.pem"
    _openssl("req", "-config", folder / "ca.cnf", "-new", "-x509", "-days", "3650", "-key", key, *subject, "-out", out)


def _make_certificate(folder: Path, signer: Path, role: str, names: Sequence[str], usage: str, expired: bool) -> None:
    key, request, extensions = (folder / f"{role}{end}" for end in ("-key.pem", ".csr", ".ext"))
    _make_key(key)
    subject = f"/C=DE/O=Lamina tests/CN={role}"
    _openssl("req", "-config", signer / "ca.cnf", "-new", "-key", key, "-subj", subject, "-out", request)
    lines = ["basicConstraints = critical,CA:FALSE", "keyUsage = critical,digitalSignature"]
    lines += [f"extendedKeyUsage = {usage}", *([f"subjectAltName = {','.join(names)}"] if names else [])]
    extensions.write_text("\n".join(lines) + "\n")
    dates = ("20190101000000Z", "20200101000000Z") if expired else ("20200101000000Z", "20491231235959Z")
    period = ("-startdate", dates[0], "-enddate", dates[1], "-batch", "-notext", "-extfile", extensions)
    out = folder / f"{role}-cert.pem"
    _openssl("ca", "-config", signer / "ca.cnf", *_signer(signer), *period, "-in", request, "-out", out)


def _signer(folder: Path) -> tuple[str | Path, ...]:
    return ("-cert", folder / "ca-cert.pem", "-keyfile", folder / "ca-key.pem")


def _make_key(path: Path) -> None:
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)
    os.chmod(path, 0o600)


def _openssl(*words: str | Path) -> None:
    done = subprocess.run(["openssl", *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"openssl {' '.join(map(str, words))}\n{done.stderr}"
