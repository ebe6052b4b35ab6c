"""A cluster's certificates: one CA, one file for each node.

    cluster-init FOLDER          ca.pem, ca.key (0600; needed only to add nodes)
    cluster-add NAME             FOLDER/NAME/node.pem (0600): key, certificate, the CA's certificate
    joining                      copy that one file into a folder of the new machine: tls=FOLDER

A node's certificate says its name and that it may be either side of a connection.  Who has
one that this CA signed and that has not expired is a member; there is no other list.  A node that
must not come back: make a new CA (a list of revoked ones is not read).

ECDSA with P-256: what every TLS 1.3 has, and a signature takes 0.1 ms.

What it is not: imported where nobody makes or names certificates; TLS itself is the standard
library's (`peersocket`).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from zcache_core.errors import ConfigError

CA_CERTIFICATE, CA_KEY, NODE = "ca.pem", "ca.key", "node.pem"
CA_DAYS, NODE_DAYS = 3650, 825
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}"
HOST_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}"
CLOCKS_APART = datetime.timedelta(hours=1)  # of two machines of a cluster

Key = ec.EllipticCurvePrivateKey


def init(folder: Path) -> Path:
    """A new CA in `folder`, which is made; its certificate's path.  Raises ConfigError."""
    certificate = folder / CA_CERTIFICATE
    if (folder / CA_KEY).exists() and not certificate.exists():
        raise ConfigError(
            f"{folder} has a CA's key without its certificate, of a 'cluster-init' that was "
            f"interrupted; remove {folder / CA_KEY}, and do it again"
        )
    if certificate.exists():
        _refuse_without_key(folder)
        raise ConfigError(
            f"{folder} has a CA already; go on with 'zcache cluster-add NAME', or choose another "
            f"folder: a new CA would turn every node of this one away"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = certificate.with_name(f"{CA_CERTIFICATE}.new")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "zcache cluster")])
    made = (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_private(folder / CA_KEY, _private_bytes(key))
    new.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    os.replace(new, certificate)  # whole, or not there
    return certificate


def add(folder: Path, name: str, days: int = NODE_DAYS, addresses: Sequence[str] = ()) -> Path:
    """The one file of a new node: FOLDER/NAME/node.pem.  Raises ConfigError.

    addresses: other names, and IP addresses, by which an NBD client may attach its device.
    """
    if not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise ConfigError(
            f"{name!r} is no name of a node; write up to 48 letters, digits, dots, dashes and "
            f"underscores, a letter or digit first"
        )
    ca, ca_key = _read_ca(folder)
    path = folder / name / NODE
    if path.exists():
        raise ConfigError(f"{path} exists; remove it first to give {name} a new certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        _builder(subject, ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(_names([name, *addresses]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path.parent.mkdir(mode=0o700, exist_ok=True)
    _write_private(path, _private_bytes(key) + made.public_bytes(pem) + ca.public_bytes(pem))
    return path


def _names(texts: Sequence[str]) -> x509.SubjectAlternativeName:
    """What a client that compares names may find: RFC 6125 looks here, and not at the subject."""
    found: list[x509.GeneralName] = []
    for text in dict.fromkeys(texts):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(text)))
        except ValueError:
            if not re.fullmatch(HOST_PATTERN, text, re.ASCII):
                raise ConfigError(
                    f"{text!r} is no address of a machine; write an IP address, or a host's name"
                ) from None
            found.append(x509.DNSName(text))
    return x509.SubjectAlternativeName(found)


def name_in(folder: Path) -> str:
    """The name in a node's file, which is its name in the cluster.  Raises ConfigError."""
    try:
        certificate = x509.load_pem_x509_certificates((folder / NODE).read_bytes())[0]
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(
            f"tls={folder} has no {NODE} that can be read ({error}); 'zcache cluster-add NAME' "
            f"makes one"
        ) from None
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _refuse_without_key(folder: Path) -> None:
    if not (folder / CA_KEY).exists():
        raise ConfigError(
            f"{folder} has a CA's certificate without its key; bring {folder / CA_KEY} back, or "
            f"choose another folder for a new CA, which gives every node a new {NODE}"
        )


def _read_ca(folder: Path) -> tuple[x509.Certificate, Key]:
    if (folder / CA_CERTIFICATE).exists():
        _refuse_without_key(folder)
    try:
        ca = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
        key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} has no CA that can be read ({error}); make one with "
            f"'zcache cluster-init {folder}'"
        ) from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return ca, key


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    """What all of them have; `days` from now, negative: expired that long ago."""
    now = datetime.datetime.now(datetime.UTC)
    begin = min(now - CLOCKS_APART, now + datetime.timedelta(days=days - 1))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
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


def _private_bytes(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_private(path: Path, data: bytes) -> None:
    """A file that nobody else may read, from its first byte on."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
