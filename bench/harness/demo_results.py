"""The demo's result: a row for each model and what runs it."""

from collections.abc import Mapping, Sequence

COLUMNS = ["model", "runs in", "bytes", "perplexity", "tokens/s", "speed-up"]
# Engine of `slicegpt bench token` -> what it is called here.
ENGINES = {"hf-generate": "generate()", "fused": "runtime"}


def demo_rows(quality: Mapping[str, Mapping], token_rows: Sequence[Mapping]) -> list[dict]:
    """Rows for the table and the plot, the dense model in Hugging Face's generate() first where it was measured.

    Args:
        quality: of each model, by label: `parameters`, `bytes`, `perplexity`.
        token_rows: of `slicegpt bench token`: `network` (a label), `engine`, `tokens_per_second`.
    """
    first = next((row["tokens_per_second"] for row in token_rows if row["engine"] == "hf-generate"), None)
    rows = []
    for row in token_rows:
        rate = row["tokens_per_second"]
        own = {"model": row["network"], "engine": ENGINES[row["engine"]], **quality[row["network"]]}
        rows.append(own | {"tokens_per_second": rate, "speedup": rate / first if first else None})
    return rows
