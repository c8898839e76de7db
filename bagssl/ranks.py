"""Which of several processes this is, by what their launcher has put into the environment."""

import os


def launched() -> int:
    """How many processes the launcher has started, one without it."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """This one's number among them."""
    return int(os.environ.get("RANK") or 0) if launched() > 1 else 0
