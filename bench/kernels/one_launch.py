"""A few launches of one kernel at Llama-2-7B's size, for a profiler: `ncu ... one_launch gram_exact`.

    python -m slicegpt.bench.kernels.one_launch {gram_fp64,gram_exact,norm_linear,rotate_add,sparse_2_4}

norm_linear and rotate_add are a layer's products of one token at 25 %, weights from memory; sparse_2_4 is a product
with 2:4 sparse weights, checked: whether the library for them runs here at all. Needs a GPU.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from slicegpt.bench.commands.layer_ops import prune_2_4
from slicegpt.bench.kernels.rotation_methods import fused, make_inputs
from slicegpt.bench.models.shapes import NormLinearShape, launches
from slicegpt.ops import gram_

LAUNCHES = 4
TOKENS, COLUMNS = 16384, 4096


def gram(precision: str) -> Callable[[], object]:
    X = torch.randn(
        TOKENS, COLUMNS, device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    ).bfloat16()
    C = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64, device="cuda")
    return lambda: gram_(C, X, precision=precision)


def decode(kind: type, keep: bool) -> Callable[[], object]:
    """The last launch of its kind in a layer, the MLP's; every call has weights of its own."""
    launch = [one for one in launches("llama-2-7b", 0.25, "compact") if isinstance(one, kind) == keep][-1]
    sets = [make_inputs(launch, 1, torch.bfloat16, torch.device("cuda"), seed) for seed in range(LAUNCHES)]
    calls = iter([fused(launch, one) for one in sets])
    return lambda: next(calls)()


def sparse_2_4() -> Callable[[], object]:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = prune_2_4(torch.randn(1024, 1024, device="cuda", generator=generator).half())
    x = torch.randn(256, 1024, device="cuda", generator=generator).half()
    sparse = torch.sparse.to_sparse_semi_structured(weight)

    exact = x.double() @ weight.double().T

    def run() -> None:
        error = ((F.linear(x, sparse).double() - exact).norm() / exact.norm()).item()
        # Sums in float32 rounded to float16 once, 2^-11 of each at most.
        if not error < 2**-10:
            raise SystemExit(f"2:4 sparse products are wrong: relative error {error:.3g}")

    return run


KERNELS: dict[str, Callable[[], Callable[[], object]]] = {
    "gram_fp64": lambda: gram("fp64"),
    "gram_exact": lambda: gram("exact"),
    "norm_linear": lambda: decode(NormLinearShape, True),
    "rotate_add": lambda: decode(NormLinearShape, False),
    "sparse_2_4": sparse_2_4,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", choices=KERNELS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    with torch.inference_mode():
        run = KERNELS[options.kernel]()
        for _ in range(LAUNCHES):
            run()
        torch.cuda.synchronize()
    print(f"{options.kernel}: {LAUNCHES} launches")


if __name__ == "__main__":
    main()
