"""`slicegpt serve` for real: the HTTP server answers as our `generate` does."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slicegpt.calibration import load_documents, sample_batches
from slicegpt.conversion.plan import constant_widths, plan
from slicegpt.families import canonical_fields
from slicegpt.slicing import slice_model

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM (make test-vllm)"),
    pytest.mark.slow,
    pytest.mark.model,
]
PROMPT = "The for statement is used to"


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    model, tokenizer = smollm2
    path, fields = tmp_path_factory.mktemp("served") / "smollm2", canonical_fields(model)
    batches = sample_batches(load_documents("python-reference", "train"), tokenizer, 8, 256)
    sliced, _ = slice_model(model, plan(fields, constant_widths(fields, 504)), batches)
    sliced.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The server's address; it is started by our command and ended by its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command = [sys.executable, "-m", "slicegpt", "serve", str(folder), *options, "--enforce-eager"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=output, stderr=output)
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 600
            while not answers(address):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def opener():
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers(address: str) -> bool:
    try:
        with opener().open(f"{address}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def post(address: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with opener().open(request, timeout=120) as response:
        return json.load(response)


def generated(folder, ids: torch.Tensor) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    output = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_completions(server, folder):
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    choice = post(server, "/v1/completions", body)["choices"][0]
    assert choice["text"].strip()
    assert choice["text"] == generated(folder, ids)


def test_chat_completions(server, folder):
    messages = [{"role": "user", "content": "What is a tuple?"}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    body = {"model": str(folder), "messages": messages, "max_tokens": 24, "temperature": 0}
    answer = post(server, "/v1/chat/completions", body)["choices"][0]["message"]
    assert answer["role"] == "assistant"
    assert answer["content"].strip()
    assert answer["content"] == generated(folder, ids)
