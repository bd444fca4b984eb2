"""`slicegpt generate`: the runtime says what transformers says; prompt and text go one way, figures the other."""

import json

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.cli import main
from slicegpt.cli.answering import Printer
from slicegpt.errors import SliceGPTError
from slicegpt.ops.cpu import extension
from slicegpt.runtime import Runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", torch.float32, vocab_size=512).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def generate(folder, tmp_path, capsys, *more: str) -> tuple[dict, str]:
    file = tmp_path / "generate.json"
    arguments = ["generate", str(folder), "--prompt", "The for statement", "--max-new-tokens", "12"]
    assert main([*arguments, "--json", str(file), *more]) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


def test_same_text(folder, tmp_path, capsys):
    plain, said = generate(folder, tmp_path, capsys, "--runtime", "plain")
    fused, printed = generate(folder, tmp_path, capsys)
    assert (fused["text"], fused["tokens"]) == (plain["text"], plain["tokens"])
    assert (fused["runtime"], plain["runtime"]) == ("fused", "plain")
    assert printed == said == f"The for statement{fused['text']}\n"


@pytest.mark.parametrize(
    ("runtime", "engine"), [("auto", "runtime, "), ("plain", "transformers' generate(), ")]
)
def test_figures_are_on_standard_error(folder, tmp_path, capsys, runtime, engine):
    file = tmp_path / "generate.json"
    arguments = ["generate", str(folder), "--prompt", "The for statement", "--max-new-tokens", "12"]
    assert main([*arguments, "--runtime", runtime, "--json", str(file)]) == 0
    printed, notes = capsys.readouterr()
    facts = json.loads(file.read_text())
    (line,) = [line for line in notes.splitlines() if "tokens/s" in line]
    assert line.startswith(f"12 tokens, {facts['tokens_per_second']:.1f} tokens/s; prompt: ")
    assert engine in line
    assert "float32 on cpu" in line
    assert "tokens/s" not in printed
    # Eleven tokens came after the first; the seconds are rounded to a thousandth each.
    decoding = facts["seconds"] - facts["prompt_seconds"]
    assert 11 / facts["tokens_per_second"] == pytest.approx(decoding, abs=0.0011)


def test_what_the_runtime_cannot_run_is_run_by_transformers(folder, tmp_path, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise SliceGPTError("no such family")

    expected, _ = generate(folder, tmp_path, capsys)
    monkeypatch.setattr("slicegpt.cli.answering.Runtime", refuse)
    instead, _ = generate(folder, tmp_path, capsys)
    assert (instead["runtime"], instead["text"]) == ("plain", expected["text"])
    arguments = ["generate", str(folder), "--prompt", "x", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    assert "note: the runtime cannot run this model: no such family" in capsys.readouterr().err
    assert main([*arguments, "--runtime", "fused"]) == 2


def test_a_dense_model_without_room_for_a_copy(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("slicegpt.cli.answering.free_memory", lambda device: 1000)
    arguments = ["generate", str(folder), "--prompt", "x", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    notes = capsys.readouterr().err
    assert "its folded copy takes " in notes
    assert "transformers' generate()" in notes
    assert main([*arguments, "--runtime", "fused"]) == 0  # who asks for it gets it
    assert "(runtime, " in capsys.readouterr().err


def test_the_space_before_the_first_word(folder, capsys):
    """Llama's tokenizers drop it from what they decode alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁The", "▁for", "▁statement"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert tokenizer.decode([2, 3]) == "for statement"
    printer = Printer(tokenizer, torch.tensor([[1]]), continues=True)
    for token in (2, 3):
        printer.add(token)
    printer.end()
    assert capsys.readouterr().out == " for statement\n"


def test_text_is_printed_before_the_end(folder, monkeypatch, capsys):
    """What had been printed when each step of the decoder began: it grows from one to the next."""
    printed, make = [""], Runtime.new_decoder

    def new_decoder(*arguments):
        decoder = make(*arguments)
        step = decoder.step

        def watched():
            printed.append(printed[-1] + capsys.readouterr().out)
            return step()

        decoder.step = watched
        return decoder

    monkeypatch.setattr(Runtime, "new_decoder", new_decoder)
    arguments = ["generate", str(folder), "--prompt", "The for statement", "--runtime", "fused"]
    assert main([*arguments, "--max-new-tokens", "12"]) == 0
    whole = printed[-1] + capsys.readouterr().out
    assert len(printed) == 12
    assert 3 <= len(set(printed)) <= 12
    assert all(whole.startswith(part) for part in printed)


def test_sampling_follows_the_seed(folder, tmp_path, capsys):
    texts = [
        generate(folder, tmp_path, capsys, "--runtime", "fused", "--sample", "--seed", seed)[0]["text"]
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))
def test_rounded_weights_are_named(folder, tmp_path, capsys):
    rounded, _ = generate(folder, tmp_path, capsys, "--weights", "int8")
    assert rounded["engine"] == "runtime, fused decoder, float32, 8-bit weights on cpu"
    arguments = ["generate", str(folder), "--prompt", "x", "--weights", "int4", "--runtime", "plain"]
    assert main(arguments) == 2
    assert "--weights: needs the runtime, and --runtime is plain" in capsys.readouterr().err


def test_bad_input_is_one_line(folder, capsys):
    arguments = ["generate", str(folder), "--prompt", "x", "--runtime", "fused", "--top-p", "2", "--sample"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
