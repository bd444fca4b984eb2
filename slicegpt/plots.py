"""Plots of a slicing run (extra `plot`)."""

from pathlib import Path

from slicegpt.errors import SliceGPTError


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise SliceGPTError("plots need matplotlib: pip install slicegpt[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_spectra(records: dict[str, dict], file: str | Path) -> None:
    """Eigenvalue spectra of the residual stream's covariance, one panel a model, one line a boundary.

    Each line is scaled by its largest eigenvalue; the vertical lines mark the widths that were kept.

    Args:
        records: `slicing.json` of each model, by label.
        file: .png or .svg to write.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(records), figsize=(5.2 * len(records), 4), squeeze=False, sharey=True
    )
    for axis, (label, record) in zip(axes[0], records.items(), strict=True):
        spectra = [(index, values) for index, values in enumerate(record["eigenvalues"]) if values]
        colours = pyplot.cm.viridis
        for index, values in spectra:
            # Rounding noise, of either sign, begins at 1e-16 of the largest; a sliced table has exact zeros there.
            scaled = [value / values[0] if value > 1e-12 * values[0] else float("nan") for value in values]
            axis.semilogy(
                range(1, len(scaled) + 1), scaled, color=colours(index / len(spectra)), linewidth=0.8
            )
        for width in sorted(
            {boundary["width"] for boundary in record["boundaries"]} - {record["dense_width"]}
        ):
            axis.axvline(width, color="black", linestyle="--", linewidth=1)
            axis.annotate(f"{width} kept", (width, 1), ha="right", va="top", rotation=90, fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("principal component")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("eigenvalue / largest")
    scale = pyplot.cm.ScalarMappable(
        cmap="viridis", norm=pyplot.Normalize(0, max(len(r["boundaries"]) for r in records.values()) - 1)
    )
    figure.colorbar(scale, ax=axes[0].tolist(), label="boundary (depth)")
    figure.savefig(file, dpi=140, bbox_inches="tight")
    pyplot.close(figure)
