"""Damaged and odd inputs, drawn by hypothesis: a model that computes what transformers' does, or one line of error.

`SLICEGPT_FUZZ_EXAMPLES` sets how many inputs each test draws (40: some seconds); a longer search takes thousands.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.gguf_files import architecture_settings, write_gguf
from support.tiny_models import in_float64, relative_error, tiny_model, token_ids

from slicegpt.calibration import load_documents, sample_batches
from slicegpt.checkpoint.loading import load_dense
from slicegpt.cli import main
from slicegpt.errors import SliceGPTError
from slicegpt.runtime import to_canonical

EXAMPLES = int(os.environ.get("SLICEGPT_FUZZ_EXAMPLES", "40"))
# Without a random seed a run tests the same inputs every time; a longer search draws new ones.
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 40,
    phases=[Phase.generate],  # shrinking takes many times as long as finding
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
fewer = settings(bounded, max_examples=max(1, EXAMPLES // 4))

FAMILIES = ("llama-tied", "mistral-window", "qwen2", "opt", "phi", "phi3-long")
FAMILIES += ("gemma", "granite", "gpt-neox", "cohere")
ARCHITECTURES = ("llama-tied", "mistral-window", "phi3-long", "stablelm", "starcoder2")
STRAYS = (
    "partial_rotary_factor",
    "is_causal",
    "head_dim",
    "sliding_window",
    "layer_types",
    "rope_scaling",
    "auto_map",
)

ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**20,
        2**63,
        1e30,
        float("nan"),
        float("inf"),
        "",
        "gelu",
        "linear",
        [],
        [1],
        {},
    ]
)
VALUES = ODD | st.integers(-3, 70) | st.floats(-4, 4) | st.text(max_size=4) | st.lists(ODD, max_size=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    made = {}
    for case in FAMILIES:
        folder = made[case] = tmp_path_factory.mktemp(case)
        tiny_model(case, torch.float32, vocab_size=512, num_hidden_layers=2).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    return made


def result_or_line(action):
    """What `action` returns, or None where it raised the error of bad input, in one line."""
    try:
        return action()
    except SliceGPTError as error:
        line = str(error)
    assert line
    assert "\n" not in line
    return None


@torch.no_grad()
def one_line_or_the_same_model(name: Path) -> None:
    def load():
        model, _ = load_dense(str(name), torch.float64, sliceable=True)
        return model, to_canonical(model)

    pair = result_or_line(load)
    if pair is None:
        return
    model, canonical = pair
    ids = token_ids(2)
    expected, actual = in_float64(model)(ids).logits, canonical(ids).logits
    if expected.isfinite().all() and expected.any():
        assert relative_error(actual, expected) < 1e-8


@bounded
@given(st.data())
def test_config(folders, data):
    """Up to three fields of a config.json, or of its rotary settings, take odd values or go."""
    folder = folders[data.draw(st.sampled_from(FAMILIES))]
    config = json.loads((folder / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place = config
        if isinstance(config.get("rope_parameters"), dict) and data.draw(st.booleans()):
            place = config["rope_parameters"]
        name = data.draw(
            st.sampled_from([*place, *STRAYS] if place is config else [*place, "factor", "rope_type"])
        )
        if data.draw(st.integers(0, 5)):
            place[name] = data.draw(VALUES)
        else:
            place.pop(name, None)
    broken = folder.parent / "config"
    shutil.copytree(folder, broken, dirs_exist_ok=True)
    (broken / "config.json").write_text(json.dumps(config))
    one_line_or_the_same_model(broken)


@bounded
@given(st.data())
def test_safetensors_header(folders, data):
    """Names, dtypes, shapes and offsets of a header, or bytes of it."""
    folder = folders["llama-tied"]
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    if data.draw(st.booleans()):
        entries = json.loads(header)
        name = data.draw(st.sampled_from([name for name in entries if name != "__metadata__"]))
        change = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone", "entry"]))
        if change == "name":
            entries[data.draw(st.text(max_size=8) | st.sampled_from(list(entries)))] = entries.pop(name)
        elif change == "gone":
            del entries[name]
        elif change == "entry":
            entries[name] = data.draw(VALUES)
        else:
            dtypes = st.sampled_from(["F16", "BF16", "F64", "I8", "U8", "F8_E4M3", "I64", "BOOL"])
            sizes = st.lists(st.integers(-1, 600) | ODD, max_size=3)
            entries[name][change] = data.draw(dtypes if change == "dtype" else sizes | VALUES)
        header = json.dumps(entries).encode()
        content = len(header).to_bytes(8, "little") + header + rest
    else:
        position = data.draw(st.integers(0, 8 + length - 1))
        content = content[:position] + data.draw(st.binary(min_size=1, max_size=4)) + content[position + 1 :]
    broken = folder.parent / "header"
    shutil.copytree(folder, broken, dirs_exist_ok=True)
    (broken / "model.safetensors").write_bytes(content)
    one_line_or_the_same_model(broken)


@bounded
@given(st.data())
def test_gguf_metadata(tmp_path_factory, tiny_tokenizer, data):
    """Settings of a GGUF file, or bytes of its header."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    case = data.draw(st.sampled_from(ARCHITECTURES))
    model = tiny_model(case, torch.float32, vocab_size=512, num_hidden_layers=2)
    keys = [
        *architecture_settings(model),
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
    ]
    keys += ["attention.key_length", "attention.sliding_window", "expert_count"]
    scalars = st.sampled_from([0, 1, -1, 2**40, 1e30, float("nan"), True, "", "yarn", "linear", [1, 2]])
    metadata = data.draw(
        st.dictionaries(st.sampled_from(keys), st.none() | scalars | st.integers(0, 70), max_size=2)
    )
    file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    write_gguf(file, model, tiny_tokenizer, metadata)
    if data.draw(st.booleans()):
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
    one_line_or_the_same_model(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ROWS = st.builds(
    json.dumps, st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=[]))}) | JSON
)


@bounded
@given(
    st.lists(ROWS.map(str.encode) | st.binary(max_size=9), max_size=4),
    st.sampled_from(["a.jsonl", "a.JSON", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.json.xz"]),
    st.booleans(),
)
def test_text(tmp_path_factory, tiny_tokenizer, rows, name, varied):
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(b"\n".join(rows))
    documents = result_or_line(lambda: load_documents(str(file)))
    if documents is not None:
        assert all(isinstance(document, str) and document.strip() for document in documents)
        result_or_line(lambda: sample_batches(documents, tiny_tokenizer, 1, 4, varied_seqlen=varied))


ODD_NUMBERS = ["0", "1", "-1", "2", "0.25", "0.999", "1e-320", "1e400", "nan", "-inf", "1e18"]
ODD_NUMBERS += ["9" * 30, "x", "٣", "auto"]
NUMBERS = st.sampled_from([*ODD_NUMBERS, ""]) | st.integers(-2, 70).map(str) | st.floats(-1, 2).map(str)
SLICE = {
    "--slice": None,
    "--keep": None,
    "--target-bytes": None,
    "--round-to": "4",
    "--neurons": None,
    "--ridge": None,
    "--refit-share": None,
    "--vocabulary-prior": None,
    "--nsamples": "4",
    "--seqlen": "16",
    "--batch-size": "2",
    "--seed": None,
    "--max-shard-size": None,
}
GENERATE = ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed")


def run(*arguments) -> int:
    try:
        return main(list(map(str, arguments)))
    except SystemExit as error:  # argparse's own errors
        return error.code


@fewer
@given(st.data())
def test_numbers_of_slice(folders, tmp_path_factory, capsys, data):
    """An exit code of 0 and a whole model, or of 2 and nothing; the last line of the latter is the error."""
    base = tmp_path_factory.mktemp("slice")
    text = base / "text.txt"
    text.write_text(" ".join(f"word {index} and" for index in range(400)))
    names = data.draw(st.lists(st.sampled_from(sorted(SLICE)), min_size=1, max_size=3, unique=True))
    drawn = {name: data.draw(NUMBERS) for name in names}
    if not {"--slice", "--keep", "--target-bytes"} & set(drawn):
        drawn["--slice"] = "0.25"
    chosen = {name: value for name, value in (SLICE | drawn).items() if value is not None}
    options = [part for name, value in chosen.items() for part in ([f"{name}={value}"])]
    code = run("slice", folders["llama-tied"], "--output", base / "out", "--calibration", text, *options)
    errors = capsys.readouterr().err.strip().splitlines()
    assert code in (0, 2), options
    assert (base / "out").exists() == (code == 0)
    assert {path.name for path in base.iterdir()} <= {"out", "text.txt"}
    if code:
        assert ": error: " in errors[-1]
    else:
        load_dense(str(base / "out"))[0](token_ids(1))
    shutil.rmtree(base)


@fewer
@given(st.dictionaries(st.sampled_from(GENERATE), NUMBERS, max_size=3))
def test_numbers_of_generate(folders, capsys, drawn):
    options = [f"{name}={value}" for name, value in ({"--max-new-tokens": "2"} | drawn).items()]
    code = run("generate", folders["opt"], "--prompt", "some text", "--sample", *options)
    errors = capsys.readouterr().err.strip().splitlines()
    assert code in (0, 2), options
    if code:
        assert ": error: " in errors[-1]
