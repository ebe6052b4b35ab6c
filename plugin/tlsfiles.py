"""Certificates as files, for TLS on the swap device's own connection.

    FOLDER/node.pem                                  ours: key, certificate, the CA's (cluster-add)
    FOLDER/ca-cert.pem, client-cert.pem, client-key.pem      what other NBD clients read
    FOLDER/ca-cert.pem, server-cert.pem, server-key.pem      what nbdkit reads
    FILE                                             like node.pem, or the CA's certificate alone

    message(PATH)                 what a relay is told: both texts
    lay_out(FOLDER, TARGET)       nbdkit's three files, made of node.pem

What it is not: a check of names and dates; TLS does that when they are used.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cluster.peeraddress import NODE, PEM_CERTIFICATE
from zcache_core.errors import ConfigError

DEFAULT_FOLDER = "/etc/zcache/tls"
CA, CLIENT, SERVER = "ca-cert.pem", ("client-cert.pem", "client-key.pem"), (
    "server-cert.pem", "server-key.pem",
)  # fmt: skip
PEM_KEY = re.compile(
    r"-----BEGIN (?:\w+ )?PRIVATE KEY-----[A-Za-z0-9+/=\s]+-----END (?:\w+ )?PRIVATE KEY-----",
    re.ASCII,
)
HOW = "'zcache cluster-add NAME' makes one file for each machine"


def message(path: str) -> bytes:
    """What a relay is told first.  Raises ConfigError."""
    own, trusted = own_and_trusted(Path(path))
    return b"C" + own.encode() + b"\0" + trusted.encode() + b"\0"


def own_and_trusted(path: Path) -> tuple[str, str]:
    """(our certificates and key, or nothing; the CA's), as PEM.  Raises ConfigError."""
    if not path.is_dir():
        return _split(path)
    if (path / NODE).exists():
        return _split(path / NODE)
    if not (path / CA).exists():
        raise ConfigError(f"{path} has neither {NODE} nor {CA}; {HOW}")
    own = [_read(path / name) for name in CLIENT if (path / name).exists()]
    if len(own) == 1:
        raise ConfigError(f"{path} has only one of {' and '.join(CLIENT)}; put both there, or none")
    return "\n".join(own), _read(path / CA)


def _split(path: Path) -> tuple[str, str]:
    text = _read(path)
    certificates, key = PEM_CERTIFICATE.findall(text), PEM_KEY.search(text)
    if certificates and key is None:
        return "", "\n".join(certificates)
    if key is None or len(certificates) < 2:
        raise ConfigError(f"{path} does not hold a key, a certificate and the CA's; {HOW}")
    return "\n".join([key[0], *certificates[:-1]]) + "\n", certificates[-1] + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no PEM file"
        raise ConfigError(f"{path} cannot be read ({why}); {HOW}") from None


def lay_out(folder: str, target: Path) -> Path:
    """The folder that nbdkit can read: `folder` itself, or `target`, made of its node.pem.

    Raises ConfigError.
    """
    source = Path(folder)
    if not (source / NODE).exists() and all((source / name).exists() for name in (CA, *SERVER)):
        return source
    own, trusted = _split(source / NODE)
    key = PEM_KEY.search(own)
    assert key is not None
    target.mkdir(mode=0o700, exist_ok=True)
    texts = "\n".join(PEM_CERTIFICATE.findall(own)), key[0], trusted
    for name, text in zip((*SERVER, CA), texts, strict=True):
        _replace(target / name, text + "\n")
    return target


def _replace(path: Path, text: str) -> None:
    """A server that starts meanwhile finds the old file or the new one."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        file.write(text)
    os.replace(new, path)
