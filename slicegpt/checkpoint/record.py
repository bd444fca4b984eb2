"""What `slicing.json` says of a sliced model: sizes, spectra, calibration, versions, times."""

import datetime
import math
import platform
from collections.abc import Sequence

import torch
import transformers
from transformers import PreTrainedConfig

import slicegpt
from slicegpt.calibration import CalibrationBatch, calibration_hash
from slicegpt.checkpoint.outcome import perplexity_record
from slicegpt.conversion.quantization import describe_storage
from slicegpt.conversion.stock import stock_parameters
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import boundary_report, decoder_parameters, stored_bytes, stored_parameters
from slicegpt.recipe import SLICED, STOCK
from slicegpt.slicing import SlicingOptions, SlicingReport


def size_record(config: SlicedConfig, dtype: torch.dtype, stock: PreTrainedConfig | None = None) -> dict:
    """Stored elements and bytes against the dense model's, in the same dtype.

    Args:
        stock: the dense model's config, where the sliced one is stored in the stock form.
    """
    parameters, dense = stored_parameters(config), config.source_parameters
    if stock is not None:
        parameters = stock_parameters(config, stock)
    return {
        "parameters": parameters,
        "bytes": stored_bytes(config, dtype) if stock is None else parameters * dtype.itemsize,
        "dense_parameters": dense,
        "dense_bytes": dense * dtype.itemsize,
        "decoder_parameters": decoder_parameters(config),
        "removed": 1 - parameters / dense,
    }


def slicing_fraction(config: SlicedConfig) -> float:
    """`1 - d / D`, the mean over the boundaries before a block: "slicing" as the paper counts it."""
    widths = config.boundary_widths[:-1]
    return 1 - math.fsum(widths) / len(widths) / config.dense_hidden_size


def versions() -> dict[str, str]:
    return {
        "slicegpt": slicegpt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def calibration_record(
    source: str, nsamples: int, seqlen: int, seed: int, batches: Sequence[CalibrationBatch], **more
) -> dict:
    """Where the calibration tokens came from, and their hash; `more` as it is: sources, coverage, warnings."""
    sha256 = calibration_hash(batches)
    return {"source": source, "nsamples": nsamples, "seqlen": seqlen, "seed": seed, "sha256": sha256, **more}


def slicing_record(
    config: SlicedConfig,
    report: SlicingReport,
    options: SlicingOptions,
    source: str,
    calibration: dict,
    asked: dict | None = None,
    tokens_per_second: dict | None = None,
    stock: PreTrainedConfig | None = None,
) -> dict:
    """The record of one slicing run.

    Args:
        config: the sliced model's.
        source: the dense model's name.
        calibration: its `calibration_record`.
        asked: the size that was asked for (`slicegpt.checkpoint.outcome.asked_record`).
        tokens_per_second: `slicegpt.runtime.speed.compare_speed`; None: not measured.
        stock: see `size_record`.

    Eigenvalues keep six digits: they are for looking at, and full precision would be megabytes.
    """
    dtype = str(options.dtype).removeprefix("torch.")
    spectra = [
        None if values is None else [float(f"{value:.6g}") for value in values]
        for values in report.eigenvalues
    ]
    return {
        "source": source,
        "form": SLICED if stock is None else STOCK,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "dtype": dtype,
        "stored_as": describe_storage(config, dtype),
        "dense_width": config.dense_hidden_size,
        "neurons": config.layer_neurons or config.intermediate_size,
        "dense_neurons": config.dense_intermediate_size,
        "key_value_heads": config.layer_key_value_heads or config.num_key_value_heads,
        "dense_key_value_heads": config.num_key_value_heads,
        "query_heads": config.num_attention_heads if config.keeps_all_heads else config.attention_heads,
        "dense_query_heads": config.num_attention_heads,
        "slicing": slicing_fraction(config),
        "orientation": options.orientation,
        "signal": options.signal,
        "vocabulary_prior": options.vocabulary_prior,
        "refit": [
            {
                name: float(f"{value:.6g}") if isinstance(value, float) else value
                for name, value in entry.items()
            }
            for entry in report.refit
        ],
        "ridge_search": report.ridge_search,
        "plans": report.plans,
        "size": size_record(config, options.dtype, stock),
        "asked": asked or {},
        "perplexity": perplexity_record(calibration.get("held_out")),
        "tokens_per_second": tokens_per_second,
        "boundaries": boundary_report(config),
        "calibration": calibration | {"tokens": report.tokens},
        "seconds": {name: round(value, 3) for name, value in report.seconds.items()},
        "eigenvalues": spectra,
    }
