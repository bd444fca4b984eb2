"""Slices a dense model boundary by boundary: the only room that knows the order."""

from .driver import slice_model
from .options import SlicingOptions, SlicingReport

__all__ = ["SlicingOptions", "SlicingReport", "slice_model"]
