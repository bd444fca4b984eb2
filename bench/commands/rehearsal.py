"""`bench/gpu.sh --rehearse` killed at random moments: does its archive hold all that was done?

    python -m slicegpt.bench.commands.rehearsal --kills 6 --seed 1 --json rehearsal.json
    python -m slicegpt.bench.commands.rehearsal --model FOLDER         # only the tiny model that a rehearsal measures

Every phase is started and killed with all its processes (SIGKILL) after a random time, and started again; at last it
runs to its end. After every kill the archive must open, and hold the log of every step that had ended, marked "ok" or
"failed", and the result file of those that write one. At the end all steps must have passed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from slicegpt.bench.harness.record import write_results
from slicegpt.errors import SliceGPTError
from slicegpt.table import check_writable, format_table

SCRIPT = Path(__file__).resolve().parents[1] / "gpu.sh"
PHASES = (1, 2, 3)
# From a step's end to its place in the archive; a kill in between loses nothing, because the file is on disk already.
GRACE = 2.0


def save_tiny_model(folder: Path) -> None:
    """A Llama of two layers of width 64 with random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>").save_pretrained(
        folder
    )


def ended_steps(work: Path) -> dict[str, str]:
    """Step -> what its run left on disk, of those that have ended: ok, failed, stopped or not run."""
    found = {}
    for file in work.glob("*/steps/*"):
        state = file.read_text(encoding="utf-8").strip()
        if state and state != "running":
            found[file.name] = state
    return found


def archived(archive: Path) -> dict[str, bytes]:
    """Name -> content of every file in an archive; reading all of it shows that it is whole."""
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def missing_of(archive: Path, ended: dict[str, str]) -> list[str]:
    """What the archive lacks of these ended steps."""
    if not ended:
        return []
    if not archive.exists():
        return [f"there is no archive, but {len(ended)} steps have ended"]
    files, lacking = archived(archive), []
    for name, state in ended.items():
        kept = files.get(f"steps/{name}", b"").decode().strip()
        if kept != state:
            lacking.append(f"{name}: {state!r} on disk, {kept!r} in the archive")
        elif not state.startswith("not run") and f"{name}.log" not in files:
            lacking.append(f"{name}: no log")
    return lacking


def run_phase(output: Path, phase: int, environment: dict, seconds: float | None) -> tuple[int | None, str]:
    """One call of the script: its exit status, None where it was killed after so many seconds, and what it printed."""
    command = ["bash", str(SCRIPT), "--rehearse", str(output), str(phase)]
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_session(process)
            status = None
        printed.seek(0)
        return status, printed.read().decode(errors="replace")


def kill_session(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all that it started, also to those that lead process groups of their own."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # Fields behind the name, which may hold blanks: state, parent, process group, session.
            session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            if session == process.pid and int(entry.name) != process.pid:
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, ValueError, IndexError):
            continue
    process.kill()
    process.wait()


def rehearse(phases: list[int], kills: int, longest: float, generator: random.Random) -> list[dict]:
    """A row for every call of the script."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        output, work = Path(folder) / "out", Path(folder) / "work"
        environment = os.environ | {
            "SLICEGPT_GPU_WORK": str(work),
            "SLICEGPT_GPU_PACK_SECONDS": "1",
            "SLICEGPT_GPU_SECONDS": "3600",
            "PYTHON": sys.executable,
        }
        for phase in phases:
            for attempt in range(kills + 1):
                limit = generator.uniform(0, longest) if attempt < kills else None
                before, began = ended_steps(work), time.monotonic()
                status, text = run_phase(output, phase, environment, limit)
                # Steps of this phase that had ended some time before the kill.
                archive, ended = output / f"gpu-{phase}.tar.gz", ended_steps(work)
                settled = {
                    name: state
                    for name, state in ended.items()
                    if status is not None
                    or name in before
                    or time.time() - next(work.glob(f"*/steps/{name}")).stat().st_mtime > GRACE
                }
                lost = missing_of(archive, settled) if archive.exists() or settled else []
                rows.append(
                    {
                        "phase": phase,
                        "killed after": limit if status is None else None,
                        "seconds": time.monotonic() - began,
                        "steps": len(ended),
                        "lost": len(lost),
                        "status": status,
                    }
                )
                if lost:
                    raise SliceGPTError(f"phase {phase}: the archive lacks {'; '.join(lost)}\n{text}")
                if status is not None:
                    break
            if status != 0:
                raise SliceGPTError(f"phase {phase} ended with status {status}:\n{text}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FOLDER", help="write the tiny model, and nothing else")
    parser.add_argument("--phases", type=int, nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--kills", type=int, default=4, help="of each phase")
    parser.add_argument(
        "--longest", type=float, default=60, help="seconds after which a phase is killed at last"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.model:
        save_tiny_model(Path(options.model))
        return
    check_writable("--json", options.json)
    rows = rehearse(options.phases, options.kills, options.longest, random.Random(options.seed))
    print(format_table(rows, list(rows[0])))
    write_results(options.json, "rehearsal", {"rows": rows})


if __name__ == "__main__":
    main()
