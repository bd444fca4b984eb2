"""Would a spectral projector beat `eigh`? Slicing needs a subspace only, and its basis is free.

    python -m slicegpt.bench.kernels.bench_projector --columns 4096 --json results.json

Compares `torch.linalg.eigh`, LAPACK's `syevr` for the leading part alone (scipy, CPU only), and the projector
`(I + sign(C − μI)) / 2` onto the eigenvalues above μ, its sign computed by the QDWH iteration (Nakatsukasa and
Higham, SIAM J. Sci. Comput. 35, 2013), which is matrix products, Cholesky and QR factorisations only. A basis of
its range comes from a QR factorisation. μ is given to it, which flatters it: finding μ needs the eigenvalues.

"leaked" is how much of C's trace the basis misses beyond what the best basis misses, relative to the trace.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from slicegpt.bench.harness.record import write_results
from slicegpt.bench.kernels.bench_gram import ON_GPU, covariance
from slicegpt.table import format_table


def polar_sign(A: Tensor) -> Tensor:
    """The matrix sign of a symmetric A by QDWH; converges in 6 steps for eigenvalues down to 1e-15 of ‖A‖."""
    size = A.shape[0]
    identity = torch.eye(size, dtype=A.dtype, device=A.device)
    X = A / torch.linalg.matrix_norm(A, 1)
    lower = 1e-15  # of the singular values of X
    while 1 - lower > 1e-14:
        a, b, c = halley_weights(lower)
        if c > 100:  # ill conditioned: the QR form is backward stable where Cholesky is not
            Q, _ = torch.linalg.qr(torch.cat([c**0.5 * X, identity]))
            X = (b / c) * X + ((a - b / c) / c**0.5) * (Q[:size] @ Q[size:].T)
        else:
            factor = torch.linalg.cholesky(torch.addmm(identity, X.T, X, alpha=c))
            X = (b / c) * X + (a - b / c) * torch.cholesky_solve(X.T.contiguous(), factor).T
        X = (X + X.T) / 2
        lower = min(1.0, lower * (a + b * lower**2) / (1 + c * lower**2))
    return X


def halley_weights(lower: float) -> tuple[float, float, float]:
    """The dynamic weights of QDWH for singular values in [lower, 1]."""
    square = lower * lower
    d = (4 * (1 - square) / square**2) ** (1 / 3)
    root = (1 + d) ** 0.5
    a = root + 0.5 * (8 - 4 * d + 8 * (2 - square) / (square * root)) ** 0.5
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def projected_basis(C: Tensor, threshold: float, width: int) -> Tensor:
    identity = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    projector = (polar_sign(C - threshold * identity) + identity) / 2
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(C.shape[0], width, dtype=C.dtype, generator=generator).to(C.device)
    basis, _ = torch.linalg.qr(projector @ start)
    basis, _ = torch.linalg.qr(projector @ basis)  # the random start's conditioning is gone after the second
    return basis


def subset_basis(C: Tensor, width: int) -> Tensor:
    from scipy.linalg import eigh

    size = C.shape[0]
    _, vectors = eigh(C.numpy(), driver="evr", subset_by_index=[size - width, size - 1], check_finite=False)
    return torch.from_numpy(vectors)


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """(result, wall seconds, processor seconds); the latter compare better on a machine that is shared."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    if ON_GPU:
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - processor


def compare(columns: int) -> list[dict]:
    C = covariance(columns)
    width = columns * 3 // 4
    values = torch.linalg.eigvalsh(C)
    threshold = float(values[columns - width - 1 : columns - width + 1].mean())
    methods = {
        "eigh": lambda: torch.linalg.eigh(C)[1][:, columns - width :],
        "QDWH projector": lambda: projected_basis(C, threshold, width),
    }
    if not ON_GPU:
        methods["syevr, leading part"] = lambda: subset_basis(C, width)
    rows = []
    for name, function in methods.items():
        basis, wall, processor = timed(function)
        captured = (basis * (C @ basis)).sum()
        rows.append(
            {
                "D": columns,
                "width": width,
                "method": name,
                "wall s": wall,
                "processor s": processor,
                "leaked": f"{float((values[-width:].sum() - captured) / values.sum()):.0e}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    compare(64)  # loads and starts the libraries
    rows = [row for columns in options.columns for row in compare(columns)]
    print(format_table(rows, list(rows[0])))
    write_results(options.json, "eigensolver alternatives", {"rows": rows})


if __name__ == "__main__":
    main()
