"""`slicegpt generate --chat`: history, what no longer fits, Ctrl-C, and both engines."""

import copy
import io
import json
import os
import signal

import pytest
import torch
from support.command_line import bad
from support.saved_models import save_dense

from slicegpt.cli import interrupts, main
from slicegpt.cli.answering import Printer
from slicegpt.cli.chat import Conversation, apply_template
from slicegpt.errors import SliceGPTError
from slicegpt.runtime import Runtime

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as on a terminal; a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def chatty(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chatty):
    return save_dense(tmp_path_factory.mktemp("chat") / "model", chatty, max_position_embeddings=256)


@pytest.fixture
def chat(folder, tmp_path, monkeypatch, capsys):
    """Runs the command with these lines on standard input; returns messages, what it printed, and its notes."""

    def run(lines: str, *options: str) -> tuple[list[dict], str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        file = tmp_path / "chat.json"
        arguments = [
            "generate",
            str(folder),
            "--chat",
            "--max-new-tokens",
            "6",
            "--json",
            str(file),
            *options,
        ]
        assert main(arguments) == 0
        printed, notes = capsys.readouterr()
        return json.loads(file.read_text())["messages"], printed, notes

    return run


def expected_answer(folder, tokenizer, messages: list[dict]) -> str:
    """The reference: a new runtime, and the whole of the history as its prompt."""
    from slicegpt import load

    ids = apply_template(tokenizer, messages)
    tokens = Runtime(load(folder)[0]).generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("runtime", ["auto", "plain"])
def test_answers_follow_the_history(chat, folder, chatty, runtime):
    messages, printed, notes = chat(
        "The for statement\n\nand while\n", "--system", "Be brief", "--runtime", runtime
    )
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    for place in (2, 4):
        assert messages[place]["content"] == expected_answer(folder, chatty, messages[:place])
    assert printed == "".join(f"{messages[place]['content']}\n" for place in (2, 4))
    assert notes.count("tokens/s") == 2


def test_commands(chat):
    messages, _, notes = chat("one\n/clear\n/help me\ntwo\n/exit\nthree\n")
    assert [message["content"] for message in messages if message["role"] == "user"] == ["two"]
    assert "/help is no command" in notes


def test_the_oldest_messages_are_dropped(chatty):
    conversation = Conversation(chatty, context=60, answer_tokens=8, rows=len(chatty), system="S")
    for turn in range(12):
        ids, dropped = conversation.ask(f"question {turn}")
        assert ids.shape[1] + 8 <= 60
        assert torch.equal(ids, apply_template(chatty, conversation.messages))
        conversation.messages.append({"role": "assistant", "content": f"answer {turn}"})
        assert conversation.messages[0]["content"] == "S"
        assert dropped in (0, 2)
    assert conversation.messages[1]["role"] == "user"
    assert 1 < len(conversation.messages) < 12
    with pytest.raises(SliceGPTError, match="60 tokens cannot hold a message of"):
        conversation.ask("word " * 80)
    conversation.take_back()
    conversation.ask("again")  # all else was dropped to make room, and the chat goes on


def test_a_message_that_is_too_long_or_no_text(chat):
    messages, printed, notes = chat(f"{'long ' * 100}\na\udcff\nThe\n", "--context", "64")
    assert "error: 64 tokens cannot hold" in notes
    assert "error: the message is not Unicode text" in notes
    assert [message["content"] for message in messages if message["role"] == "user"] == ["The"]
    assert printed.count("\n") == messages[-1]["content"].count("\n") + 1


@pytest.mark.parametrize("runtime", ["fused", "plain"])
def test_ctrl_c_stops_the_answer_and_not_the_chat(chat, monkeypatch, runtime):
    """SIGINT after the second token of the first answer; transformers may compute one more before it asks."""
    add, answers = Printer.add, []

    def interrupted(printer, token):
        add(printer, token)
        if len(printer.answer.tokens) == 1:
            answers.append(printer.answer)
        if len(answers) == 1 and len(printer.answer.tokens) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Printer, "add", interrupted)
    before = signal.getsignal(signal.SIGINT)
    messages, _, _ = chat("The for statement\nand while\n", "--runtime", runtime)
    lengths = [len(answer.tokens) for answer in answers]
    assert lengths == [2, 6] or (runtime == "plain" and lengths == [3, 6])
    assert len([message for message in messages if message["role"] == "user"]) == 2
    assert signal.getsignal(signal.SIGINT) is before
    assert not interrupts.received()


def test_ctrl_c_while_nobody_answers(chat, monkeypatch):
    lines = iter([KeyboardInterrupt, "The", EOFError])

    def read():
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("slicegpt.cli.chat.read_message", read)
    messages, _, notes = chat("")
    assert len(messages) == 2
    assert "Ctrl-D ends" in notes


def test_two_interrupts_end_an_answer_at_once():
    with interrupts.deferred() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_bad_input(folder, tmp_path, tiny_tokenizer, capsys):
    assert "--prompt: is needed, unless --chat is given" in bad(capsys, "generate", folder)
    plain = save_dense(tmp_path / "plain", tiny_tokenizer)
    assert "--chat: the model's tokenizer has no chat template" in bad(capsys, "generate", plain, "--chat")
    learned = save_dense(tmp_path / "opt", tiny_tokenizer, "opt")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(learned)
    line = bad(capsys, "generate", learned, "--chat", "--context", "1000")
    assert "--context: must be at most the model's 64 learned positions, got 1000" in line


def test_a_template_that_refuses(chatty, capsys, folder, monkeypatch):
    tokenizer = copy.deepcopy(chatty)
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(SliceGPTError, match="the chat template fails: no system message, please"):
        apply_template(tokenizer, [{"role": "user", "content": "x"}])


def test_a_single_message(folder, chatty, tmp_path, capsys):
    """`--chat --prompt`: one answer, without the prompt before it."""
    file = tmp_path / "one.json"
    arguments = ["generate", str(folder), "--chat", "--prompt", "The for statement", "--max-new-tokens", "6"]
    assert main([*arguments, "--json", str(file)]) == 0
    expected = expected_answer(folder, chatty, [{"role": "user", "content": "The for statement"}])
    assert json.loads(file.read_text())["text"] == expected
    assert capsys.readouterr().out == f"{expected}\n"
