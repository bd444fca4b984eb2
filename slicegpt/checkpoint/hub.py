"""Publishing a sliced folder on the Hugging Face hub, with the model card that its `slicing.json` makes."""

import json
from pathlib import Path

from slicegpt.checkpoint.loading import check_folder
from slicegpt.checkpoint.model_card import model_card
from slicegpt.checkpoint.saving import read_record
from slicegpt.checkpoint.self_contained import config_text, modeling_files, with_auto_map
from slicegpt.errors import SliceGPTError
from slicegpt.recipe import FILE_NAME


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    self_contained: bool = True,
) -> str:
    """Upload what `slicegpt slice` wrote, in one commit.

    Args:
        folder: the sliced model.
        repo_id: `USER/NAME` on the hub (or at `HF_ENDPOINT`); it is made where it does not exist. The model card
            names it in its example.
        private: make a new repository private.
        token: of the account; None takes the one that `hf auth login` stored, or `HF_TOKEN`.
        revision: the branch; None is the main one.
        self_contained: with the modelling code, also where the folder has none; else without it.

    Returns:
        The commit's address.

    Errors:
        `SliceGPTError` for a folder without weights or record, and whatever the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    if not folder.is_dir():
        raise SliceGPTError(f"{folder} is no folder", "folder")
    check_folder(folder)
    record = read_record(folder)
    if record is None:
        raise SliceGPTError(f"{folder} has no slicing.json: it was not written by slicegpt slice", "folder")
    files = upload_of(folder, self_contained)
    files["README.md"] = model_card(record, repo_id, self_contained, (folder / FILE_NAME).is_file()).encode()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()
    ]
    hub = HfApi(token=token)
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.create_commit(
            repo_id, operations, commit_message="Upload sliced model", revision=revision
        )
    except Exception as error:  # the hub's own errors, and those of the network below it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SliceGPTError(f"the hub did not take {repo_id!r}: {reason[:300]}", "repo_id") from error
    return commit.commit_url


def upload_of(folder: Path, self_contained: bool) -> dict[str, str | bytes]:
    """What of a folder goes into a repository: name -> path of the file, or content that differs from it."""
    files: dict[str, str | bytes] = {
        file.name: str(file) for file in sorted(folder.iterdir()) if file.is_file()
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = modeling_files()
    # A folder that transformers' `save_pretrained` wrote may name code that it does not hold.
    if self_contained == ("auto_map" in config) == (code.keys() <= files.keys()):
        return files
    files["config.json"] = config_text(with_auto_map(config, self_contained)).encode()
    return (
        files | code if self_contained else {name: file for name, file in files.items() if name not in code}
    )
