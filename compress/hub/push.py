"""Push: an artifact to a repository of the Hub, in one commit.

    prepared = prepare(artifact, options, tell, ctx)     checks everything, and writes nothing anywhere
    push(prepared, tell)                                 uploads what is not there yet

What is uploaded is a folder of links to the artifact's files with the card in it, so that the artifact itself stays as it is.
The library reads files piece by piece, asks the Hub what it has already, splits hundreds of files into several commits, and
commits nothing where all of it is there.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.reader import README
from compress.context import Context
from compress.hub.card import Changes, edited, metadata
from compress.hub.contents import Contents, contents_of
from compress.hub.messages import Tell, patiently, told
from compress.hub.target import Target, base_of, is_gated, target_of
from compress.report.write_card import card_files, is_ours
from compress.spec.push import MAIN, PushOptions


@dataclass(frozen=True)
class Prepared:
    """A push that has been checked."""

    options: PushOptions
    contents: Contents
    target: Target
    texts: dict[str, str]
    """The card, what belongs to it, and files that are other in a repository, by name."""
    metadata: dict[str, Any]
    gated: str
    """The base model, if it is gated."""

    @property
    def stale(self) -> list[str]:
        """Files there that are removed."""
        return self.target.stale({*self.contents.files, *self.texts})

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is pushed, by name."""
        sizes = {name: path.stat().st_size for name, path in self.contents.files.items()}
        return dict(sorted({**sizes, **{name: len(text.encode()) for name, text in self.texts.items()}}.items()))


@dataclass(frozen=True)
class Pushed:
    """What a push has done; `fresh` is False where everything was there already."""

    url: str
    commit: str
    fresh: bool
    pull_request: str = ""


def prepare(artifact: Path, options: PushOptions, tell: Tell, ctx: Context) -> Prepared:
    """Checks the artifact, the login and the repository. Raises CompressError; nothing has been written then, nor afterwards."""
    contents = contents_of(artifact, options)
    target = target_of(options, tell)
    base = base_of(contents.manifest.source)
    gated = is_gated(base) if base else False
    if gated is None:
        tell(f"the Hub does not say whether {base} is gated")
    changes = Changes(contents.licence, base, bool(gated), bool(contents.readers))
    # A card of ours is written anew, by what is known of the artifact now.
    texts = card_files(artifact, options.repo) if is_ours(artifact) else {}
    text = texts.pop(README, "") or contents.files[README].read_text(encoding="utf-8", errors="replace")
    texts |= {README: edited(text, changes), **contents.texts(options.repo)}
    prepared = Prepared(options, contents, target, texts, metadata(text, changes), base if gated else "")
    if contents.tokens:
        tell("the token ids of the calibration text are pushed with it: calibration.safetensors")
    contents.check_bytes(ctx)
    return prepared


def push(prepared: Prepared, tell: Tell) -> Pushed:
    """Makes the repository and the branch if they are not there, and uploads what is new. Raises CompressError."""
    from huggingface_hub import HfApi, constants

    options, target, api = prepared.options, prepared.target, HfApi()
    repo, revision = options.repo, target.revision
    with told(repo, tell), _staged(prepared) as folder:
        if not target.exists:
            # None leaves it to the settings of an organization.
            patiently(lambda: api.create_repo(repo, private=options.private or None, exist_ok=True), tell)
        if not target.made and revision != MAIN:
            patiently(lambda: api.create_branch(repo, branch=revision, exist_ok=True), tell)
        info = patiently(
            lambda: api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=options.message, revision=None if target.proposes else revision,
                create_pr=target.proposes, delete_patterns=[glob.escape(name) for name in prepared.stale] or None,
            ),
            tell,
        )  # fmt: skip
    pull = str(info.pr_url or "") if target.proposes else ""
    url = pull or f"{constants.ENDPOINT}/{repo}" + (f"/tree/{revision}" if revision != MAIN else "")
    return Pushed(url, str(info.oid), info.oid != target.commit, pull)


@contextmanager
def _staged(prepared: Prepared) -> Iterator[str]:
    """A folder with what is pushed: links to the artifact's files, and those that are other in a repository."""
    with tempfile.TemporaryDirectory(prefix="compress-push-") as folder:
        for name, path in prepared.contents.files.items():
            place = Path(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
        for name, text in prepared.texts.items():
            place = Path(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.write_bytes(text.encode())
        yield folder
