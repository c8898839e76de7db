"""The notebook-first, reproducible companion to the BagSSL paper (Chen et al., TMLR 2023, arXiv 2206.08954)."""

from typing import Any

from bagssl.user import settle

__version__ = "0.1.0"

settle()


def load(source: str, device: str = "cpu", **options: Any) -> Any:
    """An encoder in evaluation mode, a torch module: patches [n, 3, s, s] in [0, 1] -> h [n, dim].

    source: a run by its key, name or folder, in the store or in the record of this checkout; or an encoder that others
    trained, with its options, see words.py. Raises InputError, in one line, for what names none, or is damaged.
    """
    from bagssl.evaluation import load_network
    from bagssl.foreign import find

    return load_network(find(source, **options), device)
