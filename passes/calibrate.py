"""Draws calibration tokens from texts, fixed by a seed.

They are stored in a file of their own next to the weights, which do not change, and are copied with the checkpoint until it
is packed. Only tokens are stored: every pass that needs statistics computes its own, so none can be out of date.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from compress.contract.shapes import DataPass
from compress.contract.text_passes import TextPass
from compress.corpus import shipped
from compress.spec.recipe import Line
from compress.spec.weight_state import Note

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint
    from compress.corpus import Corpus, CorpusSpec


class Calibrate(TextPass, DataPass):
    """Chooses documents, tokenizes them, and cuts them into samples."""

    data: tuple[str, ...] = Field(
        (),
        description="sources: .jsonl, .txt, .parquet, - for stdin, hf:NAME[:CONFIG][@REVISION], or ready inputs in .safetensors; "
        "without them, the mixed text that ships with compress",
    )
    weights: tuple[float, ...] = Field((), description="share of the samples from each source; equal without it")
    samples: int = Field(128, description="how many samples; without data 64")
    length: int = Field(2048, description="tokens in each sample; without data 512")
    packing: Literal["concatenate", "pad"] = Field(
        "concatenate", description="cut samples from a stream of joined documents, or take one document for each and pad it"
    )
    join: Literal["auto", "eos", "none"] = Field(
        "auto", description="between joined documents: EOS, nothing, or (auto) EOS if the tokenizer has one"
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="at the start of a sample: BOS, none, or (auto) what the tokenizer adds by itself"
    )
    chat: bool = Field(False, description="records are conversations: apply the tokenizer's chat template")
    field: str = Field("text", description="field of a record that holds its text or its messages")
    split: str = Field("train", description="split of a dataset")

    @model_validator(mode="before")
    @classmethod
    def _of_what_ships(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("data"):
            return given
        return {"samples": shipped.SAMPLES, "length": shipped.LENGTH, **given}

    @model_validator(mode="after")
    def _sound(self) -> Self:
        fields = type(self).model_fields
        given = [name for name in ("weights", "chat", "field", "split") if getattr(self, name) != fields[name].default]
        if given and not self.data:
            raise ValueError(f"{', '.join(given)}: only with data, not of the mixed text that ships with compress")
        self.sound(self.spec)
        return self

    def line(self) -> Line:
        line = super().line()
        # The fields' defaults are those for named data.
        numbers = {} if self.data else {"samples": self.samples, "length": self.length}
        return Line(line.name, {**numbers, **line.options})

    def spec(self) -> CorpusSpec:
        """What to draw. Raises UsageError."""
        from compress.corpus import CorpusSpec

        return CorpusSpec(**{**self.model_dump(), "data": self.data or (str(shipped.path()),)})

    def source_notes(self) -> list[Note]:
        return [] if self.data else [Note("default text", shipped.told(), (shipped.path().name,))]

    def tokens_at_most(self) -> tuple[int, int]:
        return self.samples * self.length, self.length

    def own_tokens(self, model: Checkpoint, seed: int) -> Corpus:
        from compress.corpus import build_for

        return build_for(self.spec(), model, seed)
