"""`slicegpt finetune`: recover quality lost by slicing with low-rank adapters, merged into the weights."""

import argparse

from slicegpt.checkpoint.names import check_name
from slicegpt.table import check_writable

from .options import add_json, add_self_contained, add_shared, check_device, positive, resolve_device


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "finetune",
        help="recover quality lost by slicing (LoRA; extra: finetune)",
        description=(
            "Train low-rank adapters on a sliced model and merge them into its weights: the same size, better."
            " Several GPUs: torchrun --nproc-per-node N -m slicegpt finetune ..."
        ),
        examples=(
            "slicegpt finetune small --data python-reference --output tuned --max-minutes 15",
            "slicegpt finetune small --data notes.txt --teacher MODEL --output tuned",
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="DIR", help="folder written by slicegpt slice")
    parser.add_argument(
        "--output", required=True, metavar="OUT", help="folder to write; appears only when whole"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, and another run's checkpoints")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUT.checkpoints, if any"
    )
    parser.add_argument(
        "--no-merge", action="store_true", help="write the adapters as a PEFT folder instead of merging them"
    )
    add_self_contained(parser)

    data = parser.add_argument_group("text")
    data.add_argument(
        "--data",
        required=True,
        metavar="DATA[:W],...",
        help="to train on: whatever slice --calibration takes, but text that the model writes",
    )
    data.add_argument(
        "--eval-data", metavar="DATA", help="to evaluate on (default: windows of --data held out)"
    )
    add_shared(data, "--text-column")
    add_shared(data, "--seqlen", default=1024, help="tokens of a window")
    add_shared(data, "--nsamples", default=None, help="windows to train on (default: all of the text)")
    data.add_argument("--eval-samples", type=positive, default=32, metavar="N", help="windows to evaluate on")

    adapters = parser.add_argument_group("what is trained")
    adapters.add_argument(
        "--targets",
        default="inputs",
        metavar="NAMES",
        help="inputs (of attention and MLP), qv, all-linear, or layer names such as q_proj,o_proj",
    )
    adapters.add_argument("--rank", type=int, default=32, metavar="R", help="of the adapters")
    adapters.add_argument("--alpha", type=float, default=10, metavar="A", help="scale: W + A / R * B A")
    adapters.add_argument("--dropout", type=float, default=0.05, metavar="P", help="of the adapters' input")
    adapters.add_argument("--train-shortcuts", action="store_true", help="train the shortcuts too")

    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows a forward pass")
    training.add_argument("--accumulation", type=int, default=4, metavar="N", help="forward passes a step")
    training.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the windows")
    training.add_argument(
        "--max-minutes",
        type=float,
        metavar="M",
        help="end after M minutes; the learning rate falls in that time",
    )
    training.add_argument(
        "--learning-rate", type=float, default=2e-4, metavar="F", help="of the adapters, after the warm-up"
    )
    training.add_argument(
        "--shortcut-scale",
        type=float,
        default=0.03,
        metavar="F",
        help="shortcuts' learning rate over adapters'",
    )
    training.add_argument(
        "--schedule",
        choices=("linear", "cosine", "constant"),
        default="linear",
        help="how the learning rate falls",
    )
    training.add_argument("--warmup", type=float, default=0.05, metavar="F", help="fraction of the run")
    training.add_argument("--weight-decay", type=float, default=0.01, metavar="F", help="of AdamW")
    training.add_argument(
        "--eval-every",
        type=int,
        default=16,
        metavar="N",
        help="steps between evaluations and checkpoints",
    )
    training.add_argument(
        "--patience", type=int, default=5, metavar="N", help="stop after N evaluations without a new best"
    )
    training.add_argument("--teacher", metavar="DIR|MODEL", help="learn a dense model's distribution as well")
    training.add_argument(
        "--teacher-weight", type=float, default=0.5, metavar="F", help="its share of the loss"
    )
    add_shared(training, "--seed")

    machine = parser.add_argument_group("machine")
    add_shared(machine, "--device")
    machine.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="arithmetic; auto is bf16 on GPUs that have it, else fp32. Adapters are always kept in fp32",
    )
    machine.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    import dataclasses

    from slicegpt.calibration import has_columns, load_documents, load_sources, parse_sources
    from slicegpt.errors import renamed
    from slicegpt.finetune import TARGETS, AdapterOptions, Schedule, TrainingOptions

    check_device(options.device)
    check_writable("--json", options.json)
    check_name(options.model, "folder")
    if options.teacher is not None:
        check_name(options.teacher, "teacher")
    named = options.targets in TARGETS or "_" not in options.targets
    targets = options.targets if named else tuple(filter(None, options.targets.replace(" ", "").split(",")))
    adapters = AdapterOptions(targets, options.rank, options.alpha, options.dropout, options.train_shortcuts)
    training = TrainingOptions(
        seqlen=options.seqlen,
        nsamples=options.nsamples,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        epochs=options.epochs,
        max_minutes=options.max_minutes,
        schedule=Schedule(options.learning_rate, options.warmup, options.schedule),
        shortcut_scale=options.shortcut_scale,
        weight_decay=options.weight_decay,
        eval_samples=options.eval_samples,
        eval_every=options.eval_every,
        patience=options.patience,
        precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
        teacher_weight=options.teacher_weight,
        seed=options.seed,
    )
    column, held_out = options.text_column, None
    with renamed(calibration="data"):
        names = [name for name, _ in parse_sources(options.data)]
        if options.eval_data is not None:
            # One column for both texts, or for the one that has columns.
            of_eval = column if has_columns(options.eval_data) else None
            with renamed(spec="eval_data"):
                held_out = load_documents(options.eval_data, "test", of_eval)
            if of_eval is not None and not any(map(has_columns, names)):
                column = None
        sources = load_sources(options.data, column)

    from slicegpt.finetune import finetune
    from slicegpt.progress import Progress
    from slicegpt.table import write_json

    # Under torchrun each process takes the device of its rank.
    device = None if options.device in ("auto", "cuda") else resolve_device(options.device)
    if options.device == "cuda":
        resolve_device("cuda")
    result = finetune(
        options.model,
        sources,
        options.output,
        adapters,
        training,
        eval_documents=held_out,
        teacher=options.teacher,
        source=options.data,
        merged=not options.no_merge,
        self_contained=options.self_contained,
        resume=options.resume,
        overwrite=options.overwrite,
        device=device,
        progress=Progress(),
    )
    if result is None:
        return
    print_result(result)
    if options.json:
        write_json(options.json, dataclasses.asdict(result) | {"output": str(result.output)})


def print_result(result) -> None:
    """Held-out perplexity before and after, and what was trained."""
    import math

    from slicegpt.table import fit_text, format_table

    rows = [
        {
            "": "sliced",
            "held-out loss": result.loss_before,
            "perplexity": math.exp(min(result.loss_before, 700)),
        },
        {
            "": "tuned",
            "held-out loss": result.loss_after,
            "perplexity": math.exp(min(result.loss_after, 700)),
        },
    ]
    print(format_table(rows, list(rows[0])))
    told = (
        f"{result.tokens:,} tokens in {result.steps} steps, {result.seconds:.0f} s;"
        f" {result.trained_parameters:,} parameters trained; kept: step {result.best_step}"
    )
    print(fit_text(told))
    if result.loss_after > result.loss_before:
        print(
            fit_text(
                "note: the held-out loss rose: the tuned model is worse than the sliced one on this text"
            )
        )
