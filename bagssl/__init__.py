"""bagssl: the notebook-first, reproducible companion to "Bag of Image Patch Embedding Behind the Success of
Self-Supervised Learning" (Chen, Bardes, Li, LeCun; TMLR 2023; arXiv 2206.08954)."""

__version__ = "0.1.0"
