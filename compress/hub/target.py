"""Target: the repository that is pushed to, and who may write there.

The Hub is asked here, and nothing is changed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.checkpoint.manifest import FILE as MANIFEST_FILE
from compress.checkpoint.manifest import Source
from compress.checkpoint.reader import ADAPTER
from compress.errors import CompressError, InputError, MachineError, UsageError, did_you_mean
from compress.evaluate.records import VERIFICATION
from compress.hub.messages import LOGIN, Tell, host, patiently, told
from compress.spec.push import MAIN, PushOptions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_PROPOSED = re.compile(r"refs/pr/\d+")
_BESIDE = ("quantize_config.json", "quant_config.json", VERIFICATION)
"""Files that say what weights are."""


@dataclass(frozen=True)
class Target:
    """A repository before a push."""

    repo: str
    user: str
    exists: bool
    private: bool
    revision: str
    """Where commits go: a branch, or refs/pr/N."""
    made: bool
    """Whether that is there already."""
    proposes: bool
    """Whether a pull request is to be made."""
    commit: str
    """The last commit there, or where it starts from; empty for a repository that is to be made."""
    names: tuple[str, ...]
    """The files there."""

    def stale(self, files: set[str]) -> list[str]:
        """Files of an earlier push that a reader would take for part of this one."""
        weights = (
            n for n in self.names if "/" not in n and (n.endswith((".safetensors", ".safetensors.index.json")) or n in _BESIDE)
        )
        return sorted({*weights, *(name for name in self.names if name.startswith(f"{ADAPTER}/"))} - files)


def target_of(options: PushOptions, tell: Tell) -> Target:
    """Asks the Hub who is logged in and what is there. Raises CompressError for a push that could not be made."""
    from huggingface_hub import HfApi, get_token, is_offline_mode

    repo = options.repo
    if is_offline_mode():
        raise MachineError(repo, f"a connection to {host()}", "HF_HUB_OFFLINE is set", "unset it")
    if get_token() is None:
        raise MachineError(repo, f"a login at {host()}", "no token", LOGIN)
    api = HfApi()
    with told(repo, tell):
        who = patiently(api.whoami, tell)
        user, role = str(who["name"]), str(((who.get("auth") or {}).get("accessToken") or {}).get("role", ""))
        owners = [user, *(str(org["name"]) for org in who.get("orgs") or ())]
    if role == "read":
        raise MachineError(repo, "a token that may write", f"one of {user} that may only read", LOGIN)
    there = _info(api, repo, None, tell)
    owner = repo.partition("/")[0]
    if there is None and options.pr:
        raise InputError(repo, "a repository, for a pull request to it", "no such repository", "leave --pr out to make it")
    if there is None and role == "write" and owner not in owners:
        got = f"'{owner}'{did_you_mean(owner, owners)}"
        raise UsageError(repo, f"an owner that {user} may push to: {', '.join(owners)}", got, "check the name, and the login")
    if there is None:
        return Target(repo, user, False, options.private, options.revision, options.revision == MAIN, False, "", ())
    if options.private and not there.private:
        do = "make it private in its settings, choose another name, or leave --private out"
        raise UsageError(repo, "a private repository", "one that is there, and public", do)
    return _existing(api, options, there, user, tell)


def _existing(api: HfApi, options: PushOptions, there: Any, user: str, tell: Tell) -> Target:
    """The target in a repository that is there."""
    repo, revision, proposes = options.repo, options.revision, options.pr
    if options.pr:
        with told(repo, tell):
            ours = [pull for pull in api.get_repo_discussions(repo) if (pull.title, pull.author) == (options.message, user)]
            pulls = [pull for pull in ours if pull.is_pull_request and pull.status in ("open", "draft")]
        if pulls:
            revision, proposes = f"refs/pr/{max(pull.num for pull in pulls)}", False
    found = there if revision == MAIN else _info(api, repo, revision, tell)
    if found is None and _PROPOSED.fullmatch(revision):
        raise InputError(repo, "a pull request that is there", f"no {revision}", "check its number")
    names = tuple(name for sibling in (found or there).siblings or () if (name := sibling.rfilename).isprintable())
    weights = [name for name in names if "/" not in name and name.endswith((".safetensors", ".bin", ".gguf"))]
    if revision == MAIN and not proposes and weights and MANIFEST_FILE not in names:
        do = "choose another name; or --pr to propose it, or --revision for a branch of its own"
        raise UsageError(repo, "a new repository, or one that was pushed by compress", f"another model: {weights[0]}", do)
    return Target(repo, user, True, bool(there.private), revision, found is not None, proposes, str((found or there).sha), names)


def _info(api: HfApi, repo: str, revision: str | None, tell: Tell) -> Any:
    """What the Hub says of a repository at a revision; None where there is none."""
    from huggingface_hub import errors

    with told(repo, tell):
        try:
            return patiently(lambda: api.model_info(repo, revision=revision), tell)
        except errors.GatedRepoError:
            raise
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return None


def base_of(source: Source) -> str:
    """The Hub id of the model that a lineage begins with; empty if it is not one of the Hub."""
    return source.name if source.commit and _HUB_ID.fullmatch(source.name) else ""


def is_gated(base: str) -> bool | None:
    """Whether a model of the Hub is gated; None if the Hub does not say."""
    from huggingface_hub import HfApi

    try:
        with told(base, lambda text: None):
            return bool(HfApi().model_info(base).gated)
    except CompressError:
        return None
