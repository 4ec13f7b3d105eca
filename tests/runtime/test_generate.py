"""Generation: options, stop tokens, streaming, cancellation, threads, the process left as it was."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from random_models import ZOO, save_random
from tiny import LLAMA, llama_shapes, make_model, random_tensors, write_tokenizer

import mlxq
from mlxq.errors import Cancelled, CheckpointError, GenerationError
from mlxq.runtime import decoding
from mlxq.runtime.tokenizer import Detokenizer
from mlxq.types import CancelToken

RAW = {"chat_template": False}


def greedy_reference(model, ids, n):
    """The `n` likeliest tokens one after the other, each from the whole text, without a cache."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(mx.argmax(model.module(mx.array([ids]))[0, -1]).item()))
    return tuple(ids[-n:])


def test_greedy_is_the_argmax_of_the_whole_model(tiny, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", {"cpu": 5, "gpu": 5})
    result = tiny.generate("hello, chunks of five", max_tokens=6, stop_tokens=(), **RAW)
    ids = tiny.encode("hello, chunks of five", chat_template=False)
    assert result.token_ids == greedy_reference(tiny, ids, 6)
    assert result.finish_reason == "length"
    assert (result.prompt_tokens, result.generation_tokens) == (len(ids), 6) == (21, 6)
    assert result.text == tiny.tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert result.prompt_tokens_per_second > 0
    assert result.generation_tokens_per_second > 0
    assert result.peak_memory > 1e6


def test_the_prompt_is_not_projected_to_the_vocabulary(tiny, monkeypatch):
    rows = []
    head = type(tiny.module.lm_head)
    original = head.__call__

    def counted(self, x):
        if self is tiny.module.lm_head:
            rows.append(x.shape[1])
        return original(self, x)

    monkeypatch.setattr(head, "__call__", counted)
    tiny.generate("a prompt of some tokens", max_tokens=3, stop_tokens=(), **RAW)
    assert rows == [1, 1, 1]


def test_numpy_back_end_alone_gives_the_same(tiny, monkeypatch):
    expected = tiny.generate("one prompt", max_tokens=8, **RAW).token_ids
    monkeypatch.setenv("MLXQ_BACKEND", "numpy")
    assert tiny.generate("one prompt", max_tokens=8, **RAW).token_ids == expected


def test_streamed_pieces_are_the_text(tiny):
    for seed in range(3):
        options = {"max_tokens": 40, "temperature": 1.5, "seed": seed, "stop_tokens": ()}
        pieces = list(tiny.stream("bytes", **options))
        result = pieces[-1].result
        assert all(p.result is None for p in pieces[:-1])
        assert "".join(p.text for p in pieces) == result.text
        assert result.text == tiny.tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert tuple(t for p in pieces for t in p.token_ids) == result.token_ids
        assert len(result.token_ids) == 40


def test_a_character_split_between_tokens_is_never_shown_in_parts(tiny):
    text = "naïve — 日本語 🙂 end"
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())  # one token a byte
    detokenizer = Detokenizer(tiny.tokenizer)
    pieces = [detokenizer.add(i) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == text
    assert [p for p in pieces if p] == list(text)
    broken = Detokenizer(tiny.tokenizer)
    assert broken.add(ids[text.encode().index("日".encode())]) == ""
    assert broken.finish() == "\ufffd"


def test_stop_tokens_are_a_union(tmp_path):
    path = make_model(tmp_path / "m", eos_token_id=[3, 4])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    with mlxq.load(path) as model:
        eos = model.tokenizer.eos_token_id
        assert model.stop_tokens == {3, 4, 5, eos}


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(tiny):
    free = tiny.generate("go on", max_tokens=10, stop_tokens=(), **RAW)
    last = next(i for i in range(1, 10) if free.token_ids[i] not in free.token_ids[:i])
    stopped = tiny.generate("go on", max_tokens=10, stop_tokens=[free.token_ids[last]], **RAW)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[:last]


def test_sampling_is_reproducible_and_filtered(tiny):
    def sample(**options):
        return tiny.generate("dice", max_tokens=12, stop_tokens=(), **RAW, **options).token_ids

    greedy = sample()
    assert sample(temperature=1.0, seed=7) == sample(temperature=1.0, seed=7)
    assert len({sample(temperature=1.0, seed=s) for s in range(4)}) == 4
    assert sample(temperature=5.0, seed=1, top_k=1) == greedy
    assert sample(temperature=5.0, seed=1, top_p=1e-6) == greedy
    assert sample(temperature=5.0, seed=1, min_p=1.0) == greedy
    assert sample(temperature=1.0) != sample(temperature=1.0)


def test_chat_template_and_raw_text(tiny):
    decode = tiny.tokenizer.decode
    assert decode(tiny.encode("hi")) == "<bos>user: hi\n<bos>assistant: "
    assert decode(tiny.encode("hi", system="be kind")) == "<bos>system: be kind\n<bos>user: hi\n<bos>assistant: "
    assert decode(tiny.encode([{"role": "user", "content": "a"}])) == "<bos>user: a\n<bos>assistant: "
    assert decode(tiny.encode("hi", chat_template=False)) == "hi"


def test_prompts_that_cannot_be_encoded(tiny, tmp_path):
    path = make_model(tmp_path / "raw")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with mlxq.load(path) as raw:
        assert raw.tokenizer.decode(raw.encode("hi")) == "hi"
        for options in ({"prompt": [{"role": "user", "content": "a"}]}, {"prompt": "a", "chat_template": True}):
            with pytest.raises(GenerationError, match="no chat template"):
                raw.encode(**options)
        with pytest.raises(GenerationError, match="system message"):
            raw.encode("a", system="b")
    for prompt in ("", []):
        with pytest.raises(GenerationError, match="empty"):
            tiny.stream(prompt)
    with pytest.raises(GenerationError, match="template refuses"):
        tiny.encode([{"role": "user", "content": "a"}, 3])


def test_a_prompt_longer_than_the_context_names_both_numbers(tiny):
    with pytest.raises(GenerationError, match=r"600 tokens.*512"):
        tiny.stream("x" * 600, **RAW)
    result = tiny.generate("x" * 510, max_tokens=50, stop_tokens=(), **RAW)
    assert result.finish_reason == "length"
    assert result.generation_tokens == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2"),
    ],
)
def test_options_out_of_range(tiny, options, message):
    with pytest.raises(GenerationError, match=message):
        tiny.stream("a", **options)


def test_unknown_keywords_name_the_valid_ones(tiny):
    for call in (tiny.generate, tiny.stream):
        with pytest.raises(TypeError, match=r"'max_token'; did you mean 'max_tokens'\? valid: .*temperature"):
            call("a", max_token=3)
    with pytest.raises(TypeError, match=r"load\(\) has no keyword 'zzz'; valid: source, revision"):
        mlxq.load("a", zzz=1)


def test_logits_that_are_not_finite(tmp_path):
    tensors = random_tensors(llama_shapes(LLAMA))
    tensors["model.norm.weight"][3] = np.nan
    with mlxq.load(make_model(tmp_path / "nan", tensors=tensors)) as model:
        with pytest.raises(GenerationError, match="not finite"):
            model.generate("a", max_tokens=4)
        # The worker thread survives.
        with pytest.raises(GenerationError, match="not finite"):
            model.generate("a", max_tokens=4)


def test_a_model_loaded_on_one_thread_generates_on_others(tiny_llama):
    results, errors = {}, []

    def generate(name):
        try:
            results[name] = models["m"].generate("threads", max_tokens=12, **RAW).token_ids
        except Exception as e:
            errors.append(e)

    models = {}
    loader = threading.Thread(target=lambda: models.update(m=mlxq.load(tiny_llama)))
    loader.start()
    loader.join()
    threads = [threading.Thread(target=generate, args=(name,)) for name in ("b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    generate("main")
    assert not errors
    assert results["b"] == results["c"] == results["main"]


def test_interleaved_streams_do_not_disturb_each_other(tiny):
    def one(prompt, n=10):
        return tiny.generate(prompt, max_tokens=n, **RAW).text

    first, second = (tiny.stream(p, max_tokens=10, **RAW) for p in ("alpha", "beta"))
    assert "".join(p.text for p in first) == one("alpha")
    assert "".join(p.text for p in second) == one("beta")
    # Side by side, one of them left in the middle while the other and a third go on.
    pairs = (tiny.stream(p, max_tokens=60, stop_tokens=(), **RAW) for p in ("alpha", "beta"))
    first, second = pairs
    pieces = [(next(first), next(second)) for _ in range(5)]
    rest = "".join(p.text for p in second)
    assert "".join(b.text for _, b in pieces) + rest == tiny.generate("beta", max_tokens=60, stop_tokens=(), **RAW).text


def test_leaving_a_stream_stops_the_work(tiny, monkeypatch):
    steps = []
    module = tiny.module

    class Counting(type(module)):
        def __call__(self, *args, **kwargs):
            steps.append(1)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(module, "__class__", Counting)
    stream = tiny.stream("long", max_tokens=400, stop_tokens=(), **RAW)
    next(stream)
    stream.close()
    del stream
    gc.collect()
    # Work that comes after it runs only when it has ended.
    tiny.generate("next", max_tokens=1, **RAW)
    # What was computed ahead fits in the bounded queue, with the token in hand and the one for "next".
    assert len(steps) < 40


def test_cancelling(tiny, tiny_llama):
    cancel = CancelToken()
    seen = []
    for piece in tiny.stream("stop me", max_tokens=400, stop_tokens=(), cancel=cancel, **RAW):
        seen.append(piece)
        if len(seen) == 2:
            cancel.cancel()
    result = seen[-1].result
    assert result.finish_reason == "cancelled"
    assert 2 <= result.generation_tokens < 60
    before_work = tiny.generate("stop me", cancel=cancel, **RAW)
    assert (before_work.finish_reason, before_work.text) == ("cancelled", "")
    with pytest.raises(Cancelled):
        mlxq.load(tiny_llama, cancel=cancel)


def test_progress_of_all_stages(tiny_llama, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", {"cpu": 4, "gpu": 4})
    events, threads = [], set()

    def progress(event):
        events.append(event)
        threads.add(threading.get_ident())

    result = mlxq.generate(tiny_llama, "0123456789", max_tokens=3, stop_tokens=(), progress=progress, **RAW)
    assert threads == {threading.get_ident()}
    by_stage = {stage: [e.done for e in events if e.stage == stage] for stage in ("load", "prompt", "generate")}
    assert by_stage["load"] == list(range(1, 22))
    assert by_stage["prompt"] == [0, 4, 8, 9, 10]
    assert by_stage["generate"] == [1, 2, 3]
    assert result.generation_tokens == 3


def test_a_closed_model_says_so(tiny_llama):
    model = mlxq.load(tiny_llama)
    model.close()
    with pytest.raises(GenerationError, match="closed"):
        model.generate("a")


def test_missing_and_damaged_tokenizers(tmp_path):
    path = make_model(tmp_path / "m", tokenizer=False)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        mlxq.load(path)
    write_tokenizer(path)
    (path / "tokenizer.json").write_text('{"truncated": ')
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded") as caught:
        mlxq.load(path)
    assert "\n" not in str(caught.value)


def test_quantized_directory_generates(tmp_path):
    path = save_random(tmp_path / "q", *ZOO["llama_4bit"])
    write_tokenizer(path)
    result = mlxq.generate(path, "quantized", max_tokens=5, stop_tokens=(), **RAW)
    with mlxq.load(path) as model:
        assert result.token_ids == greedy_reference(model, model.encode("quantized", chat_template=False), 5)
        assert model.nbytes < 0.3 * 4 * sum(np.prod(s) for s in llama_shapes(LLAMA).values())


_PROCESS = """
import os, resource, signal, sys
def state():
    handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
    return dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE), handlers
before = state()
import mlxq
assert "mlx" not in sys.modules and "transformers" not in sys.modules
with mlxq.load(sys.argv[1]) as model:
    assert model.generate("hi", max_tokens=3, stop_tokens=()).generation_tokens == 3
assert state() == before, "the process changed"
assert "mlx_lm" not in sys.modules
"""


def test_the_process_is_left_as_it_was(tiny_llama):
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, str(tiny_llama)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


_INTERRUPTED = """
import os, signal, sys, threading, time
import mlxq
model = mlxq.load(sys.argv[1])
stream = model.stream("hi", max_tokens=500, stop_tokens=(), chat_template=False)
next(stream)
threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    for piece in stream:
        time.sleep(0.01)
except KeyboardInterrupt:
    start = time.monotonic()
    assert model.generate("again", max_tokens=2, stop_tokens=(), chat_template=False).generation_tokens == 2
    print("fine", time.monotonic() - start < 5)
"""


def test_control_c_leaves_the_worker_usable_and_the_process_exits(tiny_llama):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, str(tiny_llama)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "fine True\n"), done.stderr
    assert time.monotonic() - start < 40


_EXIT_WHILE_GENERATING = """
import sys, mlxq
model = mlxq.load(sys.argv[1])
stream = model.stream("hi", max_tokens=500, stop_tokens=(), chat_template=False)
next(stream)
"""


def test_exit_in_the_middle_of_a_text(tiny_llama):
    done = subprocess.run(
        [sys.executable, "-c", _EXIT_WHILE_GENERATING, str(tiny_llama)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "numpy"])
def test_a_real_gguf(smollm2_gguf, backend, monkeypatch):
    monkeypatch.setenv("MLXQ_BACKEND", backend)
    with mlxq.load(smollm2_gguf) as model:
        result = model.generate("What is the capital of France?", max_tokens=16)
        assert "Paris" in result.text
        # Codes stay packed: the file has 98 MB.
        assert model.nbytes < 150e6
