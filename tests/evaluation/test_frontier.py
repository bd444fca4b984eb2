"""The quality frontier: true sizes, what each method stores, resuming, and the command."""

import contextlib
import io
import json
import math
import os
import re
import sys
from itertools import pairwise

import pytest
import torch
from support.command_line import bad
from support.saved_models import save_dense, save_text
from support.tiny_models import tiny_model

import slicegpt.evaluation.frontier
import slicegpt.evaluation.sparsegpt
from slicegpt.bench.commands import bench_frontier
from slicegpt.calibration import CalibrationBatch, encode_text, load_documents, sample_batches
from slicegpt.checkpoint.loading import load_dense
from slicegpt.cli import main
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.stock_plan import with_own_head
from slicegpt.errors import SliceGPTError
from slicegpt.evaluation.frontier import cut_text, loss_ratio, table_rows
from slicegpt.evaluation.methods import BASES, METHODS, describe_widths, plan_point
from slicegpt.evaluation.perplexity import perplexity
from slicegpt.evaluation.sparsegpt import check_2_4, decoder_linears, sparse_sizes, sparsegpt_2_4
from slicegpt.families import canonical_fields
from slicegpt.modeling.sizes import decoder_parameters, stored_parameters
from slicegpt.progress import Progress
from slicegpt.slicing import SlicingOptions, slice_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A dense model with a tied head and a tokenizer."""
    path = tmp_path_factory.mktemp("dense") / "model"
    return save_dense(path, tiny_tokenizer, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    return save_text(tmp_path_factory.mktemp("text") / "some, text: in a file.txt", documents, 30_000)


def arguments(folder, text, output, *more):
    small = ["--nsamples", "8", "--seqlen", "32", "--windows", "3", "--round-to", "4"]
    return [
        "frontier",
        str(folder),
        "--sizes",
        "0.95,0.85",
        *small,
        "--calibration",
        str(text),
        "--data",
        f"python-reference,{str(text).replace(',', chr(92) + ',')}",
        "--output",
        str(output),
        *more,
    ]


def test_what_published_stores(folder):
    """Counted by hand: sliced table, dense shortcuts behind every block, an untied head as wide as the model."""
    model, _ = load_dense(str(folder))
    fields = canonical_fields(model)
    (config,) = plan_point(METHODS["published"], fields, 0.95, "decoder", 4)
    width, dense, vocabulary = config.boundary_widths[0], fields["dense_hidden_size"], fields["vocab_size"]
    assert width % 8 == 0  # its own rounding, not the caller's
    layers, mlp = fields["num_hidden_layers"], fields["intermediate_size"]
    heads = fields["num_attention_heads"] * (fields["head_dim"] or dense // fields["num_attention_heads"])
    keys = heads // fields["num_attention_heads"] * fields["num_key_value_heads"]
    per_layer = width * (heads + 2 * keys) + heads * width + 3 * width * mlp + 2 * width * width
    last = (dense - width) * (mlp + width)  # the last MLP and its shortcut lead to all columns
    assert decoder_parameters(config) == layers * per_layer + last
    assert stored_parameters(config) == layers * per_layer + last + vocabulary * (width + dense)


@pytest.mark.parametrize("family", ["llama-tied", "opt", "qwen3-tied"])
@torch.no_grad()
def test_untied_is_the_same_network(family):
    """Tied and untied forms of one slicing give the same logits; only what is stored differs."""
    model = tiny_model(family, torch.float64)
    fields = canonical_fields(model)
    width = fields["dense_hidden_size"] * 3 // 4
    ids = torch.arange(96).view(4, 24) % model.config.vocab_size
    batches = [CalibrationBatch(ids, torch.ones_like(ids))]
    logits = []
    for each in (fields, with_own_head(fields)):
        config = plan(each, constant_widths(each, width), Shape("dense"))
        sliced, _ = slice_model(model, config, batches, SlicingOptions(torch.float64, refit=False))
        logits.append(sliced(ids).logits)
    # Both are the same product in another order, in float64.
    assert torch.allclose(*logits, rtol=1e-9, atol=1e-9 * logits[0].abs().max().item())


@pytest.mark.parametrize("basis", ["total", "decoder"])
@pytest.mark.parametrize("method", METHODS)
def test_the_widest_that_fits(folder, basis, method):
    fields = canonical_fields(load_dense(str(folder))[0])
    config, *narrower = plan_point(METHODS[method], fields, 0.8, basis, 4)
    count = BASES[basis]
    dense = plan(fields, constant_widths(fields, fields["dense_hidden_size"]))
    limit = 0.8 * (fields["source_parameters"] if basis == "total" else count(dense))
    step = METHODS[method].round_to or 4
    own = with_own_head(fields) if METHODS[method].untied else fields
    width, shape = config.boundary_widths[0], Shape.of(METHODS[method].recipe())
    if width == own["dense_hidden_size"]:  # at full width, as many neurons as fit
        step = 1 if method == "ours" else step  # they are multiples once they are shared out
        larger = plan(own, constant_widths(own, width), shape, config.intermediate_size + step)
    else:  # of a stock form half of the neurons go before a column does
        stock = shape.form != "sliced"
        fewest = own["intermediate_size"] // 2 if stock else None
        larger = plan(own, constant_widths(own, width + step, stock), shape, fewest)
    assert count(config) <= limit + 0.5 < count(larger)
    # Narrower choices of the same size keep more neurons.
    assert (len(narrower) > 0) == (method == "ours")
    for more, less in pairwise([config, *narrower]):
        assert more.boundary_widths[0] > less.boundary_widths[0]
        assert more.intermediate_size < less.intermediate_size
        assert limit - 3 * 3 * 48 < count(less) <= limit + 0.5  # a neuron of every layer


def test_cut_text_evaluates_the_same_windows(tiny_tokenizer, documents):
    cut = cut_text("text", documents, tiny_tokenizer, 32, 5)
    assert len(cut.documents[0]) < sum(map(len, documents))
    whole = encode_text("\n\n".join(documents), tiny_tokenizer)[: 5 * 32]
    assert torch.equal(encode_text(cut.documents[0], tiny_tokenizer)[: 5 * 32], whole)
    assert cut_text("text", documents, tiny_tokenizer, 32, 10**6).windows < 10**6


def test_points_are_what_slicing_and_evaluating_give(folder, text, tmp_path, capsys):
    """The command's perplexity of one point, against slicing and evaluating by hand."""
    assert main(arguments(folder, text, tmp_path, "--method", "compact,published")) == 0
    points = json.loads((tmp_path / "frontier.json").read_text())["points"]
    assert [point["method"] for point in points] == ["dense", "compact", "compact", "published", "published"]
    assert "about 0 min left" in capsys.readouterr().err
    model, tokenizer = load_dense(str(folder))
    batches = sample_batches(load_documents(str(text)), tokenizer, 8, 32)
    (config,) = plan_point(METHODS["compact"], canonical_fields(model), 0.85, "total", 4)
    sliced, _ = slice_model(model, config, batches, SlicingOptions(refit=False))
    expected = perplexity(sliced, tokenizer, load_documents("python-reference", "test"), 32, 4, 3)
    point = points[2]
    assert point["widths"] == describe_widths(config)
    assert point["parameters"] == stored_parameters(config)
    assert point["bytes"] == 4 * point["parameters"]
    assert math.isclose(point["perplexity"]["python-reference"], expected.perplexity, rel_tol=1e-9)
    assert (tmp_path / "frontier-total.txt").exists()


def test_resumes_and_reruns(folder, text, tmp_path, monkeypatch, capsys):
    """An interrupted run keeps its points; the same command measures the rest only; --rerun one method only."""
    sliced = []
    real = slicegpt.evaluation.frontier.slice_drawn

    def interrupted(model, config, *rest):
        if len(sliced) == 2:
            raise KeyboardInterrupt
        sliced.append(config)
        return real(model, config, *rest)

    command = arguments(folder, text, tmp_path, "--method", "published,ours")
    monkeypatch.setattr(slicegpt.evaluation.frontier, "slice_drawn", interrupted)
    assert main(command) == 130
    kept = json.loads((tmp_path / "frontier.json").read_text())["points"]
    assert len(kept) == 3
    sliced.clear()
    assert main(command) == 0
    assert len(sliced) == 2
    points = json.loads((tmp_path / "frontier.json").read_text())["points"]
    assert points[:3] == kept
    sliced.clear()
    capsys.readouterr()
    assert main(command) == 0
    assert not sliced
    table = capsys.readouterr().out
    assert main([*command, "--rerun", "ours"]) == 0
    assert len(sliced) == 2
    assert capsys.readouterr().out == table  # the same seed gives the same figures

    assert "calibration_sha256" in bad(capsys, *arguments(folder, text, tmp_path, "--seed", "1"))
    (tmp_path / "frontier.json").write_text("[]")
    assert "is not a frontier's JSON file" in bad(capsys, *command)


def test_table_and_ratio():
    dense = {"method": "dense", "widths": "8", "parameters": 10, "bytes": 40, "decoder_bytes": 20}
    dense |= {"nll": {"a": 1.0}, "perplexity": {"a": math.e}}
    points = [
        dense,
        dense | {"method": "ours", "asked": 0.9, "bytes": 36, "nll": {"a": 1.5}},
        dense | {"method": "published", "asked": 0.9, "bytes": 35, "nll": {"a": 3.0}},
    ]
    assert loss_ratio(points[1], points[2], dense, "a") == 0.25
    rows = table_rows(points, "total")
    assert [row.get("loss (a)") for row in rows] == [None, 0.25, 1.0]
    assert rows[1]["of total"] == 0.9


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sizes", "0.9,1.2", r"--sizes: a size must lie in \(0, 1\], got 1.2"),
        ("--sizes", "0.9;0.8", "--sizes: expected numbers"),
        (
            "--method",
            "theirs",
            "--method: must be among ours, neurons, in-step, equal, stock",
        ),
        ("--data", "python-reference,", "--data: every name must be given once"),
        ("--windows", "3,2,1", r"--windows: must be one number, or one for each of 2 texts, got \[3, 2, 1\]"),
        ("--sizes", "0.01", "--sizes: .* cannot be reached"),
    ],
)
def test_bad_input(folder, text, tmp_path, capsys, option, value, message):
    assert re.search(message, bad(capsys, *arguments(folder, text, tmp_path, option, value)))
    assert not (tmp_path / "frontier.json").exists()


def test_sparsegpt_needs_its_environment(folder, text, tmp_path, capsys):
    more = ["--method", "sparsegpt-2:4", "--sparsegpt-python", "/nowhere/python"]
    assert "cannot run /nowhere/python" in bad(capsys, *arguments(folder, text, tmp_path, *more))


def test_plot(folder, text, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(arguments(folder, text, tmp_path, "--method", "compact", "--basis", "decoder")) == 0
    assert (tmp_path / "frontier-decoder.png").read_bytes().startswith(b"\x89PNG")


# --- against the published method ---


def test_comparison_at_the_published_sizes(folder, monkeypatch, tmp_path):
    """Targets are what the published form stores; the other method never stores more; ratios are of losses."""
    fields = canonical_fields(load_dense(str(folder))[0])
    monkeypatch.setattr(bench_frontier, "TARGETS", {("decoder", 0.9): (0.5, 0.1)})
    size = bench_frontier.published_size(fields, 0.9, "decoder")
    assert abs(size - 0.9) < 0.1
    configs = {
        name: plan_point(METHODS[name], fields, size, "decoder", 4)[0] for name in ("published", "ours")
    }
    assert decoder_parameters(configs["ours"]) <= decoder_parameters(configs["published"])
    losses = {"dense": (1.0, 2.0), "published": (3.0, 4.0), "ours": (1.5, 2.5)}
    points = [
        {
            "method": name,
            "widths": describe_widths(configs[name]) if name in configs else "48",
            "nll": dict(zip(("in", "out"), nll, strict=True)),
            "perplexity": {text: math.exp(value) for text, value in zip(("in", "out"), nll, strict=True)},
        }
        for name, nll in losses.items()
    ]
    same = {"dense_parameters": 1, "texts": [], "eval_seqlen": 32}
    for name, part in (("a", points[:2]), ("b", [points[0], points[2]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "frontier.json").write_text(json.dumps({"settings": same, "points": part}))
    content = bench_frontier.merge([str(tmp_path / "a"), str(tmp_path / "b")])
    rows = bench_frontier.compare(content, "ours", fields, 4)
    assert [(row["text"], row["loss ratio"], row["met"]) for row in rows] == [
        ("in", 0.25, "yes"),
        ("out", 0.25, "no"),
    ]


# --- SparseGPT 2:4 ---


@torch.no_grad()
def pruned_tiny_model():
    model = tiny_model("llama", torch.float32)
    for weight in decoder_linears(model).values():
        weight[:, ::2] = 0
    return model


def test_sparse_sizes():
    """Half of every decoder matrix, 2 bits for each number that is left; counted beside the dense model."""
    model = pruned_tiny_model()
    check_2_4(model)
    nonzero = sum(int(weight.count_nonzero()) for weight in decoder_linears(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = sparse_sizes(model)
    assert sizes["parameters"] == total - nonzero  # as many are left as are gone
    assert sizes["bytes"] == 4 * sizes["parameters"] + nonzero * 2 // 8
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert sizes["decoder_parameters"] == layers - nonzero


@torch.no_grad()
def test_a_matrix_that_is_not_2_4():
    model = pruned_tiny_model()
    model.model.layers[1].mlp.up_proj.weight[3, :4] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with pytest.raises(SliceGPTError, match=r"layers\.1\.mlp\.up_proj\.weight keeps 3 of 4"):
        check_2_4(model)


# Stands in for the worker: every second column goes, told in llm-compressor's words.
WORKER = """
import pathlib, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "dense")
for name, weight in model.named_parameters():
    if ".layers." in name and weight.dim() == 2:
        print(f"compress_modules | INFO - Sparsifying {name}. using 2 samples", flush=True)
        weight.data[:, ::2] = 0
if "fails" in sys.argv[0]:
    sys.exit("no space left")
model.save_pretrained(folder / "sparse")
AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(folder / "sparse")
"""


def run_stand_in(folder, file, monkeypatch, progress):
    file.write_text(WORKER, encoding="utf-8")
    monkeypatch.setattr(slicegpt.evaluation.sparsegpt, "WORKER", file)
    model, tokenizer = load_dense(str(folder))
    return model, sparsegpt_2_4(model, tokenizer, [], sys.executable, progress)


def test_sparsegpt_shows_progress(folder, tmp_path, monkeypatch):
    progress = Progress(stream=io.StringIO())
    steps = []
    stage = Progress.stage

    @contextlib.contextmanager
    def counted(self, name, total, unit):
        with stage(self, name, total, unit) as advance:
            yield lambda n: (steps.append(n), advance(n))

    monkeypatch.setattr(Progress, "stage", counted)
    model, pruned = run_stand_in(folder, tmp_path / "worker.py", monkeypatch, progress)
    matrices = len(decoder_linears(model))
    assert f"sparsegpt-2:4: {matrices} matrices in" in progress.stream.getvalue()
    assert steps == [1] * matrices  # one as each is done, the last when the worker is
    assert decoder_linears(pruned).keys() == decoder_linears(model).keys()


def test_sparsegpt_failure_is_told(folder, tmp_path, monkeypatch):
    with pytest.raises(SliceGPTError, match="sparsegpt-2:4: llm-compressor failed: no space left"):
        run_stand_in(folder, tmp_path / "fails.py", monkeypatch, None)


def test_sparsegpt_prunes_to_2_4(folder, text, tiny_tokenizer):
    """Through llm-compressor itself, where SLICEGPT_SPARSEGPT_PYTHON names an interpreter that has it."""
    python = os.environ.get("SLICEGPT_SPARSEGPT_PYTHON")
    if not python:
        pytest.skip("set SLICEGPT_SPARSEGPT_PYTHON to an interpreter with llmcompressor")
    model, tokenizer = load_dense(str(folder))
    batches = sample_batches(load_documents(str(text)), tokenizer, 8, 32)
    pruned = sparsegpt_2_4(model, tokenizer, batches, python)
    for name, weight in decoder_linears(pruned).items():
        assert weight.count_nonzero() * 2 == weight.numel(), name
    assert torch.equal(pruned.model.embed_tokens.weight, model.model.embed_tokens.weight)
