"""Left alone: what quantizing and pruning leave dense by default, by family.

Some small weights decide much: they set how fast a recurrent state decays, or which tokens attention sees. They are less than a
hundredth of a model, and their errors are not averaged away but carried along the text or turned into another choice. The table
names them by regexes on paths inside a block of transformers' model, with the reason that `compress plan` prints. Passes
leave them alone while `skip_defaults` is on (compress/contract/pass_base.py).

It also names parameters that look like matrices and are not weights of a linear. A matrix in a block that is neither of a known
kind nor named here stops a pass that targets linears, so that a new family does not stay dense in silence.
"""

from __future__ import annotations

import re

_STATE = "decay and write strength of linear attention, whose errors add up along the text"
_INDEXER = "weighs the heads that choose which tokens attention sees"
_COMPRESSOR = "writes the compressed keys that all later tokens see"
_GROUPED = "multiplies in groups of channels, which no reader does with codes"
_CONNECTIONS = "mixes the residual streams; not a linear"

_BETA_AND_DECAY = {r"linear_attn\.in_proj_[ab]": _STATE}
_KIMI_DELTA = {r"self_attn\.(b_proj|forget_gate\.f_[ab]_proj)": _STATE}
_SPARSE = {r"self_attn\.indexer\.weights_proj": _INDEXER}
_TABLE: dict[str, dict[str, str]] = {
    "qwen3_next": {r"linear_attn\.in_proj_ba": _STATE},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), _BETA_AND_DECAY),
    "olmo_hybrid": {r"linear_attn\.[ab]_proj": _STATE},
    "kimi_linear": _KIMI_DELTA,
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _SPARSE),
    "glm5_next_text": {
        **_KIMI_DELTA,
        **_SPARSE,
        r"self_attn\.indexer\.index_kpool_compress_\w+": _COMPRESSOR,
        r"(attn|ffn)_hc\.fn": _CONNECTIONS,
    },
    "deepseek_v4": {
        r"self_attn\.compressor\.indexer\.scorer\.weights_proj": _INDEXER,
        r"self_attn\.compressor\.(indexer\.)?(kv|gate)_proj": _COMPRESSOR,
        r"self_attn\.o_a_proj": _GROUPED,
        r"(attn|ffn)_hc\.fn": _CONNECTIONS,
    },
}
"""model_type of the text model -> regex on the path of a weight inside its block, without `.weight` -> why."""


def why_left_alone(family: str, path: str) -> str:
    """The reason for a parameter at `path` inside a block of a model of `family`; empty for all others."""
    inside = path.removesuffix(".weight")
    return next((why for regex, why in _TABLE.get(family, {}).items() if re.fullmatch(regex, inside)), "")
