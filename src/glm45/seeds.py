"""One root seed, split by purpose, so that no two parts of a run share a random stream."""

import hashlib


def derive_seed(root: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for `purpose` (for example `derive_seed(1, "loader", epoch)`).

    The value depends on nothing but the arguments: not on the process, the rank or the Python hash seed.
    """
    text = "/".join(str(part) for part in (root, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
