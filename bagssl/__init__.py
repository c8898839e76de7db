"""The notebook-first, reproducible companion to the BagSSL paper (Chen et al., TMLR 2023, arXiv 2206.08954)."""

from bagssl.user import settle

__version__ = "0.1.0"

settle()
