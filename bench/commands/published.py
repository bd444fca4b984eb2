"""The published figures that `reproduce` compares predictions with (SliceGPT paper, arXiv 2401.15024)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenTime:
    """Table 2: milliseconds per token, batch 1, 128 tokens, float16, and the number of GPUs."""

    model: str
    device: str
    slice: float
    gpus: int
    milliseconds: float


@dataclass(frozen=True)
class Throughput:
    """The throughput table: tokens/s at sequence length 128 on H100 80 GB, and the number of GPUs and the batch."""

    model: str
    slice: float
    gpus: int
    batch: int
    tokens_per_second: float


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of the matrix products of one layer, without shortcuts, 2048 tokens, float16, A100.

    Attributes:
        sparse: half of the weights are deleted in the 2:4 pattern, instead of columns.
    """

    model: str
    slice: float
    milliseconds: float
    sparse: bool = False


@dataclass(frozen=True)
class SlicingTime:
    """Minutes that slicing took on one H100 80 GB."""

    model: str
    minutes: float


TOKEN_TIMES = (
    TokenTime("opt-66b", "A100 40GB", 0.0, 4, 114),
    TokenTime("opt-66b", "A100 40GB", 0.25, 3, 102),
    TokenTime("llama-2-70b", "A100 40GB", 0.0, 4, 125),
    TokenTime("llama-2-70b", "A100 40GB", 0.25, 3, 110),
    TokenTime("opt-66b", "Quadro RTX 6000", 0.0, 6, 237),
    TokenTime("opt-66b", "Quadro RTX 6000", 0.25, 5, 204),
    TokenTime("llama-2-70b", "Quadro RTX 6000", 0.0, 7, 252),
    TokenTime("llama-2-70b", "Quadro RTX 6000", 0.25, 5, 215),
)

THROUGHPUT_DEVICE = "H100 SXM"
THROUGHPUTS = (
    Throughput("opt-13b", 0.0, 1, 512, 2518),
    Throughput("opt-13b", 0.25, 1, 512, 2846),
    Throughput("opt-13b", 0.5, 1, 512, 3071),
    Throughput("opt-66b", 0.0, 2, 16, 141),
    Throughput("opt-66b", 0.25, 2, 16, 152),
    Throughput("opt-66b", 0.5, 1, 32, 441),
    Throughput("llama-2-13b", 0.0, 1, 512, 2707),
    Throughput("llama-2-13b", 0.25, 1, 512, 2878),
    Throughput("llama-2-13b", 0.5, 1, 512, 3122),
    Throughput("llama-2-70b", 0.0, 2, 128, 541),
    Throughput("llama-2-70b", 0.25, 2, 256, 839),
    Throughput("llama-2-70b", 0.5, 1, 128, 1014),
)

LAYER_DEVICE = "A100 80GB"  # either A100: the products are compute-bound, and both have the same peak
LAYER_TOKENS = 2048
LAYER_TIMES = (
    LayerTime("llama-2-7b", 0.0, 3.99),
    LayerTime("llama-2-7b", 0.0, 2.70, sparse=True),
    LayerTime("llama-2-7b", 0.25, 2.99),
    LayerTime("llama-2-7b", 0.5, 2.06),
)

SLICING_DEVICE = "H100 SXM"
SLICING_TIMES = (
    SlicingTime("llama-2-7b", 44),
    SlicingTime("llama-2-13b", 68),
    SlicingTime("llama-2-70b", 211),
)
