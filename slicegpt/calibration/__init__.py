"""Text in, token batches out: where documents come from and how calibration samples are drawn from them."""

from slicegpt.calibration.batches import CalibrationBatch, calibration_hash, sample_batches
from slicegpt.calibration.coverage import calibration_warnings, coverage
from slicegpt.calibration.documents import load_documents
from slicegpt.calibration.mixture import Calibration, Source, load_sources, parse_sources, sample_sources
from slicegpt.calibration.tokens import encode_text

__all__ = [
    "Calibration",
    "CalibrationBatch",
    "Source",
    "calibration_hash",
    "calibration_warnings",
    "coverage",
    "encode_text",
    "load_documents",
    "load_sources",
    "parse_sources",
    "sample_batches",
    "sample_sources",
]
