"""Messages: what the Hub's library raises during a push, in our four parts.

They quote no URL and no token.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

from compress.checkpoint.source import UNREACHED, hub_errors
from compress.errors import CompressError, InputError, MachineError

_WAITING = re.compile(r"Rate limited\. Waiting [\d.]+s before retry.*|Retrying in [\d.]+s.*")
"""Lines of the library's log that quote no URL."""
AGAIN = "run it again: what has been uploaded is not uploaded twice"
LOGIN = "`hf auth login`, or set HF_TOKEN, with a token that may write"
Tell = Callable[[str], None]
T = TypeVar("T")
_PAUSES_SECONDS = (5, 10, 20, 40, 80)
"""How long to wait where the Hub does not say it."""
_LONGEST_PAUSE_SECONDS = 600


def host() -> str:
    """The Hub's name, for messages."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "the Hub"


@contextmanager
def told(repo: str, tell: Tell) -> Iterator[None]:
    """Turns exceptions into messages about `repo`, and tells when the library waits and what the Hub warns of."""

    class Waits(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            if _WAITING.fullmatch(text := entry.getMessage()):
                tell(f"{host()} is busy: {text}")

    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers, logger.propagate
    with hub_errors(lambda error: as_message(repo, error), logging.WARNING), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logger.handlers, logger.propagate = [Waits()], False
        try:
            yield
        finally:
            logger.handlers, logger.propagate = before
            for each in said:
                if issubclass(each.category, UserWarning):
                    tell(" ".join(str(each.message).split()))


def patiently(call: Callable[[], T], tell: Tell) -> T:
    """What `call` returns; called again after a while where the Hub says that there are too many requests."""
    from huggingface_hub import errors

    for seconds in _PAUSES_SECONDS:
        try:
            return call()
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 429:
                raise
            asked = error.response.headers.get("Retry-After", "")
            seconds = min(int(asked), _LONGEST_PAUSE_SECONDS) if asked.isdecimal() else seconds
            tell(f"{host()} is busy: going on in {seconds} s")
            time.sleep(seconds)
    return call()


def as_message(repo: str, error: Exception) -> CompressError:
    """The message for an exception."""
    from huggingface_hub import errors

    # An upload that failed is raised as a RuntimeError that names the file.
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    kind, answer = type(error).__name__, f"an answer of {host()}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MachineError(repo, f"a connection to {host()}", "HF_HUB_OFFLINE is set", "unset it")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return MachineError(repo, f"a login at {host()}", "no token", LOGIN)
    if isinstance(error, errors.GatedRepoError):
        do = f"ask for access on its page, https://{host()}/{repo}, or push to another repository"
        return MachineError(repo, "access to the repository", "it is gated, and this account has none", do)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(repo, "a branch, or refs/pr/N of an open pull request", "no such revision", "check --revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return MachineError(repo, "a repository that this token may see", "none", f"check the name, and {LOGIN}")
    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(repo, error.response.status_code)
    if isinstance(error, ValueError) and "README.md" in str(error):
        # The Hub's own words about the metadata.
        said = [line.removeprefix("- ") for line in str(error).splitlines()[1:] if line]
        do = "mend the metadata of README.md; for its licence see --license"
        return InputError("README.md", f"metadata that {host()} takes", "; ".join(said)[:500], do)
    if kind in UNREACHED:
        return MachineError(repo, answer, f"no connection ({kind})", "check the network and HF_ENDPOINT")
    if isinstance(error, OSError) and error.errno is not None:
        return MachineError(repo, "a readable file", error.strerror or kind, AGAIN)
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
        return MachineError(repo, answer, f"something else ({kind})", "check HF_ENDPOINT and the proxy")
    return MachineError(repo, answer, f"the connection was cut ({kind})", AGAIN)


def _of_status(repo: str, status: int) -> CompressError:
    """The message for an HTTP status."""
    got, where = f"HTTP status {status}", f"an answer of {host()}"
    if status == 401:
        return MachineError(repo, f"a login that {host()} takes", f"{got}: the token is not valid", LOGIN)
    if status == 403:
        do = f"{LOGIN}; to a repository of others: --pr"
        return MachineError(repo, "a token that may write there", f"{got}: this one may not", do)
    if status in (409, 412):
        return MachineError(repo, "a repository that nobody else is changing", f"{got}: somebody is", "run it again")
    if status == 429:
        return MachineError(repo, where, f"{got}: too many requests, for too long", f"wait, and then {AGAIN}")
    return MachineError(repo, where, got, AGAIN)
