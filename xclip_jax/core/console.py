"""Output for the user of a command."""

import jax

from xclip_jax.core.addresses import public


def log0(message: str) -> None:
    """Print to standard output from the first process alone, addresses as `addresses.public` shows them."""
    if jax.process_index() == 0:
        print(public(message), flush=True)


def format_duration(seconds: float) -> str:
    """Return "1:02:03" or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_bytes(n: float) -> str:
    """Return "1.50 GiB", "3.00 MiB", "2.00 KiB" or "12 B"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"
