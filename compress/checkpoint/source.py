"""Source: opens what MODEL names, a local directory or one of the Hub.

    path/to/model                      a directory; so is all that begins with . / or ~
    owner/name, name, owner/name@v1    a model of the Hub, at a branch, tag or commit

From the Hub the files that an artifact needs are fetched, at one commit, into the Hub's own cache: the safetensors files
that the index names, JSON, tokenizer and text files; Python files only for a trusted model, pickles never. A plan needs less:
config.json, the index, and the headers by range requests. Messages quote no URL and no HTTP header: either may hold a credential.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from compress.checkpoint.manifest import FILE as MANIFEST_FILE
from compress.checkpoint.reader import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    GGUF,
    Checkpoint,
    assemble,
    header_of,
    is_weights,
    local_header,
    open_checkpoint,
    shard_files,
)
from compress.checkpoint.safetensors_header import TensorRef
from compress.errors import CompressError, InputError, MachineError

_HEADS = ("config.json", "model.safetensors.index.json", MANIFEST_FILE, ADAPTER_CONFIG)
_CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.tiktoken", "tokenizer*", "vocab*", "LICEN[CS]E*", "NOTICE*")
_ID = re.compile(r"[\w-]+|[\w.-]+/[\w.-]+", re.ASCII)
"""The id of a model of the Hub; old models have no owner, and then no dot in the name."""
UNREACHED = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")
"""Exceptions of the HTTP client for a server that is not there."""
_WORKERS = 8


def open_source(model: str | os.PathLike[str], trusted: bool = False) -> Checkpoint:
    """Opens a directory or a model of the Hub, fetching what is not in the cache yet. Raises CompressError.

    `trusted` allows its Python files to be run when a class of them is needed.
    """
    model = os.fspath(model)
    if (directory := _directory(model)) is not None:
        return open_checkpoint(directory, trusted=trusted)
    repo = _look_up(model, trusted)
    with repo.named():
        shards = shard_files(repo.folder, repo.files)
        repo.fetch([*shards, *(file for file in repo.files if not is_weights(file) or file == ADAPTER_TENSORS)])
        return repo.assembled(lambda file: local_header(repo.folder / file))


def open_headers(model: str | os.PathLike[str], trusted: bool = False) -> Checkpoint:
    """Like `open_source`, but without the tensors' data: enough for a plan. Raises CompressError."""
    model = os.fspath(model)
    if (directory := _directory(model)) is not None:
        return open_checkpoint(directory, trusted=trusted)
    repo = _look_up(model, trusted)
    with repo.named():
        shards = [*shard_files(repo.folder, repo.files), *(file for file in repo.files if file == ADAPTER_TENSORS)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            headers = dict(zip(shards, pool.map(repo.header, shards), strict=True))
        if trusted:
            repo.fetch([file for file in repo.files if file.endswith(".py")])
        return repo.assembled(headers.__getitem__)


def _directory(model: str) -> Path | None:
    """The local directory that `model` names, None if it names a model of the Hub. Raises InputError."""
    if "://" in model:
        raise InputError("MODEL", "a directory, or a Hub id like owner/name", "a URL", "leave out all but owner/name")
    path = os.path.expanduser(model)
    if model and (os.path.isdir(path) or (path.endswith(GGUF) and os.path.isfile(path))):
        return Path(path)
    if os.path.exists(path):
        raise InputError(model, "a directory with config.json and safetensors", "a file", "name the directory that it is in")
    if model and not model.startswith((".", "/", "~")) and not _ID.fullmatch(model.partition("@")[0]):
        raise InputError(model, "a directory, or a Hub id like owner/name", "no such directory")
    if model.startswith((".", "/", "~")):
        raise InputError(model, "a directory with config.json and safetensors", "no such directory")
    # The folder `owner` exists here: a mistyped path is likelier than a model of the Hub. A revision tells them apart.
    if "@" not in model and (parent := os.path.dirname(path)) and os.path.isdir(parent):
        do = f"for the Hub's model of that name, write {model}@main"
        raise InputError(model, "a directory with config.json and safetensors", f"no such directory in {parent}", do)
    return None


@dataclass(frozen=True)
class _Repo:
    """A model of the Hub at one commit; `folder` is its snapshot in the cache."""

    model: str
    folder: Path
    sizes: dict[str, int]
    origin: dict[str, Any]
    trusted: bool

    @property
    def id(self) -> str:
        return self.model.partition("@")[0]

    @property
    def files(self) -> list[str]:
        """The top-level files that are weights or are copied to the output, and the files of an adapter."""
        top = [file for file in self.sizes if "/" not in file and (is_weights(file) or self.carries(file))]
        return sorted(top + ([ADAPTER_CONFIG, ADAPTER_TENSORS] if ADAPTER_TENSORS in self.sizes else []))

    def carries(self, file: str) -> bool:
        """Whether this file is copied into an artifact, by its name; `is_weights` recognises those that hold weights."""
        return self.trusted if file.endswith(".py") else any(fnmatchcase(file, pattern) for pattern in _CARRIED)

    def assembled(self, header: Callable[[str], list[TensorRef]]) -> Checkpoint:
        """The checkpoint made of the repository's files."""
        return assemble(self.folder, self.files, self.others, header, self.id, self.origin, self.trusted)

    @property
    def others(self) -> list[str]:
        """Files and folders of the repository that are not used."""
        top = {file if "/" not in file else file.partition("/")[0] + "/" for file in self.sizes}
        return sorted(file for file in top - set(self.files) if not file.startswith("."))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Makes messages of errors raised inside name the repository, not its place in the cache."""
        try:
            yield
        except InputError as error:
            wheres = [os.path.relpath(os.path.join(self.folder, p.where), self.folder) for p in error.problems]
            raise InputError(
                replace(problem, where=os.path.normpath(os.path.join(self.id, where)))
                for problem, where in zip(error.problems, wheres, strict=True)
            ) from None

    def fetch(self, files: list[str]) -> None:
        """Downloads `files` into the snapshot, unless the cache has them."""
        with _hub_errors(self.model):
            _snapshot(self.id, self.folder.name, files)

    def header(self, file: str) -> list[TensorRef]:
        """The tensors of a shard, from the cache or by range requests."""
        if (self.folder / file).is_file():
            return local_header(self.folder / file)
        return header_of(lambda offset, length: self.read(file, offset, length), self.sizes[file], file)

    def read(self, file: str, offset: int, length: int) -> bytes:
        """A few bytes of a file. A server without range requests sends the whole file; reading stops after these bytes."""
        from huggingface_hub import constants, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers, http_stream_backoff  # type: ignore[attr-defined]

        if not length:
            return b""
        url = hf_hub_url(self.id, file, revision=self.folder.name)
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        # Only HTTP statuses are retried: http_stream_backoff cannot catch an exception from the body of its `with`.
        options: dict[str, Any] = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "retry_on_exceptions": ()}
        headers = {**build_hf_headers(), **wanted}
        with _hub_errors(self.model), http_stream_backoff("GET", url, headers=headers, **options) as response:
            hf_raise_for_status(response)
            start = 0 if response.status_code == 206 else offset
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= start + length:
                    break
        if len(data) < start + length:
            got = f"{len(data)} bytes: the read was cut"
            raise MachineError(f"{self.id}/{file}", f"{start + length} bytes", got, "run it again")
        return bytes(data[start : start + length])


def _look_up(model: str, trusted: bool) -> _Repo:
    """Finds the commit, the files and the card of `model`, and fetches its small files."""
    from huggingface_hub import HfApi, get_cached_repo_tree, is_offline_mode

    name, at, revision = model.partition("@")
    if at and not revision:
        raise InputError(model, "a branch, tag or commit after '@'", "nothing", "leave '@' out for the main branch")
    card: dict[str, Any] = {}
    with _hub_errors(model):
        if not is_offline_mode():
            found = HfApi().model_info(name, revision=revision or None)
            card = vars(found.card_data) if found.card_data else {}
            # Before anything is written.
            _refuse_names(name, [sibling.rfilename for sibling in found.siblings or ()])
        # Resolves the revision once; later requests name the commit.
        folder = _snapshot(name, revision or None, _HEADS, quiet=True)
        card = _cached_card(folder / "README.md") if is_offline_mode() else card
        sizes = {entry.path: entry.size for entry in get_cached_repo_tree(name, revision=folder.name)}
        _refuse_names(name, sizes)
    named = "license_name" if card.get("license") == "other" and card.get("license_name") else "license"
    licence = ", ".join(_texts(card.get(named))) or None
    origin = {"commit": folder.name, "licence": licence, "datasets": _texts(card.get("datasets"))}
    return _Repo(model, folder, sizes, origin, trusted)


def _refuse_names(model: str, names: Iterable[str]) -> None:
    """Raises InputError for a listing with a name that may lead out of a directory, here or where it is fetched next."""
    for name in names:
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & {*parts} or re.match("[A-Za-z]:", name):
            raise InputError(model, "names of files inside the repository", repr(name), "refused: do not use this model")


def _snapshot(name: str, revision: str | None, files: Iterable[str], quiet: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Quiet(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    patterns, bars = [glob.escape(file) for file in files], Quiet if quiet else None
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=bars))


def _cached_card(readme: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(readme) or {}
    except Exception:  # no card, or a broken one, which the Hub ignores, too
        return {}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


@contextmanager
def hub_errors(message: Callable[[Exception], CompressError], level: int = logging.ERROR) -> Iterator[None]:
    """Turns exceptions of the Hub's library into our messages: its own texts quote URLs. `level` is that of its log."""
    from huggingface_hub import errors

    # HTTPError is httpx's or httpx2's, depending on the library's version; its xet client raises RuntimeError.
    http: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    # An answer that is not the Hub's fails anywhere in the library's parsing.
    odd = (ValueError, TypeError, KeyError, AttributeError)
    expected = (OSError, *odd, RuntimeError, http, errors.CachedRepoTreeNotFoundError)
    # The library's warnings of interrupted downloads quote signed URLs, which give anyone who reads the log the file.
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    except expected as error:
        raise message(error) from None
    finally:
        logger.setLevel(before)


def _hub_errors(model: str) -> AbstractContextManager[None]:
    return hub_errors(lambda error: _as_message(model, error))


def _as_message(model: str, error: Exception) -> CompressError:
    from huggingface_hub import constants, errors, get_token

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    (name, _, revision), host, kind = model.partition("@"), urlsplit(constants.ENDPOINT).hostname, type(error).__name__
    answer, again = f"an answer of {host}", "run it again: what has been fetched is kept"
    if isinstance(error, errors.HFValidationError):
        return InputError(model or "MODEL", "a directory, or a Hub id like owner/name", "neither")
    if isinstance(error, errors.GatedRepoError):
        got = "it is gated, and " + ("the token in use has no access" if get_token() else "no token is set")
        do = f"ask for access on its page, https://{host}/{name}, then set HF_TOKEN to a token of that account"
        return MachineError(name, "access to the model", got, do)
    if isinstance(error, errors.RepositoryNotFoundError):
        do = "check the name; if it is private, set HF_TOKEN to a token that may read it"
        return InputError(name, f"a directory here, or a model of {host}", "neither, or a private one", do)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(model, f"a branch, tag or commit of {name}", f"no revision '{revision or 'main'}'")
    if isinstance(error, errors.OfflineModeIsEnabled | errors.CachedRepoTreeNotFoundError):
        do = "name a directory that is there, or unset HF_HUB_OFFLINE to fetch it from the Hub"
        if not _in_cache(name):
            expected = "a directory, or a model that the Hub's cache has"
            return InputError(model, expected, "no such directory, and nothing of it in the cache (HF_HUB_OFFLINE is set)", do)
        return MachineError(model, "the model in the Hub's cache", "not all of it, and the Hub is off (HF_HUB_OFFLINE)", do)
    if isinstance(error, errors.HfHubHTTPError):
        do = "set HF_TOKEN to a valid token" if error.response.status_code in (401, 403) else again
        return MachineError(model, answer, f"HTTP status {error.response.status_code}", do)
    if kind in UNREACHED:
        do = "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what the cache has"
        if not _in_cache(name):
            got = f"no such directory, and no connection to {host} ({kind})"
            return MachineError(model, f"a directory here, or a model of {host}", got, f"name a directory that is there, or {do}")
        return MachineError(model, answer, f"no connection ({kind})", do)
    if isinstance(error, OSError) and error.errno is not None:
        do = "free some space there, or set HF_HUB_CACHE to another place"
        return MachineError(constants.HF_HUB_CACHE, "a place to write", error.strerror or kind, do)
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
        return MachineError(model, answer, f"something else ({kind})", "check HF_ENDPOINT and the proxy")
    return MachineError(model, answer, f"the read was cut ({kind})", again)


def _in_cache(name: str) -> bool:
    """Whether the Hub's cache has anything of a model."""
    from huggingface_hub import constants

    return os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}"))
