"""What the refit of experts is worth: a mixture sliced with it, with more penalty, and with the experts' own weights.

    python -m slicegpt.bench.commands.refit_experts tiny-moe --calibration train.txt --held-out test.txt --keep 0.8 0.7

The model keeps its columns; every expert of every layer loses as many neurons as the size asks for. All other output
weights are refitted alike, at λ = 0.3. Losses are those of held-out windows, the same ones for all, and differences are
paired by window: their standard error is that of the differences. Beside them the loss of the dense model, and what it
is with the router's rows shifted by one: every token at experts that were trained for others.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from slicegpt.bench.harness.record import write_results
from slicegpt.progress import Progress
from slicegpt.table import check_writable, format_table

RIDGE, SEQLEN, OWN = 0.3, 64, math.inf


@contextmanager
def penalised(factor: float) -> Iterator[None]:
    """Inside, λ of the experts' refit is `factor` times as large; `OWN`: they keep their own weights, and the neurons
    that the refit at λ itself would have kept."""
    from slicegpt.slicing import slicer

    original = slicer.fit_mixture

    def fit_mixture(objective, moments, writers: Mapping, ridges: Sequence[float], *others):
        if factor != OWN:
            fits = original(objective, moments, writers, [factor * ridge for ridge in ridges], *others)
            own = {ridge: fits.writers[factor * ridge] for ridge in ridges}
            return replace(fits, writers=own, remaining=dict.fromkeys(ridges))
        fits = original(objective, moments, writers, ridges, *others)
        return replace(
            fits,
            writers=dict.fromkeys(ridges, _masked(writers, fits.neurons)),
            remaining=dict.fromkeys(ridges),
        )

    slicer.fit_mixture = fit_mixture
    try:
        yield
    finally:
        slicer.fit_mixture = original


def _masked(writers: Mapping, neurons: Mapping | None) -> dict:
    """Output weights with 0 for the neurons that go."""
    import torch

    masked = {}
    for name, writer in writers.items():
        weight = writer.weight.double()
        if neurons is not None and name in neurons:
            weight = torch.zeros_like(weight).index_copy(1, neurons[name], weight[:, neurons[name]])
        masked[name] = replace(writer, weight=weight)
    return masked


def size_of(fields: dict, keep: float):
    """The plan of the full width that keeps as many neurons an expert as `keep` of all parameters leave."""
    from slicegpt.conversion.plan import Shape, constant_widths, plan
    from slicegpt.modeling.sizes import stored_parameters

    widths, whole = constant_widths(fields, fields["dense_hidden_size"]), fields["moe_intermediate_size"]
    for neurons in range(whole, 0, -1):
        config = plan(fields, widths, Shape(round_to=1), neurons)
        if stored_parameters(config) <= keep * fields["source_parameters"]:
            return config
    raise ValueError(f"{keep} of the parameters cannot be kept by deleting neurons of experts alone")


def difference(losses, others) -> tuple[float, float]:
    """Mean of the differences by window in nats a token, and its standard error."""
    import torch

    change = torch.tensor(losses).double() - torch.tensor(others).double()
    return change.mean().item(), (change.std() / math.sqrt(len(change))).item()


def measure(options: argparse.Namespace) -> dict:
    """All rows; see `main`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slicegpt.calibration.batches import sample_batches
    from slicegpt.families import canonical_fields
    from slicegpt.modeling.losses import window_losses
    from slicegpt.runtime import to_canonical
    from slicegpt.slicing import SlicingOptions, slice_model

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    text = Path(options.held_out).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    whole = len(ids) // SEQLEN
    count = min(options.windows, whole)
    windows = ids[: whole * SEQLEN].view(whole, SEQLEN)[:: whole // count][:count]

    def losses(network) -> list[float]:
        return [loss / (SEQLEN - 1) for loss in window_losses(network, windows, 32)]

    dense = to_canonical(model)
    shifted = copy.deepcopy(dense)
    for layer in shifted.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.weight.data = layer.mlp.gate.weight.roll(1, dims=0)
    reference = losses(dense)
    rise, error = difference(losses(shifted), reference)
    result = {
        "windows": count,
        "tokens of a window": SEQLEN,
        "dense": sum(reference) / count,
        "router shifted by one": {"rise": rise, "standard error": error},
        "rows": [],
    }
    fields = canonical_fields(model)
    documents = [Path(options.calibration).read_text(encoding="utf-8")]
    runs = [(samples, keep) for samples in options.samples for keep in options.keep]
    with Progress().stage("slicing", len(runs), "sizes") as advance:
        for samples, keep in runs:
            batches = sample_batches(documents, tokenizer, samples, SEQLEN, 16)
            config, own = size_of(fields, keep), None
            for factor in (OWN, *options.factors):
                settings = SlicingOptions(ridge=RIDGE, allocate="uniform", neuron_multiple=1)
                with penalised(factor), torch.no_grad():
                    sliced, _ = slice_model(model, config, batches, settings)
                found = losses(sliced)
                own = found if own is None else own
                change, error = difference(found, own)
                result["rows"].append(
                    {
                        "calibration tokens": samples * SEQLEN,
                        "keep": keep,
                        "neurons": config.moe_intermediate_size,
                        "penalty": "own weights" if factor == OWN else factor,
                        "loss": sum(found) / count,
                        "rise over dense": difference(found, reference)[0],
                        "against own weights": change,
                        "standard error": error,
                    }
                )
            advance(1)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder, see slicegpt.bench.commands.train_experts")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--held-out", required=True, metavar="FILE")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--samples", type=int, nargs="+", default=[64], help=f"of {SEQLEN} tokens")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0], help="of λ = 0.3")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    check_writable("--json", options.json)
    result = measure(options)
    shift = result["router shifted by one"]
    print(
        f"dense: {result['dense']:.4f} nats a token on {result['windows']} windows; router shifted by one: "
        f"{shift['rise']:+.4f} ± {shift['standard error']:.4f}"
    )
    columns = ["calibration tokens", "keep", "neurons", "penalty", "loss", "against own weights", "± s.e."]
    rows = [
        row
        | {
            "loss": f"{row['loss']:.4f}",
            "against own weights": f"{row['against own weights']:+.4f}",
            "± s.e.": f"{row['standard error']:.4f}",
        }
        for row in result["rows"]
    ]
    print(format_table(rows, columns))
    write_results(options.json, "expert refit", result)


if __name__ == "__main__":
    main()
