"""Random generators named by a seed and a purpose, so that nothing draws from a global one.

A step's generator depends on (seed, purpose, step) alone. A resumed run therefore needs no saved random state, and
two purposes never share a stream.
"""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for ``purpose`` under ``seed``; equal arguments give equal seeds on every machine."""
    # NumPy's integers and strings print differently from one version to the next: take the plain ones.
    plain = [str(part) if isinstance(part, str) else int(part) for part in purpose]
    digest = hashlib.blake2b(repr((int(seed), *plain)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a fresh generator for ``purpose`` under ``seed``.

    It lives on the CPU: what is drawn is the same on every device, and moves there without waiting for it.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
