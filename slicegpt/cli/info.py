"""`slicegpt info`: what a model holds, counted on its files, compared with the dense model."""

import argparse
from pathlib import Path

from slicegpt.checkpoint.names import check_name
from slicegpt.recipe import SLICED, STOCK
from slicegpt.table import check_writable

from .options import add_json


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="true parameters, bytes, widths and ranks of a model",
        description="True sizes of a sliced folder, from its files alone; or of a dense model.",
        examples=("slicegpt info small", "slicegpt info smollm2-135m --json sizes.json"),
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="DIR|MODEL")
    parser.add_argument("--boundaries", action="store_true", help="one line a boundary")
    add_json(parser)


def describe(name: str) -> dict:
    """Sizes, widths and ranks of a sliced folder, or of a dense model as one with nothing removed."""
    from transformers import AutoConfig

    from slicegpt.checkpoint.loading import check_folder, load_dense
    from slicegpt.checkpoint.record import slicing_fraction
    from slicegpt.checkpoint.saving import read_record, stored_size
    from slicegpt.conversion.plan import constant_widths, plan
    from slicegpt.conversion.quantization import describe_storage
    from slicegpt.families import canonical_fields
    from slicegpt.hardware.devices import find_dtype
    from slicegpt.modeling import SlicedConfig
    from slicegpt.modeling.sizes import boundary_report, stored_parameters

    config, record = None, {}
    if Path(name).is_dir():
        check_folder(Path(name))
        config = AutoConfig.from_pretrained(name)
    stock = read_record(name) if config is not None and not isinstance(config, SlicedConfig) else None
    if stock is not None and stock.get("form") == STOCK:
        return describe_stock(name, config, stock)
    if isinstance(config, SlicedConfig):
        stored = stored_size(name)
        parameters, size, dtype = (
            stored_parameters(config),
            stored.bytes,
            str(config.dtype).removeprefix("torch."),
        )
        record = read_record(name) or {}
    else:
        model, _ = load_dense(name)
        fields = canonical_fields(model)
        config = plan(fields, constant_widths(fields, fields["dense_hidden_size"]))
        parameters, dtype = fields["source_parameters"], str(model.dtype).removeprefix("torch.")
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    dense_parameters = config.source_parameters
    return {
        "model": name,
        "form": SLICED,
        "family": config.source_model_type,
        "dtype": dtype,
        "parameters": parameters,
        "bytes": size,
        "dense_parameters": dense_parameters,
        "dense_bytes": dense_parameters * find_dtype(dtype).itemsize,
        "stored_as": describe_storage(config, dtype),
        "removed": 1 - parameters / dense_parameters,
        "slicing": slicing_fraction(config),
        "layers": config.num_hidden_layers,
        "dense_width": config.dense_hidden_size,
        "neurons": config.layer_neurons or config.intermediate_size,
        "dense_neurons": config.dense_intermediate_size,
        "key_value_heads": config.layer_key_value_heads or config.num_key_value_heads,
        "dense_key_value_heads": config.num_key_value_heads,
        "query_heads": config.num_attention_heads if config.keeps_all_heads else config.attention_heads,
        "dense_query_heads": config.num_attention_heads,
        "tied_head": config.tie_word_embeddings,
        "boundaries": boundary_report(config),
        "calibration": record.get("calibration"),
        "asked": record.get("asked", {}),
        "perplexity": record.get("perplexity"),
        "tokens_per_second": record.get("tokens_per_second"),
        "finetuned": "finetuning" in record,
    }


def describe_stock(name: str, config, record: dict) -> dict:
    """`describe` of a folder in the stock form: the dense model's own class, whose record says what was deleted."""
    from slicegpt.checkpoint.saving import stored_size

    stored, boundaries = stored_size(name), record["boundaries"]
    dense = record["size"]["dense_parameters"]
    return {
        "model": name,
        "form": STOCK,
        "family": config.model_type,
        "dtype": record["dtype"],
        "parameters": stored.parameters,
        "bytes": stored.bytes,
        "dense_parameters": dense,
        "dense_bytes": dense * stored.bytes // stored.parameters,
        "removed": 1 - stored.parameters / dense,
        "slicing": record["slicing"],
        "layers": config.num_hidden_layers,
        "dense_width": record["dense_width"],
        "neurons": record["neurons"],
        "dense_neurons": record["dense_neurons"],
        "key_value_heads": record.get("key_value_heads"),
        "dense_key_value_heads": record.get("dense_key_value_heads"),
        "query_heads": record.get("query_heads"),
        "dense_query_heads": record.get("dense_query_heads"),
        "tied_head": config.tie_word_embeddings,
        "boundaries": boundaries,
        "calibration": record["calibration"],
        "asked": record["asked"],
        "perplexity": record["perplexity"],
        "tokens_per_second": record["tokens_per_second"],
        "finetuned": False,
    }


def run(options: argparse.Namespace) -> None:
    check_name(options.model, "model")
    check_writable("--json", options.json)
    from slicegpt.checkpoint.outcome import asked_and_got, compared, notes, summarise
    from slicegpt.modeling.sizes import describe_heads, describe_neurons, format_bytes
    from slicegpt.table import format_table, write_json

    facts = describe(options.model)
    boundaries = facts["boundaries"]
    removed = f"{100 * facts['removed']:.1f} % of all parameters, shortcuts and head counted"
    if asked := asked_and_got(facts):
        removed += f"; {asked}"
    rows = [
        (
            "form",
            "stock: of the dense model's own class"
            if facts["form"] == STOCK
            else "sliced: of slicegpt's class",
        ),
        (
            "family",
            f"{facts['family']}, {facts['layers']} layers, {'tied' if facts['tied_head'] else 'untied'} head",
        ),
        ("parameters", f"{facts['parameters']:,} of {facts['dense_parameters']:,} dense"),
        (
            "bytes",
            f"{format_bytes(facts['bytes'])} of {format_bytes(facts['dense_bytes'])} dense ({facts['dtype']})",
        ),
        ("stored as", facts["stored_as"]),
        ("removed", removed),
        ("slicing (1 - d/D)", f"{100 * facts['slicing']:.1f} %"),
        ("widths", f"{summarise([b['width'] for b in boundaries])} of {facts['dense_width']}"),
        ("neurons of an MLP", f"{describe_neurons(facts['neurons'])}, of {facts['dense_neurons']}"),
        *(
            (
                f"{kind} heads",
                f"{describe_heads(facts[f'{name}_heads'])}, of {facts[f'dense_{name}_heads']}",
            )
            for kind, name in (("key/value", "key_value"), ("query", "query"))
            if facts[f"{name}_heads"] is not None
        ),
        ("shortcuts", summarise([b["shortcut"] for b in boundaries[:-1]])),
        ("ranks", summarise([b["rank"] for b in boundaries[:-1] if b["shortcut"] == "compact"]) or "none"),
    ]
    if facts["calibration"]:
        seen = facts["calibration"]
        rows.append(("calibration", f"{seen['tokens']:,} tokens of {seen['source']}, seed {seen['seed']}"))
    for name, label in (("perplexity", "perplexity, held out"), ("tokens_per_second", "tokens/s")):
        if facts[name]:
            rows.append((label, compared(facts[name])))
    print(format_table([{"": name, facts["model"]: value} for name, value in rows], ["", facts["model"]]))
    if facts["perplexity"] or facts["tokens_per_second"]:
        print(*notes(facts), sep="\n")
    if options.boundaries:
        numbered = [{"boundary": index} | boundary for index, boundary in enumerate(boundaries)]
        print("\n" + format_table(numbered, ["boundary", "width", "rank", "shortcut"]))
    if options.json:
        write_json(options.json, facts)
