"""A user's module with type hints, for an interpreter that has only msgspec."""

import os
import sys


def where(number: int, names: list[str], scale: float = 1.0) -> dict[str, object]:
    """Say where this runs and what came."""
    return {"python": sys.executable, "pid": os.getpid(), "number": number * scale, "names": names}
