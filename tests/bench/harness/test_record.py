"""What results say of the machine they were measured on."""

import pytest

from slicegpt.bench.harness.record import without_folders


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            "slicegpt bench token --model /home/me/models/llama-25 --json /tmp/x.json",
            "--model llama-25 --json x.json",
        ),
        ("--calibration /data/a.txt:8,/data/b.txt:1", "--calibration a.txt:8,b.txt:1"),
        ("--model=~/models/x", "--model=x"),
        ("--model meta-llama/Llama-2-7b-hf runs/x", "--model meta-llama/Llama-2-7b-hf runs/x"),
        ("45 GB/s, 1/2", "45 GB/s, 1/2"),
    ],
)
def test_results_name_no_folders_of_this_machine(text, kept):
    assert without_folders(text).endswith(kept)
    assert without_folders({"a": [text]})["a"][0].endswith(kept)
