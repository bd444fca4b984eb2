"""Text in, token batches out: where documents come from and how calibration samples are drawn from them.

Documents are read without torch, so that a file that is not there is told at once.
"""

from typing import TYPE_CHECKING

from slicegpt.lazy import lazy_exports

if TYPE_CHECKING:
    from slicegpt.calibration.batches import CalibrationBatch, calibration_hash, sample_batches
    from slicegpt.calibration.documents import check_documents, load_documents
    from slicegpt.calibration.files import has_columns
    from slicegpt.calibration.mixture import (
        Calibration,
        Source,
        check_sources,
        load_sources,
        parse_sources,
        sample_sources,
    )
    from slicegpt.calibration.token_coverage import calibration_warnings, coverage
    from slicegpt.calibration.tokens import check_fits, encode_text

__all__ = [
    "Calibration",
    "CalibrationBatch",
    "Source",
    "calibration_hash",
    "calibration_warnings",
    "check_documents",
    "check_fits",
    "check_sources",
    "coverage",
    "encode_text",
    "has_columns",
    "load_documents",
    "load_sources",
    "parse_sources",
    "sample_batches",
    "sample_sources",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Calibration": "slicegpt.calibration.mixture",
        "CalibrationBatch": "slicegpt.calibration.batches",
        "Source": "slicegpt.calibration.mixture",
        "calibration_hash": "slicegpt.calibration.batches",
        "calibration_warnings": "slicegpt.calibration.token_coverage",
        "check_documents": "slicegpt.calibration.documents",
        "check_fits": "slicegpt.calibration.tokens",
        "check_sources": "slicegpt.calibration.mixture",
        "coverage": "slicegpt.calibration.token_coverage",
        "encode_text": "slicegpt.calibration.tokens",
        "has_columns": "slicegpt.calibration.files",
        "load_documents": "slicegpt.calibration.documents",
        "load_sources": "slicegpt.calibration.mixture",
        "parse_sources": "slicegpt.calibration.mixture",
        "sample_batches": "slicegpt.calibration.batches",
        "sample_sources": "slicegpt.calibration.mixture",
    },
)
