"""Finding a model: paths, the Hub's cache, a Hub (a small server here), and no Hub at all."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from checkpoint_builders import CONFIG, floats, write_config, write_index, write_safetensors

from mlxq.checkpoint import hub
from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint
from mlxq.checkpoint.mlx_directory import MlxCheckpoint
from mlxq.checkpoint.source import open_checkpoint, resolve
from mlxq.errors import CheckpointError, MlxqError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refuse(source, *parts, **options):
    with pytest.raises(CheckpointError) as caught:
        resolve(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(source)), message
    for part in parts:
        assert part in message, message


def write_model(directory, tokenizer=True, **config):
    write_config(directory, **config)
    write_safetensors(directory / "model.safetensors", {"a.weight": floats(4, 64)})
    if tokenizer:
        (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and a Hub that nobody may ask."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def cached(cache, repo="org/name", branch="main"):
    """The folder of a cached snapshot."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / branch).write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


# --- local paths -----------------------------------------------------------------------------------------------------


def test_directories_open_as_what_they_are(tmp_path):
    write_model(tmp_path / "hf")
    assert isinstance(open_checkpoint(tmp_path / "hf"), HuggingFaceCheckpoint)
    assert isinstance(open_checkpoint(str(tmp_path / "hf")), HuggingFaceCheckpoint)
    write_model(tmp_path / "mlx", quantization={"bits": 4, "group_size": 64})
    assert isinstance(open_checkpoint(tmp_path / "mlx"), MlxCheckpoint)


@pytest.mark.parametrize(
    "source", ["./foo", "foo/", "/no/such/place", "a/b/c", "~/no-such-model", "../x", "models/x.gguf"]
)
def test_a_path_that_is_not_there_is_not_looked_up(source, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("the Hub was asked"))
    refuse(source, "no such file or directory")


def test_a_single_word_says_what_a_hub_id_looks_like(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refuse("smollm2", "no such file or directory", "organization/name")
    with pytest.raises(CheckpointError, match="is empty"):
        resolve("")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse(tmp_path / "model.safetensors", "name the directory")


def test_a_local_directory_of_the_form_of_a_hub_id_wins(tmp_path, monkeypatch, cache):
    write_model(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").samefile(tmp_path / "org" / "name")
    refuse("org/name", "local path", "v1", revision="v1")


def test_sources_load_neither_mlx_nor_the_hub(tmp_path):
    write_model(tmp_path / "m")
    code = (
        "import sys; from mlxq.checkpoint.source import open_checkpoint; open_checkpoint(sys.argv[1]);"
        "print([m for m in ('mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'gguf', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_complete_snapshot_needs_no_network(cache, monkeypatch):
    from huggingface_hub import constants

    snapshot = write_model(cached(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("the Hub was asked"))
    assert resolve("org/name") == snapshot
    assert resolve("org/name", revision=COMMIT) == snapshot
    np.testing.assert_array_equal(open_checkpoint("org/name").read("a.weight"), floats(4, 64))


def test_another_revision_than_the_cached_one(cache):
    write_model(cached(cache, branch="v1"))
    assert resolve("org/name", revision="v1").name == COMMIT
    refuse("org/name", "not in the cache", "HF_HUB_OFFLINE")
    refuse("org/name", "at revision v2", "HF_HUB_OFFLINE", revision="v2")


def test_offline_and_not_in_the_cache(cache):
    start = time.perf_counter()
    refuse("org/name", "no such path", "not in the cache", "HF_HUB_OFFLINE")
    assert time.perf_counter() - start < 2


def test_offline_with_an_interrupted_download(cache):
    snapshot = write_config(cached(cache))
    refuse("org/name", "only incompletely in the cache")
    write_index(snapshot, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    write_safetensors(snapshot / "model-00001-of-00002.safetensors", {"a": floats(2)})
    refuse("org/name", "only incompletely in the cache")
    (snapshot / "model-00002-of-00002.safetensors").symlink_to(cache / "gone")
    refuse("org/name", "only incompletely in the cache")


def test_offline_without_a_tokenizer_is_still_a_model(cache):
    snapshot = write_model(cached(cache), tokenizer=False)
    assert resolve("org/name") == snapshot


def test_names_that_the_hub_forbids(cache):
    refuse("org/na--me", "not a legal Hub id")


def test_the_environment_variable_is_obeyed(tmp_path):
    """In a fresh process, as a person sets it: one line, at once."""
    import os

    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = "from mlxq.checkpoint.source import resolve; resolve('org/name')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "HF_HUB_OFFLINE forbids" in done.stderr.splitlines()[-1]


# --- a Hub -----------------------------------------------------------------------------------------------------------


class FakeHub:
    """Enough of the Hub's HTTP interface to list and download one model, `org/name`."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.status = 200
        self.headers: dict[str, str] = {}
        self.downloaded: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                outer.answer(self, body=False)

            def do_GET(self):
                outer.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request, body):
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        status, headers, data = self.status, dict(self.headers), b"{}"
        if status == 200 and parts[:4] == ["api", "models", "org", "name"]:
            headers["Content-Type"] = "application/json"
            data = self.tree() if "tree" in parts else self.info()
        elif status == 200 and parts[:3] == ["org", "name", "resolve"]:
            name = "/".join(parts[4:])
            data = self.files[name]
            headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if body:
                self.downloaded.append(name)
        elif status == 200:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)

    def info(self):
        siblings = [{"rfilename": n, "size": len(d)} for n, d in self.files.items()]
        return json.dumps({"id": "org/name", "_id": "1", "sha": COMMIT, "siblings": siblings}).encode()

    def tree(self):
        files = [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in self.files.items()]
        return json.dumps(files).encode()

    def add(self, directory):
        for path in directory.rglob("*"):
            if path.is_file():
                self.files[path.relative_to(directory).as_posix()] = path.read_bytes()


@pytest.fixture
def fake_hub(cache, monkeypatch):
    from huggingface_hub import constants

    served = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_downloads_only_what_is_needed(fake_hub, tmp_path, cache, capfd):
    model = write_model(tmp_path / "m")
    for name in ("README.md", "pytorch_model.bin", "code/mine.py", "onnx.onnx", "consolidated.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"x")
    (model / "LICENSE").write_text("MIT")
    (model / "tokenization_mine.py").write_text("raise SystemExit")
    fake_hub.add(model)
    events = []
    checkpoint = open_checkpoint("org/name", progress=events.append)
    np.testing.assert_array_equal(checkpoint.read("a.weight"), floats(4, 64))
    companions = ["LICENSE", "tokenization_mine.py", "tokenizer.json"]
    assert sorted(fake_hub.downloaded) == sorted([*companions, "config.json", "model.safetensors"])
    assert sorted(checkpoint.companion_files()) == companions
    assert {e.stage for e in events} == {"download"}
    assert all(0 <= e.done <= e.total for e in events)
    assert [e.done for e in events] == sorted(e.done for e in events)
    sizes = [len(fake_hub.files[n]) for n in (*companions, "model.safetensors")]
    assert (events[-1].done, events[-1].total, events[-1].unit) == (sum(sizes), sum(sizes), "bytes")
    assert capfd.readouterr().out == ""

    # The branch is now known to the cache: the Hub is not asked again.
    fake_hub.status = 500
    assert resolve("org/name") == checkpoint.path


def test_downloads_the_shards_that_the_index_names(fake_hub, tmp_path, cache):
    model = write_config(tmp_path / "m")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for i, name in enumerate(names):
        write_safetensors(model / name, {f"t{i}": floats(3, seed=i)})
    write_safetensors(model / "model.safetensors", {"t0": floats(3), "t1": floats(3)})
    write_index(model, {"t0": names[0], "t1": names[1]})
    fake_hub.add(model)
    assert [p.name for p in open_checkpoint("org/name").files()] == names
    assert "model.safetensors" not in fake_hub.downloaded


def test_an_interrupted_download_is_completed(fake_hub, tmp_path, cache):
    write_config(cached(cache))
    fake_hub.add(write_model(tmp_path / "m"))
    assert list(open_checkpoint("org/name").tensors) == ["a.weight"]


def test_pickled_weights_are_refused_before_they_are_fetched(fake_hub, tmp_path):
    model = write_config(tmp_path / "m")
    (model / "pytorch_model.bin").write_bytes(b"x")
    fake_hub.add(model)
    refuse("org/name", "pickled", "pytorch_model.bin")
    assert fake_hub.downloaded == []


def test_gguf_repositories_say_which_files_they_have(fake_hub):
    fake_hub.files = {"README.md": b"", "name-Q4_K_M.gguf": b""}
    refuse("org/name", "GGUF", "`hf download org/name name-Q4_K_M.gguf`, then")
    fake_hub.files["name-Q8_0.gguf"] = b""
    refuse("org/name", "`hf download org/name name-Q4_K_M.gguf` (or another of its 2)")
    assert fake_hub.downloaded == []


def test_weights_without_a_config(fake_hub):
    fake_hub.files = {"model.safetensors": b"", "README.md": b""}
    refuse("org/name", "no config.json")
    assert fake_hub.downloaded == []


def test_quantized_by_others_is_refused_before_the_weights_are_fetched(fake_hub, tmp_path):
    fake_hub.add(write_model(tmp_path / "m", quantization_config={"quant_method": "aqlm"}))
    refuse("org/name", "already quantized with aqlm")
    assert fake_hub.downloaded == ["config.json"]


@pytest.mark.parametrize("entry", ["convert", "load"])
def test_an_unknown_architecture_is_refused_before_the_weights_are_fetched(fake_hub, tmp_path, entry):
    import mlxq

    fake_hub.add(write_model(tmp_path / "m", model_type="nosuchmodel"))
    with pytest.raises(CheckpointError, match="nosuchmodel"):
        mlxq.convert("org/name", tmp_path / "out") if entry == "convert" else mlxq.load("org/name")
    assert fake_hub.downloaded == ["config.json"]


def test_model_optimizer_settings_are_read_before_the_weights_are_fetched(fake_hub, tmp_path):
    model = write_model(tmp_path / "m")
    (model / "hf_quant_config.json").write_text(json.dumps({"quant_method": "nosuch"}))
    fake_hub.add(model)
    refuse("org/name", "hf_quant_config.json", "already quantized with nosuch")
    assert "model.safetensors" not in fake_hub.downloaded


def test_index_that_names_a_shard_which_the_hub_lacks(fake_hub, tmp_path):
    model = write_config(tmp_path / "m")
    write_index(model, {"a": "model-00001-of-00001.safetensors"})
    fake_hub.add(model)
    with pytest.raises(CheckpointError, match=r"names model-00001-of-00001\.safetensors, which the Hub does not have"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "neither a local path nor a model on the Hub"),
        (401, {"X-Error-Code": "RepoNotFound"}, "neither a local path nor a model on the Hub"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "hf auth login"),
        (403, {"X-Error-Code": "GatedRepo"}, "accept its terms"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision"),
        (400, {}, "answered with an error"),
        (500, {}, "not in the cache of the Hub, and the Hub cannot serve it now"),
        (429, {}, "not in the cache of the Hub, and the Hub cannot serve it now"),
    ],
)
def test_refusals_of_the_hub(fake_hub, status, headers, reason):
    fake_hub.status, fake_hub.headers = status, headers
    refuse("org/name", reason)


def test_a_revision_of_the_hub(fake_hub, tmp_path, cache):
    fake_hub.add(write_model(tmp_path / "m"))
    assert resolve("org/name", revision="v1").name == COMMIT
    assert (cache / "models--org--name" / "refs" / "v1").read_text() == COMMIT


def test_errors_of_the_progress_callback_stop_the_download(fake_hub, tmp_path):
    class Stop(MlxqError):
        pass

    def stop(_):
        raise Stop("enough")

    fake_hub.add(write_model(tmp_path / "m"))
    with pytest.raises(Stop):
        resolve("org/name", progress=stop)


# --- no Hub ----------------------------------------------------------------------------------------------------------


def nobody_listens() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_no_network_is_said_at_once(fake_hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", nobody_listens())
    start = time.perf_counter()
    refuse("org/name", "not in the cache", "cannot be reached")
    assert time.perf_counter() - start < 5


def test_a_network_that_swallows_everything_is_given_up(fake_hub, monkeypatch):
    from huggingface_hub import constants

    assert hub.PATIENCE < 5
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        refuse("org/name", "not in the cache", "the Hub")
        assert time.perf_counter() - start < 2


def test_no_network_but_a_model_without_tokenizer_in_the_cache(fake_hub, cache, monkeypatch):
    from huggingface_hub import constants

    snapshot = write_model(cached(cache), tokenizer=False)
    monkeypatch.setattr(constants, "ENDPOINT", nobody_listens())
    assert resolve("org/name") == snapshot


def test_the_process_is_left_as_it_was(fake_hub, monkeypatch):
    import os

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", nobody_listens())
    before = dict(os.environ), constants.HF_HUB_ETAG_TIMEOUT, socket.getdefaulttimeout()
    refuse("org/name", "cannot be reached")
    assert (dict(os.environ), constants.HF_HUB_ETAG_TIMEOUT, socket.getdefaulttimeout()) == before


def test_config_is_what_the_builders_say(tmp_path):
    assert open_checkpoint(write_model(tmp_path / "m")).config == CONFIG


def test_a_directory_of_gguf_files_says_to_name_one(tmp_path):
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"name one of them, such as .*a\.gguf"):
        open_checkpoint(tmp_path)
