"""`slicegpt push`: publish a sliced folder on the Hugging Face hub."""

import argparse
from pathlib import Path

from slicegpt.errors import SliceGPTError

from .options import add_self_contained


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="publish a sliced model on the hub",
        description="Upload a sliced folder to the Hugging Face hub with its model card; log in with `hf auth login`.",
        examples=(
            "slicegpt push small user/smollm2-small --private",
            "slicegpt push small user/smollm2-small --revision v2",
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("repo_id", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: the main one)")
    add_self_contained(parser)


def run(options: argparse.Namespace) -> None:
    if not Path(options.folder).is_dir():
        raise SliceGPTError(f"{options.folder} is no folder", "folder")
    from slicegpt.checkpoint.hub import push_folder

    address = push_folder(
        options.folder,
        options.repo_id,
        options.private,
        revision=options.revision,
        self_contained=options.self_contained,
    )
    print(address)
