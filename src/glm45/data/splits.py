"""The one division of prompts into training and held-out, by hash."""

import hashlib

HELD_OUT_FRACTION = 0.05
"""Share of prompts that is never trained on. Not in the report."""


def is_held_out(prompt: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Say whether `prompt` belongs to the held-out share.

    Depends on nothing but the text, so that data building, training environments and evaluation agree without
    exchanging lists, and a prompt generated twice lands on one side. A larger fraction holds out a superset. Leading
    and trailing white space does not count.

    Raises ValueError for a fraction outside 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"held-out fraction {fraction}: it must lie between 0 and 1")
    digest = hashlib.blake2b(prompt.strip().encode("utf-8", "surrogatepass"), digest_size=8, person=b"glm45.heldout")
    return int.from_bytes(digest.digest(), "big") < fraction * 2**64
