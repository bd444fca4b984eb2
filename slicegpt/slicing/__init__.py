"""Slices a dense model boundary by boundary: the only room that knows the order."""

from .driver import slice_model
from .options import SlicingOptions, SlicingReport
from .slicer import build_model

__all__ = ["SlicingOptions", "SlicingReport", "build_model", "slice_model"]
