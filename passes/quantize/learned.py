"""Learned: chooses codes and scales anew, by gradients of each block's error.

It starts from the codes of an earlier pass, of any scheme: `quantize.gptq(...) | quantize.learned`, or rtn, or the widths that
llm_mq has chosen. Block after block, offsets of the codes and gains of the scales are trained until the outputs are closest
to those of the dense model's block. What readers load has the same form, and nothing more is computed when the model runs.

    optimizer=sign   against the signs of gradients, at a rate that falls in a line: SignRound (2309.05516), as AutoRound has it
    optimizer=adamw  by AdamW, with a reach of several steps: Block-AP of EfficientQAT (2407.11062), but for its zero points

Both pass gradients straight through the rounding. A pruned weight keeps its zeros, and corrections stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from compress.contract.base_passes import codes_of
from compress.contract.block_training import BlockOptions, BlockReconstruction
from compress.contract.training_options import Curve
from compress.errors import Refusal
from compress.spec.weight_state import Note, State, Weight


class Learned(BlockReconstruction):
    """Chooses the codes of quantized blocks anew, one block at a time."""

    example: ClassVar[str] = (
        "calibrate | quantize.rtn(scheme=w3a16g32, ragged=divide) | quantize.learned(epochs=2, batch=2, micro_batch=1)"
    )

    optimizer: Literal["sign", "adamw"] = Field("sign", description="signed gradients, or AdamW")
    lr: float | None = Field(
        None,
        ge=0,
        le=1e30,
        description="peak learning rate of offsets, in steps of codes; without it one over the optimizer's steps",
    )
    reach: float = Field(0.5, gt=0, le=255, description="how far from where it starts an offset may move a code, in steps")
    epochs: int = Field(20, ge=0, description="how often each block sees each calibration sample; 0 leaves all as it was")
    batch: int = Field(8, ge=1, description="samples in an optimizer step, over all processes")
    schedule: Curve = Field("linear", description="how the learning rate decays")
    error: Literal["relative", "squared"] = Field(
        "squared", description="squared error of a token's output, as a share of the target's energy or in all"
    )

    def block_options(self) -> BlockOptions:
        return BlockOptions(
            epochs=self.epochs, batch=self.batch, micro_batch=self.micro_batch, code_lr=self.lr, scale_lr=self.scale_lr,
            curve=self.schedule, warmup=0.0, betas=self.betas, clip=0.0, held_out=self.held_out, keep=self.keep,
            target=self.target, optimizer=self.optimizer, reach=self.reach,
        )  # fmt: skip

    def learns_codes(self) -> bool:
        return True

    def learns(self, state: State) -> list[str]:
        return [] if state.scheme is None else codes_of(state.scheme)

    def unlearnable(self, state: State) -> str:
        return f"it is {state}, and codes alone are chosen here"

    def becomes(self, weight: Weight, state: State) -> State:
        found = super().becomes(weight, state)
        if state.scheme is not None and weight.kind == "embedding":
            raise Refusal("an embedding lies outside of blocks", "leave it out of targets")
        return found

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        return [note for note in super().notes(weights, states) if note.what != "untrained"]
