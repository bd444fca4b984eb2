"""How many residue planes `gram_`'s "exact" needs for a model's own activations: its time is proportional to them.

    python -m slicegpt.bench.commands.plane_counts DENSE... --data TEXT --tokens 4096 --json planes.json

Every signal whose covariance slicing takes: the residual stream before each norm, what the output projections of
attention and MLP read. Counted as csrc/residues.cu does: a column of a block of tokens is held in integers of its
lowest bit, a product of two groups of 128 columns needs moduli for the product of their largest norms. "planes" is the
mean over the tiles of the triangle, which is what the products cost; Gaussian values of the same size stand beside it.
"""

import argparse
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import Record
from slicegpt.calibration import load_documents
from slicegpt.checkpoint.loading import load_dense
from slicegpt.table import check_writable

# csrc/residues.cuh and csrc/moduli.cuh.
WINDOW, GROUP = 53, 128
MODULI = (256, 255, 253, 251, 247, 241, 239, 233, 229, 227, 223, 217, 211, 199, 197, 193)
PRODUCT_BITS = torch.tensor(MODULI, dtype=torch.float64).log2().cumsum(0)


def significand_bits(X: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents of the leading and the lowest bit set of every item, float64 of integers; items must not be zero."""
    fraction, exponent = torch.frexp(X.double())
    # 2^53 times the fraction is an integer; its lowest bit is what remains of it and its own negation.
    whole = (fraction.abs() * 2.0**53).long()
    return exponent.double() - 1, (whole & -whole).double().log2() + exponent.double() - 53


def group_bits(X: Tensor) -> tuple[Tensor, Tensor]:
    """Of a block X [T, D]: log2 of the largest norm of every group of columns, and which tokens do not fit.

    In units of each column's scale; -inf for a group of zeros. A token does not fit where one of its values reaches
    further down than `WINDOW` bits below its column's largest.
    """
    there = X != 0
    top, low = significand_bits(torch.where(there, X, 1.0))
    top = top.masked_fill(~there, -1e9).amax(0)
    lowest = low.masked_fill(~there, 1e9)
    scale = torch.maximum(lowest.amin(0), top - (WINDOW - 1))
    norm = X.double().square().sum(0).sqrt().log2() - scale
    groups = torch.nn.functional.pad(norm, (0, -len(norm) % GROUP), value=-torch.inf).view(-1, GROUP)
    return groups.amax(1), (lowest < scale).any(1)


def plane_counts(X: Tensor) -> tuple[Tensor, int]:
    """Moduli of every tile of the triangle, and how many tokens are handed over to float64."""
    bits, unfit = group_bits(X)
    if unfit.any():
        bits, _ = group_bits(X[~unfit])
    rows, columns = torch.triu_indices(len(bits), len(bits))
    # As the kernel rounds: norms up by 0.01 bits each.
    needed = bits[rows] + bits[columns] + 1.02
    return torch.searchsorted(PRODUCT_BITS, needed.clamp_min(0)) + 1, int(unfit.sum())


def signals(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(kind, module whose input is a signal): the norms of the stream, and the output projections."""
    for name, module in model.named_modules():
        if re.search(r"\.(input_layernorm|post_attention_layernorm)$", name):
            yield "stream", module
        elif re.search(r"\.o_proj$", name):
            yield "attention output", module
        elif re.search(r"\.down_proj$", name):
            yield "MLP neurons", module


@torch.inference_mode()
def collect(model: nn.Module, ids: Tensor, seqlen: int) -> dict[str, list[Tensor]]:
    """Kind -> signals [tokens, D] in order, in the model's dtype."""
    parts: dict[int, list[Tensor]] = {}
    kinds = dict(enumerate(signals(model)))

    def keep(index: int):
        return lambda _, inputs: parts.setdefault(index, []).append(inputs[0].flatten(0, -2).clone())

    handles = [module.register_forward_pre_hook(keep(index)) for index, (_, module) in kinds.items()]
    try:
        for row in ids.view(-1, seqlen):
            model(row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[Tensor]] = {}
    for index, (kind, _) in kinds.items():
        found.setdefault(kind, []).append(torch.cat(parts.pop(index)))
    return found


def rows_of(name: str, found: dict[str, list[Tensor]], dtypes: list[torch.dtype]) -> Iterator[dict]:
    """A row for each kind of signal and dtype."""
    for kind, matrices in found.items():
        for dtype in dtypes:
            counted = [plane_counts(X.to(dtype)) for X in matrices]
            means = [float(counts.double().mean()) for counts, _ in counted]
            gaussian = torch.randn(matrices[0].shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            yield {
                "model": name,
                "signal": kind,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": len(matrices[0]),
                "columns": matrices[0].shape[1],
                "planes": statistics.fmean(means),
                "least": min(means),
                "most": max(means),
                "handed over": sum(unfit for _, unfit in counted) / sum(len(X) for X in matrices),
                "of Gaussians": float(plane_counts(gaussian)[0].double().mean()),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="DENSE")
    parser.add_argument("--data", default="python-reference", help="as in slicegpt eval")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    check_writable("--json", options.json)
    record = Record("planes", vars(options), torch.device("cpu"), options.json)
    text = "\n\n".join(load_documents(options.data, "test"))
    for name in options.models:
        model, tokenizer = load_dense(name, dtype=torch.bfloat16)
        count = options.tokens // options.seqlen * options.seqlen
        ids = tokenizer(text, return_tensors="pt").input_ids[0, :count]
        if len(ids) < count:
            parser.error(f"--tokens: the text has {len(ids)} tokens, fewer than {count}")
        found = collect(model, ids, options.seqlen)
        del model
        record.rows.extend(rows_of(Path(name).name, found, [torch.bfloat16, torch.float16]))
        record.save()
    print_rows("planes", record.rows)
    record.finish()


if __name__ == "__main__":
    main()
