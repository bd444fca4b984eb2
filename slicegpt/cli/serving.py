"""`slicegpt serve`: hand a model over to vLLM's OpenAI-compatible server."""

import argparse


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model on vLLM",
        description="Serve a model through vLLM's OpenAI-compatible server (/v1/completions, /v1/chat/completions).",
        examples=(
            "slicegpt serve small --port 8000",
            "slicegpt serve small --tensor-parallel-size 2 --max-model-len 2048",
        ),
        epilog="Everything behind DIR goes to vLLM, as --port or --tensor-parallel-size do; `DIR --help` lists it.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="DIR|MODEL")
    parser.add_argument(
        "vllm_options", nargs=argparse.REMAINDER, metavar="...", help="options of vLLM's server"
    )


def run(options: argparse.Namespace) -> None:
    import os
    import sys

    from slicegpt.serving.launch import server_command

    command = server_command(options.model, options.vllm_options)
    sys.stdout.flush()
    os.execv(command[0], command)  # signals and the exit code are the server's own from here on
