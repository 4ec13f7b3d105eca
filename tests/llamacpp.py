"""llama.cpp as the judge: its HTTP server inside this process (the package `xllamacpp`)."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import urlparse

import xllamacpp


class LlamaCpp:
    """A model loaded by llama.cpp; `tokenize` and `logprobs` answer what it computes."""

    def __init__(self, path: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port = 256, 1, 0
        params.warmup, params.verbosity = False, -1
        params.cpuparams.n_threads = 1
        params.n_gpu_layers = 0
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)
        self._http = http.client.HTTPConnection(urlparse(self._server.listening_address).netloc, timeout=60)

    def _post(self, path: str, body: dict) -> dict:
        self._http.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self._http.getresponse()
        data = response.read()
        assert response.status == 200, data
        return json.loads(data)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        return self._post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})["tokens"]

    def logprobs(self, ids: list[int], n: int) -> dict[int, float]:
        """The `n` most likely next tokens and their log-probabilities."""
        body = {"prompt": ids, "n_predict": 1, "n_probs": n, "temperature": 0, "ignore_eos": True}
        answer = self._post("/completion", body)
        return {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}
