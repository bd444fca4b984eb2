"""`slice`, `evaluate` and `load` against the same steps taken by hand, and what they say to bad input."""

import json
import re

import pytest
import torch
from support.saved_models import save_dense, save_text
from support.tiny_models import tiny_model

from slicegpt import api
from slicegpt.calibration import load_sources, sample_sources
from slicegpt.checkpoint.loading import load_dense
from slicegpt.cli import main
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.size_plan import choices_for_parameters, plan_for_parameters
from slicegpt.conversion.speed_plan import dense_config, step_units
from slicegpt.errors import SliceGPTError
from slicegpt.evaluation.perplexity import perplexity
from slicegpt.families import canonical_fields
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.progress import Progress
from slicegpt.recipe import IN_MEMORY, Recipe
from slicegpt.slicing import SlicingOptions, slice_model
from slicegpt.step_times import StepTimes

# Eight samples are few, which slicing says; the warning has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:the calibration text is small")

SMALL = {"round_to": 4, "nsamples": 8, "seqlen": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    return save_text(tmp_path_factory.mktemp("text") / "train.txt", documents)


@pytest.fixture(scope="module")
def sliced_folder(folder, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("sliced") / "small"
    api.slice(folder, keep=0.9, calibration=text, output=output, **SMALL)
    return output


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# --- slice ---


def by_hand(folder, text, config_of, options):
    model, tokenizer = load_dense(str(folder))
    drawn = sample_sources(load_sources(str(text)), tokenizer, 8, 32)
    found = config_of(canonical_fields(model))
    config, *others = found if isinstance(found, list) else [found]
    return slice_model(model, config, drawn.batches, options, None, drawn.held_out, alternatives=others)


HAND_MADE = {
    "slice": (
        {"slice": 0.25},
        lambda fields: plan(fields, constant_widths(fields, 36), Shape(round_to=4)),
        {},
    ),
    "keep": (
        {"keep": 0.9},
        lambda fields: choices_for_parameters(
            fields, int(0.9 * fields["source_parameters"]), Shape(round_to=4, neurons=None), "prices"
        ),
        {"allocate": "prices"},
    ),
    "widths": (
        {"widths": [36, 40, 40, 32, 40, 44, 48], "ridge": 0.3, "signal": "normalized", "seed": 42},
        lambda fields: plan(fields, [36, 40, 40, 32, 40, 44, 48], Shape(round_to=4)),
        {"ridge": 0.3, "signal": "normalized"},
    ),
    "bytes, without the refit": (
        {"target_bytes": 250e3, "refit": False, "orientation": "pca"},
        lambda fields: plan_for_parameters(fields, 62_500, Shape("dense", "pca", round_to=4)),
        {"refit": False, "orientation": "pca"},
    ),
}


@pytest.mark.parametrize("case", HAND_MADE)
def test_slice_is_slice_model_by_hand(folder, text, case):
    """Bit for bit."""
    choices, config_of, options = HAND_MADE[case]
    model, tokenizer, report = api.slice(folder, calibration=text, **choices, **SMALL)
    expected, seen = by_hand(folder, text, config_of, SlicingOptions(neuron_multiple=4, **options))
    assert_same_weights(model, expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert report.record["size"]["parameters"] == stored_parameters(expected.config)
    assert [entry["block"] for entry in report.record["refit"]] == [entry["block"] for entry in seen.refit]
    assert tokenizer("a for statement").input_ids == load_dense(str(folder))[1]("a for statement").input_ids
    assert not model.training


def test_as_fast_as_asked(folder, text, tmp_path):
    """By the times that are given; and the recipe in the folder repeats it without measuring."""
    times = StepTimes(1e-4, 1e-5, 4e-9, 9e-9, 6e-9)
    output = tmp_path / "out"
    model, _, report = api.slice(
        folder,
        target_speedup=1.2,
        step_times=str(times),
        calibration=text,
        output=output,
        timing=False,
        **SMALL,
    )
    fields = canonical_fields(load_dense(str(folder))[0])
    faster = step_units(dense_config(fields), times) / step_units(model.config, times)
    # One more neuron, or four columns, are less than a twentieth of this model's step.
    assert 1.2 <= faster < 1.26
    assert "asked 1.20 times the dense model's tokens/s, not measured" in str(report)
    assert_same_weights(api.slice(recipe=output, timing=False, device="cpu").model, model)


def test_a_loaded_model_is_left_as_it_was(folder, text):
    model, tokenizer = load_dense(str(folder))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = api.slice(model, tokenizer=tokenizer, slice=0.25, calibration=text, **SMALL)
    assert model.training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    named = api.slice(folder, slice=0.25, calibration=text, **SMALL)
    assert_same_weights(result.model, named.model)
    assert result.report.record["source"] == named.report.record["source"] == str(folder)


def test_documents_instead_of_a_file(folder, text, tmp_path):
    """The same text gives the same model; the recipe says that no file can name it."""
    named = api.slice(folder, slice=0.25, calibration=text, **SMALL)
    output = tmp_path / "out"
    given = api.slice(folder, slice=0.25, calibration=[text.read_text()], output=output, **SMALL)
    assert_same_weights(given.model, named.model)
    assert Recipe.read(output).calibration == IN_MEMORY
    with pytest.raises(SliceGPTError, match="calibration: the recipe's run had documents that no file"):
        api.slice(recipe=output)
    again = api.slice(recipe=output, calibration=[text.read_text()], device="cpu")
    assert_same_weights(again.model, named.model)


def test_the_report_prints_what_the_command_prints(folder, text, sliced_folder, tmp_path, capsys):
    output = tmp_path / "out"
    report = api.SliceReport(json.loads((sliced_folder / "slicing.json").read_text()), str(output))
    command = ["slice", str(folder), "--keep", "0.9", "--round-to", "4", "--nsamples", "8"]
    more = ["--seqlen", "32", "--calibration", str(text), "--output", str(output)]
    assert main([*command, *more]) == 0
    printed = capsys.readouterr().out.removesuffix("\n")
    assert without_times(printed) == without_times(str(report))
    assert "eigenvalues" in report.record
    assert report.summary.keys() == report.record.keys() - {"eigenvalues"}
    assert report.warnings == report.record["calibration"]["warnings"]


def without_times(text: str) -> str:
    """Without what differs from run to run, and the widths of the columns that it stands in."""
    text = re.sub(r"^tokens/s, cpu.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"[ -]+", " ", re.sub(r"in [\d.]+ s$", "", text, flags=re.MULTILINE))


def test_small_text_is_told(folder, text, capsys):
    choices = {"slice": 0.25, "calibration": text} | SMALL
    with pytest.warns(UserWarning, match="the calibration text is small: 256 tokens"):
        api.slice(folder, **choices)
    api.slice(folder, **choices, progress=Progress())
    assert "warning: the calibration text is small" in capsys.readouterr().err


# --- recipes ---


@pytest.mark.parametrize(
    "choices",
    [
        {"keep": 0.9},
        {"slice": 0.25, "shortcut": "dense", "refit": False, "orientation": "random", "seed": 3},
        {"widths": [36, 40, 40, 32, 40, 44, 48], "dtype": "bfloat16", "vocabulary_prior": 0.1},
        {"target_bytes": 250e3, "neurons": 0.1, "allocate": "uniform", "refit_share": 0.5, "batch_size": 2},
    ],
)
def test_a_folder_s_recipe_makes_it_again(folder, text, tmp_path, choices):
    """Bit for bit, through the call and through the command."""
    api.slice(folder, calibration=f"{text}:3,self:1", output=tmp_path / "first", **choices, **SMALL)
    recipe = Recipe.read(tmp_path / "first")
    assert recipe.model == str(folder)
    assert recipe.choices().items() >= {name: choices[name] for name in choices}.items()
    assert recipe == recipe.resolved()
    api.slice(recipe=tmp_path / "first", output=tmp_path / "call", device="cpu")
    command = [
        "slice",
        "--recipe",
        str(tmp_path / "first/recipe.toml"),
        "--output",
        str(tmp_path / "command"),
    ]
    assert main([*command, "--device", "cpu"]) == 0
    first = (tmp_path / "first/model.safetensors").read_bytes()
    for name in ("call", "command"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == first
        assert Recipe.read(tmp_path / name) == recipe


def test_what_is_given_comes_before_the_recipe(folder, text, tmp_path):
    recipe = Recipe(model="no/such/model", keep=0.9, calibration="no/such/text", nsamples=8, round_to=4)
    recipe.write(tmp_path / "recipe.yaml")
    model, _, report = api.slice(
        folder, recipe=tmp_path / "recipe.yaml", slice=0.25, calibration=text, seqlen=32, device="cpu"
    )
    assert set(model.config.boundary_widths[:-1]) == {36}
    assert report.record["calibration"]["nsamples"] == 8
    options = ["--slice", "0.25", "--calibration", str(text), "--seqlen", "32", "--nsamples", "9"]
    command = ["slice", str(folder), "--recipe", str(tmp_path / "recipe.yaml"), *options]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    written = Recipe.read(tmp_path / "out")
    assert (written.model, written.slice, written.keep) == (str(folder), 0.25, None)
    assert (written.nsamples, written.round_to) == (9, 4)


def test_the_former_name_of_keep(folder, text, sliced_folder):
    again = api.slice(folder, params=0.9, calibration=text, **SMALL)
    assert_same_weights(again.model, load_dense(str(sliced_folder))[0])
    with pytest.raises(
        SliceGPTError, match="params: is the former name of keep; only one of them can be given"
    ):
        api.slice(folder, params=0.9, keep=0.9, calibration=text, **SMALL)


def test_the_card_names_the_recipe(sliced_folder, folder, text):
    assert "All choices: `recipe.toml`" in (sliced_folder / "README.md").read_text()


# --- evaluate and load ---


def test_evaluate_is_perplexity_by_hand(sliced_folder, documents):
    model, tokenizer = load_dense(str(sliced_folder))
    expected = perplexity(model, tokenizer, documents, 64, 2, 6)
    named = api.evaluate(
        sliced_folder, data="python-reference", seqlen=64, batch_size=2, max_windows=6, device="cpu"
    )
    loaded = api.evaluate(model, tokenizer=tokenizer, data=documents, seqlen=64, batch_size=2, max_windows=6)
    for evaluation in (named, loaded):
        assert evaluation.perplexity.nll == expected.nll
        assert evaluation.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert evaluation.dtype == "float32"
        assert evaluation.zero_shot is None
        assert evaluation.record["perplexity"] == expected.perplexity
    assert f"{expected.perplexity:.4g}" in str(named)


def test_load(folder, sliced_folder):
    dense, tokenizer = api.load(folder)
    assert (dense.dtype, dense.device.type, dense.training) == (torch.float32, "cpu", False)
    assert tokenizer("a").input_ids
    for dtype in ("bfloat16", torch.bfloat16):
        assert api.load(sliced_folder, dtype)[0].dtype == torch.bfloat16
    assert api.load(str(sliced_folder), device="cpu")[0].config.model_type == "slicegpt"


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "size: one of keep, slice, target_bytes, target_speedup, widths is needed, got none"),
        ({"keep": 0.9, "slice": 0.1}, "size: only one size can be asked for, got keep and slice"),
        ({"keep": 1.5}, r"keep: must lie in \(0, 1\], got 1.5"),
        ({"keep": 0.1}, r"keep: \d+ elements cannot be reached; at width"),
        ({"slice": 0.9}, "slice: boundary 0 would keep 4 of 48 columns, less than one attention head"),
        ({"widths": [48] * 3}, "widths: must be 7, one a boundary, got 3"),
        ({"slice": 0.1, "parms": 1}, "parms: is no choice of a recipe, got 1; did you mean keep"),
        ({"slice": 0.1, "calibration": "no/such.txt"}, "calibration: no/such.txt is no file or folder"),
        ({"slice": 0.1, "calibration": [3]}, "calibration: must name a text or be a list of doc.*, got int"),
        ({"slice": 0.1, "calibration": 3}, "calibration: must name a text or be a list of doc.*, got int"),
        ({"slice": 0.1, "calibration": [" "]}, "calibration: the documents hold no text"),
        (
            {"slice": 0.1, "text_column": "body"},
            "text_column: .* has no .jsonl, .json, .csv, .tsv or .parquet file, got 'body'",
        ),
        ({"slice": 0.1, "nsamples": 10**6}, "nsamples: 1000000 samples of 32 tokens need"),
        ({"slice": 0.1, "device": "tpu9"}, r"device: expected cpu or cuda\[:N\], got 'tpu9'"),
        ({"slice": 0.1, "activation_storage": "tape"}, "must be one of auto, device, host, disk, got 'tape'"),
        ({"slice": 0.1, "recipe": "no/such.toml"}, "recipe: cannot read no/such.toml"),
        ({"slice": 0.1, "output": "/proc/no/out"}, "output: cannot make the folder /proc/no"),
    ],
)
def test_errors_of_slice_name_the_argument(folder, text, arguments, message):
    with pytest.raises(SliceGPTError, match=f"^{message}" if ":" in message else message):
        api.slice(folder, **({"calibration": text} | SMALL | arguments))


def test_errors_about_the_model(text, tiny_tokenizer):
    model = tiny_model("llama", torch.float32)
    for arguments, message in (
        ({}, "^model: a name, a folder or a transformers model is needed, got none"),
        ({"model": 3}, "^model: must be a name, a folder or a transformers model, got int"),
        ({"model": model}, "^tokenizer: is needed beside a loaded model, got None"),
        (
            {"model": model, "tokenizer": tiny_tokenizer, "dtype": "bfloat16"},
            "^dtype: a loaded model keeps its own, float32, got bfloat16",
        ),
    ):
        with pytest.raises(SliceGPTError, match=message):
            api.slice(**arguments, slice=0.25, calibration=text, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "no/such.txt"}, "data: no/such.txt is no file or folder"),
        ({"data": ["short"]}, "data: the text has .* less than one window"),
        ({"data": "python-reference", "split": "dev"}, "split: must be 'train' or 'test', got 'dev'"),
        ({"data": "python-reference", "seqlen": 1}, "seqlen: must be at least 2, got 1"),
        ({"data": "python-reference", "dtype": "int8"}, "dtype: must be a floating dtype .*, got 'int8'"),
    ],
)
def test_errors_of_evaluate_name_the_argument(folder, arguments, message):
    with pytest.raises(SliceGPTError, match=f"^{message}"):
        api.evaluate(folder, **({"seqlen": 32, "device": "cpu"} | arguments))


def test_existing_output(folder, text, sliced_folder):
    with pytest.raises(SliceGPTError, match=r"^output: .*exists already"):
        api.slice(folder, slice=0.25, calibration=text, output=sliced_folder, **SMALL)
    assert (sliced_folder / "recipe.toml").is_file()
