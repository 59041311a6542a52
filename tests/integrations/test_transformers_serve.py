"""``detinfer verify URL`` against a real server: ``transformers serve`` with a small model, with and without the policy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from detinfer import fingerprint
from detinfer.integrations.server.api import Sampling
from detinfer.integrations.server.sweep import Options
from detinfer.integrations.server.verify import Access, Control, verify

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
for _module in ("fastapi", "uvicorn", "openai"):  # imported, not looked for: what they need in turn may be missing
    pytest.importorskip(_module, reason="pip install 'transformers[serving]'", exc_type=ImportError)

START = 120.0
"""Seconds that a server may take to come up on a loaded machine."""
CONTINUOUS = [
    "--continuous-batching",
    "--cb-block-size",
    "16",
    "--cb-num-blocks",
    "128",
    "--cb-max-batch-tokens",
    "256",
]
"""The server forms batches; unless it is told how many blocks its cache has, it takes most of the host's memory."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small bfloat16 Llama, whose weights are large enough for its answers to hang on their last bits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("served") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    built = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in built.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    built.to(torch.bfloat16).save_pretrained(folder)
    return folder


@contextmanager
def serving(model: Path, folder: Path, *, report: Path | None) -> Iterator[str]:
    """A running ``transformers serve``, under the policy where there is a ``report`` to be written: its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(model), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), *CONTINUOUS]
    if report is not None:
        command = [sys.executable, "-m", "detinfer", "run", "--report", str(report), "--", *command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    log = folder / f"serve-{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START
        while not _up(url):
            assert process.poll() is None, f"transformers serve ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"transformers serve is not up:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_served_under_the_policy_and_not(model: Path, tmp_path: Path) -> None:
    """Batches that the server forms: under the policy the texts are the same; without it they differ, which is the control."""
    sampling = Sampling(max_new_tokens=32, logprobs=False)
    options = Options(n_trials=4, sizes=(1, 2, 7, 12))
    report = tmp_path / "report.json"
    with serving(model, tmp_path, report=report) as held, serving(model, tmp_path, report=None) as free:
        access = Access(held, "openai", str(model), retries=0)
        control = Control("without the policy", Access(free, "openai", str(model), retries=0), sampling)
        result = verify(access, ["single"], sampling, options, control)
        asked = verify(access, ["single"], Sampling(max_new_tokens=4), Options(n_trials=1, sizes=(2,)))
    part, off = result.parts[0], result.control[0]
    assert result.faults == {}
    assert (part.compared, part.differing, part.unanswered) == (22, 0, 0)
    # Whether a last bit turns a word is the hardware's to say; where none did, the verdict is that nothing was shown.
    assert (part.verdict, off.verdict) in (("same", "diverged"), ("vacuous", "same"))
    assert asked.exit_code() == 5 and "no log-probabilities" in asked.parts[0].reasons[0]
    assert len(json.loads(report.read_text())["processes"]) == 1, "the policy was in force in the server"
    (name,) = result.system_fingerprints
    assert name.startswith("di1-batch-") and result.system_fingerprint is not None
    assert str(fingerprint.from_json(result.system_fingerprint)) == name, "and its answers say so"
    assert result.system_fingerprint["policy"]["uncovered"] == json.loads(report.read_text())["policy"]["uncovered"]
