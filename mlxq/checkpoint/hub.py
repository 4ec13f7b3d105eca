"""Models of the Hugging Face Hub: the local cache first, then only the files that are needed.

Nothing large is fetched before the file listing and `config.json` have shown that the model can be read.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mlxq.checkpoint.config import read_config
from mlxq.checkpoint.huggingface import is_companion, is_tokenizer
from mlxq.checkpoint.packed.schemes import SETTINGS_FILES, check_directory
from mlxq.checkpoint.shards import INDEX, explain_no_weights, find_weights, read_index
from mlxq.errors import CheckpointError, MlxqError
from mlxq.types import Progress, ProgressCallback

#: Seconds that the Hub has to answer its first question, name resolution and every address tried included.
#: The environment variable HF_HUB_ETAG_TIMEOUT of huggingface_hub, where set, replaces it.
PATIENCE = 4.0
_SMALL = ("config.json", INDEX, *SETTINGS_FILES)

T = TypeVar("T")


def fetch(
    repo_id: str,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    accept: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Directory of a snapshot of the model `repo_id`, out of the cache when that has it, else downloaded.

    Args:
        revision: branch, tag or commit; the default branch when None.
        progress: called with bytes of the stage `download`.
        accept: called with config.json before weights are fetched; it raises to refuse the model.

    Raises:
        CheckpointError: not in the cache and the Hub cannot be reached (or must not be: HF_HUB_OFFLINE), no such
            model or revision, access not granted, or a model that cannot be read.
    """
    from huggingface_hub import constants

    snapshot = _cached(repo_id, revision)
    if snapshot is not None and _has_weights(snapshot) and is_tokenizer([p.name for p in snapshot.iterdir()]):
        return snapshot
    try:
        if constants.HF_HUB_OFFLINE:
            raise _Unreachable("HF_HUB_OFFLINE forbids to use the network")
        return _download(repo_id, revision, progress, accept)
    except _Unreachable as e:
        if snapshot is not None and _has_weights(snapshot):
            return snapshot
        state = "only incompletely in" if snapshot is not None else "not in"
        raise CheckpointError(
            f"{_label(repo_id, revision)}: no such path here, {state} the cache of the Hub, and {e}"
        ) from e


class _Unreachable(Exception):
    """The Hub gave no answer."""


def _label(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id} at revision {revision}"


def _cached(repo_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo_id, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except ValueError as e:  # huggingface_hub's own rules for names
        raise CheckpointError(f"{repo_id}: not a legal Hub id: {_first_line(e)}") from e
    return Path(found).parent if isinstance(found, str) else None


def _has_weights(snapshot: Path) -> bool:
    """Whether every weight file of a snapshot is there (an interrupted download leaves some out)."""
    try:
        weight_map = read_index(snapshot)
        names = set(weight_map.values()) or find_weights((p.name for p in snapshot.iterdir()), snapshot)
    except CheckpointError:
        return False
    return bool(names) and all((snapshot / name).is_file() for name in names)


def _download(
    repo_id: str,
    revision: str | None,
    progress: ProgressCallback | None,
    accept: Callable[[dict[str, Any]], object] | None,
) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    label = _label(repo_id, revision)
    configured = constants.HF_HUB_ETAG_TIMEOUT
    patience = PATIENCE if configured == constants.DEFAULT_ETAG_TIMEOUT else float(configured)
    with _translated(label):
        api = HfApi(library_name="mlxq")
        ask = lambda: api.model_info(repo_id, revision=revision, files_metadata=True, timeout=patience)  # noqa: E731
        info = _within(patience, ask)
        sizes = {f.rfilename: f.size or 0 for f in info.siblings or ()}
        _check_listing(repo_id, label, sizes)
        for name in _SMALL:
            if name in sizes:
                path = hf_hub_download(repo_id, name, revision=info.sha, library_name="mlxq")
    snapshot = Path(path).parent
    config = read_config(snapshot)
    if config.get("quantization") is None:
        check_directory(snapshot, config, label)
    if accept is not None:
        accept(config)
    needed = _needed(snapshot, sizes)
    with _translated(label):
        total = sum(sizes[n] for n in needed if not (snapshot / n).exists())
        # The revision's own name, not the commit: the cache then remembers which commit it stands for.
        found = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[n.replace("[", "[[]") for n in needed],
            library_name="mlxq",
            tqdm_class=_progress_bar(repo_id, total, progress),
        )
    if progress is not None:
        progress(Progress("download", total, total, "bytes", repo_id))
    return Path(found)


def _check_listing(repo_id: str, label: str, names: dict[str, int]) -> None:
    if INDEX not in names and not find_weights(names, label):
        raise CheckpointError(f"{label}: {explain_no_weights(names, repo_id)}")
    if "config.json" not in names:
        raise CheckpointError(f"{label}: has weights on the Hub, but no config.json that describes them")


def _needed(snapshot: Path, names: dict[str, int]) -> list[str]:
    """Of a repository's files: configuration, companions, and the weight files that the index names."""
    weights = set(read_index(snapshot).values()) or set(find_weights(names, snapshot))
    missing = sorted(weights - set(names))
    if missing:
        raise CheckpointError(f"{snapshot / INDEX}: names {missing[0]}, which the Hub does not have")
    return sorted(weights | {n for n in names if n in _SMALL or is_companion(n)})


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Result of `work`, done on a thread of its own so that name resolution cannot outlast the deadline."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except Exception as e:
            outcome.append((False, e))

    thread = threading.Thread(target=run, name="mlxq-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise _Unreachable(f"the Hub did not answer within {seconds:g} seconds (HF_HUB_ETAG_TIMEOUT sets another time)")
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    return value


@contextmanager
def _translated(label: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into one line."""
    from huggingface_hub import errors

    # The HTTP library's name differs between versions of huggingface_hub; its base error is the first base of this.
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except (MlxqError, _Unreachable):
        raise
    except errors.GatedRepoError as e:
        raise CheckpointError(
            f"{label}: access must be granted first: accept its terms on the Hub and log in (hf auth login)"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise CheckpointError(
            f"{label}: neither a local path nor a model on the Hub (if it is private, log in: hf auth login)"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise CheckpointError(f"{label}: the model is on the Hub, but has no such revision") from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        if status == 401:
            raise CheckpointError(f"{label}: the Hub does not accept the login of this machine: hf auth login") from e
        if status == 429 or status >= 500:
            raise _Unreachable(f"the Hub cannot serve it now ({_first_line(e)})") from e
        raise CheckpointError(f"{label}: the Hub answered with an error: {_first_line(e)}") from e
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, transport) as e:
        raise _Unreachable(f"the Hub cannot be reached ({_first_line(e)})") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{label}: download failed: {_first_line(e)}") from e


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _progress_bar(repo_id: str, total: int, progress: ProgressCallback | None) -> type:
    """A tqdm class that prints nothing and passes on the bytes that arrive."""
    from tqdm.std import tqdm

    arrived = 0

    class Bar(tqdm):
        monitor_interval = 0  # no monitoring thread

        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.pop("name", None)
            kwargs.update(file=io.StringIO(), disable=False)
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal arrived
            shown = super().update(n)
            # Received and written bytes have a bar each: the one further ahead counts.
            if progress is not None and self.unit == "B" and self.n > arrived:
                arrived = self.n
                progress(Progress("download", min(int(arrived), total), total, "bytes", repo_id))
            return shown

    return Bar
