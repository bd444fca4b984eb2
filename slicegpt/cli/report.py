"""Tables that the commands print."""


def print_sizes(record: dict) -> None:
    """Dense and sliced sizes of a `slicing.json`, side by side."""
    from slicegpt.checkpoint.model_card import summarise
    from slicegpt.modeling.sizes import describe_neurons, format_bytes
    from slicegpt.table import format_table

    size, boundaries = record["size"], record["boundaries"]
    rows = [
        {
            "": "dense",
            "parameters": size["dense_parameters"],
            "bytes": format_bytes(size["dense_bytes"]),
            "removed": "0.0 %",
            "widths": str(record["dense_width"]),
            "neurons": record["dense_neurons"],
            "shortcuts": "none",
        },
        {
            "": "sliced",
            "parameters": size["parameters"],
            "bytes": format_bytes(size["bytes"]),
            "removed": f"{100 * size['removed']:.1f} %",
            "widths": summarise([boundary["width"] for boundary in boundaries]),
            "neurons": describe_neurons(record["neurons"]),
            "shortcuts": summarise([boundary["shortcut"] for boundary in boundaries[:-1]]),
        },
    ]
    print(format_table(rows, list(rows[0])))
    seconds = sum(record["seconds"].values())
    tokens = record["calibration"]["tokens"]
    print(f"slicing (1 - d/D): {100 * record['slicing']:.1f} %, {tokens:,} tokens, {seconds:.1f} s")
