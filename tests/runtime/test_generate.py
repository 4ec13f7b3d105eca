"""Generation: options, stop tokens, streaming, cancellation, threads, the process left as it was."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import threading
import time
import weakref

import mlx.core as mx
import numpy as np
import pytest
from random_models import ZOO, save_random
from tiny import LLAMA, llama_shapes, make_model, random_tensors, write_tokenizer

import mlxq
from mlxq.errors import BackendError, Cancelled, CheckpointError, GenerationError
from mlxq.runtime import decoding, worker
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


def test_a_wrapped_language_model_is_not_projected_either(tmp_path, monkeypatch):
    text = ZOO["gemma3_sliding"][0]
    path = save_random(tmp_path / "m", {"model_type": "gemma3", "text_config": text, "vocab_size": 320}, None)
    write_tokenizer(path)
    monkeypatch.setattr(decoding, "_CHUNK", {"cpu": 5, "gpu": 5})
    with mlxq.load(path) as model:
        assert decoding._trunk(model.module) is model.module.language_model.model
        result = model.generate("a prompt of some tokens", max_tokens=4, stop_tokens=(), **RAW)
        ids = model.encode("a prompt of some tokens", chat_template=False)
        assert result.token_ids == greedy_reference(model, ids, 4)


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


def test_bytes_that_never_become_a_character_come_out_in_time(tiny):
    invalid = tiny.tokenizer.convert_tokens_to_ids("Ģ")  # 0x80, which only continues a character
    a = tiny.tokenizer.convert_tokens_to_ids("a")
    decoded = []

    class Counting:
        def decode(self, ids, **options):
            decoded.append(len(ids))
            return tiny.tokenizer.decode(ids, **options)

    ids = [a, *[invalid] * 2000, a, *tiny.tokenizer.encode("日", add_special_tokens=False), a]
    detokenizer = Detokenizer(Counting())
    pieces = [detokenizer.add(i) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == "a" + "\ufffd" * 2000 + "a日a"
    assert len("".join(pieces[:1000])) > 980
    # Twice a few tokens for each, instead of 2000 * 2000 / 2 in all.
    assert max(decoded) < 30
    assert sum(decoded) < 60 * len(ids)


def test_spaces_after_special_tokens_stay():
    # As sentencepiece decodes: the first space of a text is dropped, and nothing is shown of special tokens.
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<tool>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    tool, dash = fast.convert_tokens_to_ids("<tool>"), [b + 3 for b in "—".encode()]
    bad = 0x80 + 3
    for ids in (
        [1, tool, 2],
        [1, tool, tool, 2, 2],
        [tool, 1, 2],
        [1, *dash, tool, 2, *dash],
        [1, *[bad] * 50, 2, tool, 2],
    ):
        detokenizer = Detokenizer(fast)
        text = "".join(detokenizer.add(i) for i in ids) + detokenizer.finish()
        assert text == fast.decode(ids, skip_special_tokens=True)


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
    # Checked here, since what a template makes of them depends on the version of transformers.
    user = {"role": "user", "content": "a"}
    for message, why in (
        (3, "of type int"),
        ("text", "of type str"),
        ({"content": "a"}, "a message without a role"),
        ({"role": 5, "content": "a"}, "a message without a role"),
        ({"role": "user"}, "a content that is nothing"),
        ({"role": "user", "content": 7}, "a content that is of type int"),
    ):
        with pytest.raises(GenerationError, match=f"message 2 of the prompt .*{why}"):
            tiny.encode([user, message])
    for prompt in (b"abc", 5, None, {"role": "user"}):
        with pytest.raises(GenerationError, match="pass text, or a list of messages"):
            tiny.stream(prompt)
    with pytest.raises(GenerationError, match="the system message is of type int"):
        tiny.stream("a", system=5)


def test_text_that_is_not_unicode_is_refused(tiny):
    for prompt, system, where in (
        ("a\udcff", None, "the prompt is"),
        ("a", "\ud800", "the system message is"),
        ([{"role": "user", "content": "ab\udc80"}], None, "message 1 of the prompt is"),
    ):
        for call in (tiny.encode, tiny.stream):
            with pytest.raises(GenerationError, match=f"{where} not valid Unicode: character . is a lone surrogate"):
                call(prompt, system=system)


def test_a_template_that_leaves_the_system_message_out(tmp_path):
    path = make_model(tmp_path / "m")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    only_user = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    default = "{{ messages[0].content if messages[0].role == 'system' else 'be kind' }}: " + only_user
    for template, refused in ((only_user, True), (default, False)):
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        with mlxq.load(path) as model:
            if refused:
                with pytest.raises(GenerationError, match="no system message"):
                    model.encode("hi", system="be kind")
            else:
                # The template's own, spelt out: the same ids, and yet not ignored.
                assert model.encode("hi", system="be kind") == model.encode("hi")


def test_a_template_that_refuses(tmp_path):
    path = make_model(tmp_path / "m")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with mlxq.load(path) as model:
        for system in (None, "be kind"):
            with pytest.raises(GenerationError, match="template refuses the messages: roles must alternate"):
                model.encode("hi", system=system)


def test_a_raw_prompt_does_not_end_in_an_appended_end_token(tmp_path):
    from tokenizers import Tokenizer, processors

    path = make_model(tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 257), ("<eos>", 256)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    with mlxq.load(path) as model:
        a = model.tokenizer.convert_tokens_to_ids("a")
        for prompt, ids in (("a", [257, a]), ("a<eos>", [257, a, 256]), ("a<eos><eos>", [257, a, 256, 256])):
            assert model.encode(prompt, chat_template=False) == ids


def test_the_context_is_read_under_every_name(tmp_path):
    config = {
        "model_type": "gpt2",
        "n_ctx": 64,
        "n_embd": 64,
        "n_head": 2,
        "n_layer": 1,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 320,
        "eos_token_id": [256, -1],
    }
    path = save_random(tmp_path / "m", config, None)
    write_tokenizer(path)
    with mlxq.load(path) as model:
        assert model.context_length == 64
        assert model.stop_tokens == {256}
        with pytest.raises(GenerationError, match=r"70 tokens.*64"):
            model.stream("x" * 70, **RAW)


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
        ({"seed": 1.5}, "seed is 1.5: it must be a whole number"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"temperature": "0.7"}, "temperature is '0.7': it must be a number, 0 or more"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 3.0}, "max_tokens is 3.0"),
        ({"stop_tokens": 5}, "stop_tokens is 5"),
        ({"stop_tokens": "ab"}, "stop_tokens is 'ab'"),
        ({"stop_tokens": ["a"]}, "a stop token is 'a'"),
    ],
)
def test_options_out_of_range(tiny, options, message):
    with pytest.raises(GenerationError, match=message):
        tiny.stream("a", **options)


def test_numbers_of_numpy_are_numbers(tiny):
    options = {"temperature": np.float32(1.0), "seed": np.uint64(7), "top_k": np.int64(5), "stop_tokens": np.array([3])}
    ours = tiny.generate("a", max_tokens=np.int64(3), **RAW, **options)
    plain = {"temperature": 1.0, "seed": 7, "top_k": 5, "stop_tokens": [3]}
    assert ours.token_ids == tiny.generate("a", max_tokens=3, **RAW, **plain).token_ids


def test_an_unknown_back_end_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQ_BACKEND", "foo")
    with pytest.raises(BackendError, match=r"MLXQ_BACKEND: unknown back end 'foo'"):
        mlxq.load(tmp_path / "nothing")


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


def test_a_failed_text_leaves_no_ring_that_keeps_the_model(tmp_path):
    tensors = random_tensors(llama_shapes(LLAMA))
    tensors["model.norm.weight"][3] = np.nan
    model = mlxq.load(make_model(tmp_path / "nan", tensors=tensors))
    module = weakref.ref(model.module)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(GenerationError):
            model.generate("a", max_tokens=2)
        model.close()
        del model
        deadline = time.monotonic() + 5
        while module() is not None and time.monotonic() < deadline:
            time.sleep(0.01)  # until the worker has let go of its job
        assert module() is None
    finally:
        gc.enable()


def test_a_short_text_does_not_wait_for_a_long_one():
    order = []

    def work(name, n):
        for _ in range(n):
            order.append(name)
            time.sleep(0.002)
            yield name

    # Read as fast as it comes, so that the long one could always be served first.
    long = threading.Thread(target=lambda: list(worker.iterate(work("long", 200))))
    long.start()
    while not order:
        time.sleep(0.001)
    short = list(worker.iterate(work("short", 5)))
    assert short == ["short"] * 5
    assert order.count("long") < 150
    long.join()
    between = order[order.index("short") :][:9]
    assert between == ["short", "long"] * 4 + ["short"]


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
    # What was computed ahead is dropped.
    assert result.token_ids == tuple(t for p in seen[:2] for t in p.token_ids)
    before_work = tiny.generate("stop me", cancel=cancel, **RAW)
    assert (before_work.finish_reason, before_work.text) == ("cancelled", "")
    with pytest.raises(Cancelled):
        mlxq.load(tiny_llama, cancel=cancel)


def test_cancelling_with_a_slow_reader_gives_no_token_more(tiny):
    cancel, result = CancelToken(), None
    options = {"max_tokens": 12, "stop_tokens": (), "cancel": cancel, "progress": progress_that_waits(0.3)}
    for piece in tiny.stream("stop me", **options, **RAW):
        # By now all 12 tokens wait in the queue, with the end of the text.
        cancel.cancel()
        result = piece.result or result
    assert (result.finish_reason, result.generation_tokens) == ("cancelled", len(result.token_ids))
    assert result.generation_tokens < 6


def progress_that_waits(seconds):
    """A callback that sleeps at the first token."""

    def progress(event):
        if (event.stage, event.done) == ("generate", 1):
            time.sleep(seconds)

    return progress


def test_the_speed_of_a_cancelled_prompt_counts_what_was_read(tiny, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", {"cpu": 4, "gpu": 4})
    request = decoding.Request([1] * 100, 5, frozenset(), 0.0, 1.0, 0, 0.0, 0)
    cancel, last = CancelToken(), None
    for item in decoding.decode(tiny.module, request, cancel):
        last = item
        if getattr(item, "done", 0) == 8:
            cancel.cancel()
    assert (last.reason, last.prompt_tokens) == ("cancelled", 8)


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


def test_what_is_wrong_in_the_config_is_not_blamed_on_the_tokenizer(tmp_path, capfd, caplog):
    path = make_model(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    for wrong in ({"num_attention_heads": 0}, {"max_position_embeddings": "512"}):
        (path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(CheckpointError, match=r"config\.json") as caught:
            mlxq.load(path)
        assert "tokenizer" not in str(caught.value)
    # Settings that transformers comments on are none of the user's business here.
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default", "zz": 1}}))
    mlxq.load(path).close()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


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
