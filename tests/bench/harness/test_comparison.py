"""Speed-ups and ratios of invented rows, by hand."""

from slicegpt.bench.harness.comparison import compare, token_ratios


def test_speedups_are_against_the_best_dense_row_of_the_same_model():
    rows = [
        {"network": n, "engine": e, "slice": s, "dense_parameters": m, "dtype": d, "ms": t}
        for n, e, s, m, d, t in [
            ("dense", "hf", 0.0, 7, "float32", 10.0),
            ("dense", "fused", 0.0, 7, "float32", 8.0),
            ("sliced 25 %", "fused", 0.25, 7, "float32", 4.0),
            ("pruned", "2:4", None, 7, "float32", 2.0),
            ("other", "hf", 0.0, 9, "float32", 1.0),
            ("broken", "hf", 0.25, 9, "float32", None),
            ("dense", "fused", 0.0, 7, "bfloat16", 5.0),
            ("sliced 25 %", "fused", 0.25, 7, "bfloat16", 4.0),
        ]
    ]
    sentence = compare(rows, "ms", smaller_is_better=True)
    assert [row["speedup"] for row in rows] == [0.8, 1.0, 2.0, 4.0, 1.0, None, 1.0, 1.25]
    assert "Best dense baseline: fused (dense, 8; hf 10)" in sentence
    compare(rows, "ms", smaller_is_better=False)
    assert rows[2]["speedup"] == 0.4
    assert compare([rows[2]], "ms", smaller_is_better=True) is None


def test_ratios_of_token_times():
    """By hand: the runtime against the faster cache of `generate()` and all of Hugging Face; slicing beside bytes."""
    rows = [
        {
            "network": n,
            "engine": e,
            "slice": s,
            "dense_parameters": 7,
            "dtype": d,
            "ms_median": t,
            "read_bytes": b,
        }
        for n, e, s, d, t, b in [
            ("dense", "hf-generate", 0.0, "float32", 12.0, 100),
            ("dense", "hf-generate-static", 0.0, "float32", 10.0, 100),
            ("dense", "hf-compile", 0.0, "float32", 9.0, 100),
            ("dense", "fused", 0.0, "float32", 8.0, 100),
            ("sliced 25 %", "plain", 0.25, "float32", 9.0, 80),
            ("sliced 25 %", "fused", 0.25, "float32", 6.4, 80),
            ("dense", "hf", 0.0, "bfloat16", 5.0, 50),
            ("dense", "fused", 0.0, "bfloat16", 4.0, 50),
        ]
    ]
    seen = [(r["comparison"], r["dtype"], r["ratio"], r["bytes_ratio"]) for r in token_ratios(rows)]
    assert seen == [
        ("dense, fused over hf-generate-static", "float32", 1.25, None),
        ("dense, fused over hf-compile", "float32", 1.125, None),
        ("sliced 25 % over dense, fused", "float32", 1.25, 1.25),
        ("dense, fused over hf", "bfloat16", 1.25, None),
    ]
    assert token_ratios(rows[:3]) == []
