from typing import overload

from zcache_core.memfile import MemoryFile

CIPHER_NAMES: dict[int, str]

class Sealer:
    def __init__(self, memory: MemoryFile, cipher: int = 0, for_peers: bool = False) -> None: ...
    @property
    def cipher(self) -> int: ...
    def seal(self, plain: bytes, copies: int = 1, **about: int) -> bytes: ...
    def open(
        self, sealed: bytes, cipher: int = 0, copies: int = 1, **about: int
    ) -> bytes | None: ...

@overload
def aead(
    cipher: int, key: bytes, nonce: bytes, about: bytes, data: bytes, tag: None = None
) -> tuple[bytes, bytes]: ...
@overload
def aead(
    cipher: int, key: bytes, nonce: bytes, about: bytes, data: bytes, tag: bytes
) -> bytes | None: ...
def time_seal(sealer: Sealer, plain: bytes, rounds: int) -> tuple[float, float]: ...
