"""peft: a dense base (the dequantized codes), and the factors as LoRA adapter.

The top folder holds the base, every weight in the dtype of its source, outliers included; `loftq_init/` holds the adapter, as
in LoftQ's own artifacts. For factors left [out, r] and right [r, in] of a linear (left [in, r] and right [r, out] of a
Conv1D, which is transposed) it has
    base_model.model.PATH.lora_A.weight  [r, in]     bf16, as the factors are; fp32 where they are int8
    base_model.model.PATH.lora_B.weight  [out, r]
PEFT multiplies their product by lora_alpha / r, so alpha is r; ranks other than the most common one are in rank_pattern and
alpha_pattern. `init_lora_weights` is true, because "loftq" would compute new factors. The base is dense because PEFT accesses
a module's weight, which modules of a packed compressed-tensors checkpoint lack (PEFT 0.21.2 raises); to have it in four bits,
quantize it while it is loaded, with the same grid.

base_model_name_or_path becomes the absolute path of the artifact once that is known (pipeline/output_paths.py): PEFT passes it
to from_pretrained, which resolves a relative path from the working directory. After moving or pushing the folder, write the
new path or the Hub id there. The manifest's digest of this file ignores that key, so it may be changed, and the same run into
another directory has the same fingerprint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import ADAPTER, ADAPTER_CONFIG, ADAPTER_TENSORS
from compress.contract.format import Format, Verdict
from compress.errors import Refusal
from compress.spec.weight_state import Note, State, TensorSpec, Weight, counted

if TYPE_CHECKING:
    import torch

    from compress.architecture.weight_map import Model
    from compress.numerics.qtensor import QTensor

VERSION = "0.21.2"
"""The version of PEFT that this was tested with."""
_MOVED = "base_model_name_or_path is the directory it was made in; after moving or pushing it, write its path or Hub id there"
_PREFIX = "base_model.model."


class Peft(Format):
    """A dense base, and low-rank factors as an adapter."""

    name = "peft"
    expands = True
    holds = frozenset({"outliers", "lowrank", "rotation"})

    def refuse(self, weight: Weight, state: State) -> None:
        if state.scheme is None:
            return
        if state.scheme.inputs:
            raise Refusal("its base is dense, and would not round activations", "use a scheme with a16")
        if state.lowrank is None:
            return
        if weight.kind == "embedding":
            raise Refusal("PEFT turns the factors of an embedding round and gives them other names", "leave it without factors")
        if weight.experts is not None or weight.converted or weight.attribute != "weight" or not weight.module:
            raise Refusal("PEFT adds factors to modules, and transformers makes no module of this tensor alone", "skip it")

    def refuse_together(self, model: Model, states: dict[str, State]) -> list[tuple[str, str, str]]:
        if any(state.lowrank for state in states.values()):
            return []
        return [("*", "no weight has low-rank factors, so there is no adapter", "use quantize.loftq or quantize.lorc")]

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        base = [TensorSpec(weight.name, weight.dtype, weight.shape)]
        if state.lowrank is None:
            return base
        kind, rank = "F32" if state.lowrank.int8 else "BF16", state.lowrank.rank
        a, b = _names(weight)
        return [*base, TensorSpec(a, kind, (rank, weight.in_features)), TensorSpec(b, kind, (weight.out_features, rank))]

    def file_of(self, name: str) -> str:
        return ADAPTER_TENSORS if name.startswith(_PREFIX) else ""

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        from compress.checkpoint.reader import torch_dtype
        from compress.numerics.qtensor import as_matrix

        tensors = {weight.name: as_matrix(weight, value.base()).to(torch_dtype(weight.dtype)).contiguous()}
        if (factors := value.lowrank) is not None:
            factors = factors.turned() if weight.transposed else factors
            left, right = (factors.left, factors.right) if factors.scale is None else factors.halves()
            a, b = _names(weight)
            tensors |= {a: right.contiguous(), b: left.contiguous()}
        return tensors

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        return {}

    def files(self, model: Model, states: dict[str, State]) -> dict[str, str]:
        ranks = {w.module: lowrank.rank for w in model.weights if (lowrank := states[w.name].lowrank) is not None}
        common = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {path: rank for path, rank in ranks.items() if rank != common}
        content = {
            "alpha_pattern": pattern, "base_model_name_or_path": None, "bias": "none",
            "fan_in_fan_out": any(w.transposed for w in model.weights if w.module in ranks), "inference_mode": True,
            "init_lora_weights": True, "loftq_config": {}, "lora_alpha": common, "lora_dropout": 0.0, "modules_to_save": None,
            "peft_type": "LORA", "peft_version": VERSION, "r": common, "rank_pattern": pattern,
            "target_modules": _targets(ranks, model), "task_type": "CAUSAL_LM" if set(model.stacks) == {"decoder"} else None,
            "use_dora": False, "use_rslora": False,
        }  # fmt: skip
        return {ADAPTER_CONFIG: json.dumps(content, indent=2) + "\n"}

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        expanded = {w.name: f"{states[w.name].scheme} became the dense weights that it means" for w in weights}
        return [*counted("expanded", expanded), *counted("base", {ADAPTER_CONFIG: _MOVED})]

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        return [
            Verdict("peft", "yes", f"{VERSION}, run on Llama and GPT-2; AutoPeftModelForCausalLM.from_pretrained(OUT/{ADAPTER})"),
            Verdict("transformers", "no", "it reads the base alone, without the adapter"),
            Verdict("vllm", "unknown", "adapters of unequal ranks, or beside fused layers; not run"),
        ]


def _names(weight: Weight) -> tuple[str, str]:
    """PEFT's names of the factors of a weight, A and B."""
    return f"{_PREFIX}{weight.module}.lora_A.weight", f"{_PREFIX}{weight.module}.lora_B.weight"


def _targets(ranks: dict[str, int], model: Model) -> list[str]:
    """Last parts of module paths if all modules with that ending have factors, else whole paths; PEFT accepts both."""
    lasts = {path.rpartition(".")[2] for path in ranks}
    torn = {path.rpartition(".")[2] for path in model.linears if path not in ranks}
    return sorted(lasts - torn | {path for path in ranks if path.rpartition(".")[2] in torn})
