"""SliceGPT: compress language models by deleting rows and columns (Ashkboos et al., ICLR 2024)."""

__version__ = "0.1.0"
