"""`slicegpt generate --runtime fused` says what the plain form says."""

import json

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.cli import main
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
    plain, _ = generate(folder, tmp_path, capsys)
    fused, printed = generate(folder, tmp_path, capsys, "--runtime", "fused")
    assert (fused["text"], fused["tokens"]) == (plain["text"], plain["tokens"])
    assert fused["runtime"] == "fused"
    assert fused["text"].strip() in printed


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


def test_bad_input_is_one_line(folder, capsys):
    arguments = ["generate", str(folder), "--prompt", "x", "--runtime", "fused", "--top-p", "2", "--sample"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
