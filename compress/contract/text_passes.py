"""Text passes: options of texts, and how a training pass mixes its domains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.contract.pass_base import ExternalInputs, Pass
from compress.contract.train_pass import TrainPass
from compress.errors import Unsound, UsageError

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint
    from compress.contract.domain_options import DomainOptions
    from compress.corpus import Corpus, CorpusSpec

_DYNAMIC = (
    "reweight_every", "held_out", "pool", "reference", "reference_losses", "reference_family", "reweight_eta",
    "reweight_smoothing",
)  # fmt: skip
"""Options that only a dynamic loading reads."""


class TextPass(Pass):
    """Base of passes that read texts: parses, redacts and checks their sources."""

    data: tuple[str, ...]

    @field_validator("data", "weights", mode="before", check_fields=False)
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | float) else value

    def redacted(self) -> Self:
        """The pass with file names instead of paths: the tokens identify their content, and paths are private."""
        names = tuple(source if source.startswith("hf:") else PurePath(source).name for source in self.data)
        return self.model_copy(update={"data": names})

    @staticmethod
    def sound(draw: Callable[[], Any]) -> None:
        """Raises Unsound with the problems for which `draw` cannot make a CorpusSpec."""
        try:
            draw()
        except UsageError as error:
            raise Unsound(error.problems) from None


class TrainingTexts(TextPass, TrainPass):
    """The texts of a training pass: its domains, their shares, and whether the shares follow losses while it trains."""

    data: tuple[str, ...] = Field(
        (), description="texts to train on, named as for calibrate; without them, the calibration tokens"
    )
    weights: tuple[float, ...] = Field(
        (), description="share of the samples from each source, at first if loading is dynamic; equal without it"
    )
    samples: int = Field(1024, ge=1, description="how many samples of data")
    length: int = Field(512, ge=2, description="tokens in each sample of data")
    packing: Literal["documents", "concatenate", "pad"] = Field(
        "documents",
        description="a sample holds several texts that do not attend to each other, a part of a stream, or one text and padding",
    )
    chat: bool = Field(False, description="records of data are conversations: apply the tokenizer's chat template")
    field: str = Field("text", description="field of a record that holds its text or its messages")
    split: str = Field("train", description="split of a dataset")
    loading: Literal["static", "dynamic", "dynamic-code"] = Field(
        "static",
        description="shares of the sources stay, or grow where the loss on held-out texts is above a reference: "
        "by the rule of the paper of Sheared LLaMA, or by that of its code",
    )
    reweight_every: int = Field(50, ge=1, description="steps between updates of the shares, if loading is dynamic")
    held_out: int = Field(16384, ge=1, description="tokens of each source that are held out for its loss, if loading is dynamic")
    pool: int = Field(
        0, ge=0, description="most samples of each source to draw from, if loading is dynamic; as many as samples without it"
    )
    reference: str = Field(
        "",
        description="model whose losses are the references, a directory or a Hub id; without it the teacher, or the dense model "
        "that this one was made from",
    )
    reference_losses: tuple[float, ...] = Field(
        (), description="reference losses instead, one for each source, in nats per token"
    )
    reference_family: str = Field(
        "", description="reference losses instead: a JSON file with three sizes of a family and their losses by source, from "
        "which follow those of a model of this size"
    )  # fmt: skip
    reweight_eta: float = Field(1.0, gt=0, le=1e6, description="how strongly shares follow losses, with loading=dynamic-code")
    reweight_smoothing: float = Field(
        1e-4, ge=0, lt=1, description="part of the shares that is always equal, with loading=dynamic-code"
    )

    @field_validator("reference_losses", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | float) else value

    @model_validator(mode="after")
    def _sound_texts(self) -> Self:
        given = self.model_fields_set
        texts = given & {"weights", "samples", "length", "packing", "chat", "field", "split", "loading"}
        if not self.data and texts:
            raise ValueError(f"{', '.join(sorted(texts))}: only with data, for the calibration tokens are cut already")
        if self.loading == "static" and (unread := [name for name in _DYNAMIC if name in given]):
            raise ValueError(f"{', '.join(unread)}: only with loading=dynamic or dynamic-code")
        if self.loading != "static":
            self._sound_domains(given)
        self.sound(self.texts)
        return self

    def _sound_domains(self, given: set[str]) -> None:
        if len(self.data) < 2:
            raise ValueError(f"loading={self.loading}: two sources of data or more, whose shares can move")
        if self.loading == "dynamic" and (unread := [name for name in ("reweight_eta", "reweight_smoothing") if name in given]):
            raise ValueError(f"{', '.join(unread)}: only with loading=dynamic-code")
        ways = [name for name in ("reference", "reference_losses", "reference_family") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"one of {' and '.join(ways)}: each says what the reference losses are")
        if self.reference and self.teacher_model() is not None:
            raise ValueError("reference: not beside a teacher, whose losses are the references")
        if self.reference_losses and len(self.reference_losses) != len(self.data):
            raise ValueError(f"reference_losses: {len(self.reference_losses)} for {len(self.data)} sources")
        if any(loss <= 0 for loss in self.reference_losses):
            raise ValueError("reference_losses: above 0, in nats per token")

    def redacted(self) -> Self:
        """Also names instead of the paths of what gives the reference losses."""
        names = {word: PurePath(getattr(self, word)).name for word in ("reference", "reference_family")}
        return super().redacted().model_copy(update=names)

    def texts(self) -> CorpusSpec | None:
        if not self.data:
            return None
        from compress.corpus import CorpusSpec, DomainSpec

        words = ("data", "weights", "field", "split", "samples", "length", "packing", "chat")
        chosen = {word: getattr(self, word) for word in words}
        if self.loading == "static":
            return CorpusSpec(**chosen)
        return DomainSpec(**{**chosen, "samples": self.pool or self.samples}, held_out=self.held_out)

    def domains(self) -> DomainOptions | None:
        if self.loading == "static":
            return None
        from compress.contract.domain_options import DomainOptions

        weights = self.weights or (1.0,) * len(self.data)
        shares = tuple(weight / sum(weights) for weight in weights)
        by_code = self.loading == "dynamic-code"
        return DomainOptions(
            "code" if by_code else "paper", self.reweight_every, self.samples, shares, self.reweight_eta if by_code else 1.0,
            self.reweight_smoothing if by_code else 0.0, self.reference_losses, self.reference_family,
        )  # fmt: skip

    def own_tokens(self, model: Checkpoint, seed: int) -> Corpus | None:
        if (domains := self.domains()) is None:
            return super().own_tokens(model, seed)
        from compress.contract.domain_options import family_laws
        from compress.corpus import build_domains, build_for, domain_names

        texts = self.texts()
        assert texts is not None
        corpus = build_for(texts, model, seed, build_domains)
        if domains.family:
            family_laws(domains.family, domain_names(corpus.sources))  # raises for a file without them
        return corpus

    def second_name(self) -> str | None:
        domains = self.domains()
        if self.teacher_model() is None and domains is not None and domains.measures_references:
            return self.reference
        return self.teacher_model()

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        known = super().external_inputs(found)
        if self.teacher_model() is None and "teacher" in known:
            known["reference"] = known.pop("teacher")
        if self.reference_family:
            from compress.checkpoint.scan import file_digest

            known["reference_family"] = file_digest(Path(self.reference_family))
        return known
