"""A name and a home for whoever has none, as in a container: the libraries ask for them, and would otherwise stop."""

import contextlib
import getpass
import os
import tempfile

_home: tempfile.TemporaryDirectory | None = None  # goes when this process ends


def settle() -> None:
    """Give this process, and what it starts, a user's name and a home that it may write to, where it has none.

    torch asks for the name, for its cache of what it compiles, whenever it trains; Jupyter and matplotlib for the home.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a number without an entry among the users; OSError from Python 3.13 on
        os.environ["USER"] = f"user-{os.getuid()}" if hasattr(os, "getuid") else "user"
    home = os.path.expanduser("~")
    if home == "~" or not os.path.isdir(home) or not os.access(home, os.W_OK | os.X_OK):
        global _home
        with contextlib.suppress(OSError):  # no folder for temporary files either: who needs one will say so
            _home = _home or tempfile.TemporaryDirectory(prefix="bagssl-home-")
            os.environ["HOME"] = _home.name
