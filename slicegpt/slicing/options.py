"""How to slice, and what slicing saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from slicegpt.conversion.quantization import WeightFormat
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.ranks import Ranks
from slicegpt.recipe import ALLOCATIONS, AUTO, OBJECTIVE, ORIENTATIONS, SIGNALS, Recipe
from slicegpt.recipe_rules import allocation
from slicegpt.slicing.streams import STORAGES
from slicegpt.step_times import StepTimes


@dataclass(frozen=True)
class SlicingOptions:
    """How to slice; the widths and shortcuts are in the planned `SlicedConfig`.

    Attributes:
        dtype: of the stored weights and of the calibration passes.
        device: where blocks run and eigenvectors are computed, one layer's weights at a time.
        orientation: "aligned" (needed for compact shortcuts), "random" or "pca": the basis inside each subspace.
        signal: "residual" or "normalized": what the covariance is taken of.
        activation_storage: where the streams of the calibration tokens are kept between blocks: "device", "host",
            "disk", or "auto", see `slicegpt.slicing.streams.choose_storage`.
        scratch: the folder of what is kept on the disk meanwhile; None: that of temporary files.
        seed: of the random orientation.
        vocabulary_prior: the embedding's basis is chosen from the calibration tokens and, this much beside them,
            from the whole vocabulary, so that tokens which the text never shows keep their embeddings.
        refit: every block's output weights are fitted to the dense model's stream, see `slicegpt.slicing.objective`.
        ridge: its λ; None: of `Objective.ridges` the one that loses least on held-out windows.
        allocate: where a config deletes the same number of neurons everywhere, each layer gives up as many as its
            costs call for: by "prices" (`slicegpt.slicing.plans`) or by the "objective" alone
            (`slicegpt.slicing.allocation`); "uniform" keeps that number.
        neuron_multiple: those numbers are multiples of it.
        times: of a decoding step: what is deleted is then chosen by the time that it takes, not by its parameters.
        fitted: the share of the calibration batches that it fits to; the covariances are of all of them.
        weights: store them in 8 or 4 bits, see `slicegpt.slicing.quantizing`; None: in `dtype`.
        ranks: the processes that share the calibration batches, see `slicegpt.hardware.ranks`. All of them slice the
            same model by the same batches.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    orientation: str = "aligned"
    signal: str = "residual"
    activation_storage: str = "auto"
    seed: int = 42
    vocabulary_prior: float = 0.0
    refit: bool = True
    ridge: float | None = None
    fitted: float = 1.0
    allocate: str = OBJECTIVE
    neuron_multiple: int = 64
    scratch: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)
    weights: WeightFormat | None = None
    times: StepTimes | None = None

    def __post_init__(self):
        object.__setattr__(self, "allocate", allocation(self.allocate))  # former callers say True or False
        for name, value, allowed in (
            ("orientation", self.orientation, ORIENTATIONS),
            ("signal", self.signal, SIGNALS),
            ("activation_storage", self.activation_storage, STORAGES),
            ("allocate", self.allocate, ALLOCATIONS),
        ):
            if value not in allowed:
                raise SliceGPTError(f"must be one of {', '.join(allowed)}, got {value!r}", name)
        if not 0 <= self.vocabulary_prior < float("inf"):
            raise SliceGPTError(f"must be at least 0, got {self.vocabulary_prior}", "vocabulary_prior")
        if self.ridge is not None and not 0 < self.ridge < float("inf"):
            raise SliceGPTError(f"must be above 0, got {self.ridge}", "ridge")
        if self.neuron_multiple == AUTO or self.neuron_multiple < 1:
            raise SliceGPTError(f"must be at least 1, got {self.neuron_multiple}", "neuron_multiple")
        if not 0 < self.fitted <= 1:
            raise SliceGPTError(f"must lie in (0, 1], got {self.fitted}", "fitted")

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        dtype: torch.dtype,
        device: torch.device,
        activation_storage: str = "auto",
        scratch: Path | None = None,
        ranks: Ranks | None = None,
    ) -> SlicingOptions:
        """What a recipe says of how to slice; the rest is the machine's. Its `round_to` is a number."""
        return cls(
            dtype,
            device,
            recipe.orientation,
            recipe.signal,
            activation_storage,
            recipe.seed,
            recipe.vocabulary_prior,
            refit=recipe.refit,
            ridge=None if recipe.ridge == AUTO else recipe.ridge,
            fitted=recipe.refit_share,
            allocate=recipe.resolved().allocate,
            neuron_multiple=recipe.round_to,
            scratch=scratch,
            ranks=ranks or Ranks(),
            weights=WeightFormat.of(recipe),
            times=None if recipe.step_times is None else StepTimes.parse(recipe.step_times),
        )


@dataclass
class SlicingReport:
    """What slicing saw.

    Attributes:
        tokens: of the calibration, padding left out.
        seconds: of each stage.
        eigenvalues: [D] for each boundary; None where none were needed.
        refit: for each refitted block `{"block", "ridge", "remaining"}`: its index, λ, and the fraction of its squared
            error before the fit that remains (None where there was none to speak of); of a mixture also "few_tokens",
            the experts that had fewer tokens than neurons, if any.
        ridge_search: where λ was chosen, the held-out loss of each candidate, in nats a token.
        plans: where plans were compared, the best one first, see `slicegpt.slicing.plans.Plan.record`.
    """

    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    eigenvalues: list[list[float] | None] = field(default_factory=list)
    refit: list[dict] = field(default_factory=list)
    ridge_search: dict[float, float] | None = None
    plans: list[dict] = field(default_factory=list)
