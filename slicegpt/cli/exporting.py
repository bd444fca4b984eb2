"""`slicegpt export`: a model for other engines, as a GGUF file or as a folder in the stock form."""

import argparse

from slicegpt.errors import SliceGPTError

from .options import add_json


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model for other engines: GGUF for llama.cpp, or the stock form",
        description="Write DIR as a GGUF file, which llama.cpp runs: a folder in the stock form, a sliced one without "
        "shortcuts (slice --form stock, per-layer), or a dense model. Or bring a sliced folder into the stock form.",
        examples=(
            "slicegpt export small --gguf small.gguf",
            "slicegpt export small --gguf small-q8.gguf --type q8_0",
            "slicegpt export small --form stock --output stock",
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gguf", metavar="FILE", help="GGUF file to write")
    what.add_argument("--form", choices=("stock",), help="write --output in this form")
    parser.add_argument("--output", metavar="DIR", help="folder to write, with --form")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        help="of a GGUF file's weights: f32, f16 (default), bf16; or q8_0, q6_k, q5_k_m, q4_k_m, q4_0, ..., which "
        "llama-cpp-python quantises",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="GGUF file whose tokenizer is copied (default: that of the dense model where it is a GGUF file, else the "
        "folder's, converted)",
    )
    parser.add_argument(
        "--source", metavar="MODEL", help="the dense model, with --form (default: what slicing.json names)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    if options.gguf is not None:
        for name in ("output", "source"):
            if getattr(options, name) is not None:
                raise SliceGPTError("is for --form, which is not given", name)
    else:
        for name in ("type", "tokenizer"):
            if getattr(options, name) is not None:
                raise SliceGPTError("is for --gguf, which is not given", name)
        if options.output is None:
            raise SliceGPTError("a folder to write is needed, got none", "output")
    from slicegpt.modeling.sizes import format_bytes
    from slicegpt.table import write_json

    if options.gguf is not None:
        from slicegpt.checkpoint.gguf_export import export_gguf

        path = export_gguf(
            options.model, options.gguf, options.type or "f16", options.tokenizer, options.overwrite
        )
        size = path.stat().st_size
    else:
        from slicegpt.checkpoint.saving import stored_size
        from slicegpt.checkpoint.stock_export import export_stock

        path = export_stock(options.model, options.output, options.source, options.overwrite)
        size = stored_size(path).bytes
    print(f"saved: {path} ({format_bytes(size)})")
    if options.json:
        write_json(options.json, {"file": str(path), "bytes": size})
