"""Push: the options of `compress push` and of a recipe's last line, `push:`."""

from __future__ import annotations

import re
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.errors import Problem, Unsound

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![.-])", re.ASCII)
_LONGEST = 96
"""Characters of a repository's id on the Hub."""
_REVISION = re.compile(r"[\w][\w./-]*(?<![./])", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}", re.ASCII)
MAIN = "main"


class PushOptions(BaseModel):
    """Where an artifact is pushed to, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str = Field(description="the repository on the Hub, OWNER/NAME; made if it is not there")
    private: bool = Field(False, description="make the repository private, if it is made")
    revision: str = Field(MAIN, description="the branch, or refs/pr/N for a pull request; made if it is not there")
    pr: bool = Field(False, description="propose a pull request; one of the same message that is open is gone on with")
    message: str = Field("Upload by compress", description="the first line of the commit, or the title of the pull request")
    license: str = Field("", description="the licence, where the source names none; an id of the Hub, such as apache-2.0")
    unverified: bool = Field(False, description="push although no reader has verified these bytes; the card says so")
    reader: str = Field("", description="the reader that verifies, in a recipe; by default the format's own")

    @field_validator("repo")
    @classmethod
    def _named(cls, value: str) -> str:
        odd = len(value) > _LONGEST or "--" in value or ".." in value or value.endswith(".git")
        if odd or not _REPO.fullmatch(value):
            raise ValueError("OWNER/NAME, of letters, digits, '-', '_' and '.'")
        return value

    @field_validator("revision")
    @classmethod
    def _a_revision(cls, value: str) -> str:
        if not _REVISION.fullmatch(value) or ".." in value or "//" in value:
            raise ValueError("a branch, or refs/pr/N")
        return value

    @field_validator("message")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not value.strip() or not value.isprintable():
            raise ValueError("a line of text")
        return value

    @field_validator("license")
    @classmethod
    def _a_licence(cls, value: str) -> str:
        if value and not _LICENCE.fullmatch(value):
            raise ValueError("an id of the Hub, such as apache-2.0")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.pr and self.revision != MAIN:
            do = "leave one out; an open pull request is gone on with by revision refs/pr/N"
            raise Unsound([Problem("pr", "a pull request to main", f"one, and the revision {self.revision}", do)])
        return self
