"""The quality frontier: perplexity over true size, one curve a method, in and out of the calibration's domain."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.calibration import Calibration, calibration_hash, encode_text
from slicegpt.checkpoint.record import versions
from slicegpt.conversion.plan import constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.evaluation.methods import METHODS, describe_widths, plan_point
from slicegpt.evaluation.perplexity import perplexity
from slicegpt.evaluation.sparsegpt import sparse_sizes
from slicegpt.families import canonical_fields
from slicegpt.hardware.offload import layer_by_layer, moved
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import decoder_parameters, format_bytes, stored_parameters
from slicegpt.progress import Progress
from slicegpt.recipe import Recipe
from slicegpt.slicing import Reuse, SlicingOptions
from slicegpt.slicing.pipeline import slice_drawn
from slicegpt.table import write_json


@dataclass(frozen=True)
class EvaluationText:
    """A text to evaluate on, cut to what is needed of it.

    Attributes:
        name: for tables and plots.
        documents: the text.
        windows: of `seqlen` tokens, evaluated from its start.
        sha256: of their token ids.
    """

    name: str
    documents: list[str]
    windows: int
    sha256: str


def cut_text(
    name: str,
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    windows: int,
) -> EvaluationText:
    """The beginning of a text that holds `windows` windows of `seqlen` tokens, so that it is encoded quickly."""
    text, needed = "\n\n".join(documents), windows * seqlen
    # Hardly any text has 16 characters a token; where it has, all of it is encoded. The margin of a window keeps
    # the cut itself, where tokens may differ from those of the whole text, out of what is evaluated.
    head = text[: (needed + seqlen) * 16]
    ids = encode_text(head, tokenizer)
    if len(ids) < needed + seqlen and len(head) < len(text):
        head, ids = text, encode_text(text, tokenizer)
    windows = min(windows, len(ids) // seqlen)
    if not windows:
        raise SliceGPTError(f"{name} has {len(ids):,} tokens, less than one window of {seqlen}", "documents")
    digest = hashlib.sha256(ids[: windows * seqlen].numpy().astype("<i8").tobytes())
    return EvaluationText(name, [head], windows, digest.hexdigest())


class Frontier:
    """Slices and evaluates point after point, and keeps what it measured in a file.

    Args:
        model, tokenizer: the dense model, on the CPU.
        calibration: the samples that every method sees.
        texts: to evaluate on; the first is the calibration's own domain.
        seqlen: tokens of an evaluated window.
        recipe: the choices that all methods share, but for their own (`METHODS`).
        device: where slicing and evaluation run.
        settings: what else the results depend on, for the file.
        file: JSON; results in it are taken over where they were measured with the same settings.

    Errors: `SliceGPTError` where `file` holds results of other settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Calibration,
        texts: Sequence[EvaluationText],
        seqlen: int,
        recipe: Recipe,
        device: torch.device,
        settings: dict,
        file: Path,
        progress: Progress | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.fields = canonical_fields(model)
        self.calibration, self.texts, self.seqlen = calibration, texts, seqlen
        self.recipe, self.device, self.file = recipe, device, file
        self.progress = progress or Progress(quiet=True)
        self.settings = settings | {
            "dense_parameters": self.fields["source_parameters"],
            "dtype": str(model.dtype).removeprefix("torch."),
            "calibration_sha256": calibration_hash(calibration.batches),
            "texts": [{key: getattr(t, key) for key in ("name", "windows", "sha256")} for t in texts],
            "eval_seqlen": seqlen,
        }
        self.reuse = Reuse()
        self.points: list[dict] = self._read()

    def _read(self) -> list[dict]:
        if not self.file.exists():
            return []
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            there, points = content["settings"], content["points"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SliceGPTError(f"{self.file} is not a frontier's JSON file: {error!r}", "file") from error
        for name, value in self.settings.items():
            if there.get(name) != value:
                raise SliceGPTError(
                    f"{self.file} holds results of other settings ({name}: {there.get(name)!r} there, "
                    f"{value!r} asked); take another folder, or overwrite it",
                    "file",
                )
        return points

    def write(self) -> None:
        """Write everything measured so far."""
        write_json(self.file, {"settings": self.settings, "versions": versions(), "points": self.points})

    def find(self, method: str, widths: str, options: dict) -> dict | None:
        """The point of a method at some widths, measured with the same options."""
        wanted = {"method": method, "widths": widths, "options": options}
        return next((p for p in self.points if all(p[k] == v for k, v in wanted.items())), None)

    def forget(self, methods: Sequence[str]) -> None:
        """Drop the points of some methods, so that they are measured again."""
        self.points = [point for point in self.points if point["method"] not in methods]

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Mean negative log-likelihood of a token, in nats, on every text."""
        return {
            text.name: perplexity(
                model, self.tokenizer, text.documents, self.seqlen, 4, text.windows, self.progress
            ).nll
            for text in self.texts
        }

    def measure_on_device(self, model: PreTrainedModel) -> dict[str, float]:
        """`measure`, on the slicing's device where the model fits there, and back."""
        with moved(model, self.device):
            return self.measure(model)

    def record(
        self, method: str, widths: str, options: dict, sizes: dict, seconds: float, nll: dict[str, float]
    ) -> dict:
        """Keep a point and write the file."""
        point = {
            "method": method,
            "widths": widths,
            "options": options,
            **sizes,
            "nll": nll,
            "perplexity": {name: math.exp(value) for name, value in nll.items()},
            "seconds": round(seconds, 1),
        }
        self.points.append(point)
        self.write()
        return point

    def sizes(self, config: SlicedConfig) -> dict:
        """True sizes of a planned model."""
        total, decoder, width = stored_parameters(config), decoder_parameters(config), self.model.dtype
        return {
            "parameters": total,
            "bytes": total * width.itemsize,
            "decoder_parameters": decoder,
            "decoder_bytes": decoder * width.itemsize,
        }

    def dense(self) -> dict:
        """The dense model's point."""
        widths = str(self.fields["dense_hidden_size"])
        found = self.find("dense", widths, {})
        if found:
            return found
        config = plan(self.fields, constant_widths(self.fields, self.fields["dense_hidden_size"]))
        sizes = self.sizes(config)
        sizes["parameters"] = self.fields["source_parameters"]
        sizes["bytes"] = sizes["parameters"] * self.model.dtype.itemsize
        start = time.perf_counter()
        nll = self.measure_on_device(self.model)
        return self.record("dense", widths, {}, sizes, time.perf_counter() - start, nll)

    def slicing_options(self, method: str) -> SlicingOptions:
        """The options of a method's slicing run."""
        return SlicingOptions.of(METHODS[method].recipe(self.recipe), self.model.dtype, self.device)

    def sparse_point(self, make: Callable[[], PreTrainedModel]) -> dict:
        """SparseGPT's 2:4 model: half of the decoder's weights, and where they are (2 bits each)."""
        found = self.find("sparsegpt-2:4", "dense", {})
        if found:
            return found
        start = time.perf_counter()
        model = make()
        sizes = sparse_sizes(model)
        nll = self.measure_on_device(model)
        return self.record("sparsegpt-2:4", "dense", {}, sizes, time.perf_counter() - start, nll)

    def point(self, method: str, choices: Sequence[SlicedConfig]) -> dict:
        """A sliced model's point: sliced and evaluated, or taken from the file.

        Args:
            choices: as `plan_point` returns them.
        """
        widths, slicing = describe_widths(choices[0]), self.slicing_options(method)
        # Where and in what it runs is no choice of the method.
        machine = ("dtype", "device", "activation_storage", "scratch", "ranks")
        options = {
            name: value if value is None or isinstance(value, str | int | float) else str(value)
            for name, value in asdict(slicing).items()
            if name not in machine
        }
        found = self.find(method, widths, options)
        if found:
            return found
        start = time.perf_counter()
        self.reuse.begin(self.model, self.calibration.batches)
        sliced, report = slice_drawn(
            self.model,
            choices[0],
            self.calibration,
            slicing,
            self.progress,
            self.reuse,
            choices[1:],
        )
        with layer_by_layer(sliced, self.device):
            nll = self.measure(sliced)
        neurons = {} if sliced.config.layer_neurons is None else {"neurons": sliced.config.layer_neurons}
        ridge = {"ridge": report.refit[0]["ridge"]} if report.refit else {}
        plans = {"plans": report.plans} if report.plans else {}
        sizes = self.sizes(sliced.config) | neurons | ridge | plans
        return self.record(method, widths, options, sizes, time.perf_counter() - start, nll)


def run_frontier(
    frontier: Frontier,
    methods: Sequence[str],
    sizes: Sequence[float],
    basis: str,
    round_to: int,
    sparsegpt: Callable[[], PreTrainedModel] | None = None,
) -> list[dict]:
    """Measure every method at every size; what the frontier's file holds already is not measured again.

    Args:
        methods: names in `METHODS`, in the order of the table.
        basis: what sizes are fractions of, "total" or "decoder".
        sparsegpt: makes SparseGPT's 2:4 model, which has one size; None leaves it out.

    Returns:
        Points, the dense model's first; those of a sliced model carry the `asked` size as well.
    """
    planned = [
        (method, size, plan_point(METHODS[method], frontier.fields, size, basis, round_to))
        for method in methods
        for size in sizes
    ]
    remaining = len(planned) + 1 + (sparsegpt is not None)
    results, spent = [], []

    def report(name: str, point: dict, known: int) -> None:
        nonlocal remaining
        results.append(point)
        remaining -= 1
        measured = ", ".join(f"{text} {value:.4g}" for text, value in point["perplexity"].items())
        if len(frontier.points) == known:
            measured += " (measured before)"
        elif point["method"] != "dense":
            spent.append(point["seconds"])
        # Points cost about the same, whatever their size: most of it is reading the calibration tokens.
        estimate = f"; about {remaining * sum(spent) / len(spent) / 60:.0f} min left" if spent else ""
        frontier.progress.say(f"{name}: {measured}{estimate}")

    known = len(frontier.points)
    report("dense", frontier.dense(), known)
    for method, size, choices in planned:
        known = len(frontier.points)
        point = frontier.point(method, choices) | {"asked": size}
        report(f"{method} {size:g} (width {point['widths']})", point, known)
    if sparsegpt is not None:
        known = len(frontier.points)
        report("sparsegpt-2:4", frontier.sparse_point(sparsegpt), known)
    return results


def table_rows(points: Sequence[dict], basis: str) -> list[dict]:
    """Rows of the printed table: sizes against dense, perplexities, and the loss against the published method's.

    The loss of a method is its log-perplexity above the dense model's; "of published" is the ratio of two such
    losses at the same asked size.
    """
    dense = points[0]
    rows = []
    for point in points:
        published = next(
            (p for p in points if p["method"] == "published" and p.get("asked") == point.get("asked")), None
        )
        row = {
            "method": point["method"],
            "size": f"{point['asked']:g}" if "asked" in point else None,
            "width": point["widths"],
            "parameters": point["parameters"],
            "bytes": format_bytes(point["bytes"]),
            f"of {basis}": _fraction(point, dense, basis),
        }
        for name, value in point["perplexity"].items():
            row[name] = value
            if published is not None:
                row[f"loss ({name})"] = loss_ratio(point, published, dense, name)
        rows.append(row)
    return rows


def loss_ratio(point: dict, reference: dict, dense: dict, text: str) -> float:
    """Log-perplexity above dense of one point over that of another."""
    return (point["nll"][text] - dense["nll"][text]) / (reference["nll"][text] - dense["nll"][text])


def _fraction(point: dict, dense: dict, basis: str) -> float:
    key = "bytes" if basis == "total" else "decoder_bytes"
    return round(point[key] / dense[key], 4)
