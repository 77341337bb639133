"""Model class: the class of transformers that a config.json means.

A config names an architecture, which chooses among the classes that transformers lists for its model_type. No other key of it
chooses code: keys that say how to run a model are removed, and a checkpoint's own classes are loaded only if it is trusted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint.remote_code import own_classes, remedy
from compress.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint

_RUNNING = ("attn_implementation", "experts_implementation")
"""Keys of a config that say how to run a model; each may begin with an underscore."""


def model_class(checkpoint: Checkpoint) -> tuple[type, Any]:
    """transformers' class for a checkpoint, and the config object. Runs the checkpoint's own code only if it is trusted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = checkpoint.config
    refuse_kernels(config)
    kind, listed = config.get("model_type"), config.get("architectures") or [None]
    wanted = listed[0] if isinstance(listed, list) and isinstance(listed[0], str | None) else listed
    parser, cls = own_classes(checkpoint, wanted if isinstance(wanted, str) else None)
    if parser is None and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        do = remedy(checkpoint) or "update transformers"
        near = did_you_mean(str(kind), CONFIG_MAPPING.keys())
        raise InputError("config.json", "a model_type that transformers knows", f"'{kind}'{near}", do)
    cls, parser = cls or _class_of(checkpoint, str(kind), wanted), parser or CONFIG_MAPPING[kind]
    clean = _without(config, ("auto_map", "quantization_config", "quantization", *_RUNNING))
    try:
        # from_dict alone does not know how save_pretrained writes an infinity.
        return cls, parser.from_dict(parser._decode_special_floats(clean))
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise InputError("config.json", f"a valid config of '{kind}'", str(error).strip().splitlines()[0]) from error


def _class_of(checkpoint: Checkpoint, kind: str, wanted: Any) -> type:
    """transformers' own class of an architecture of `kind`, or of its language model where none is named."""
    import transformers
    from transformers.models.auto import modeling_auto

    tables = [
        getattr(modeling_auto, name)
        for name in dir(modeling_auto)
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    ]
    known = {cls for table in tables for cls in ([table[kind]] if isinstance(table.get(kind), str) else table.get(kind, ()))}
    if wanted is None:
        wanted = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or modeling_auto.MODEL_MAPPING_NAMES.get(kind)
    if not isinstance(wanted, str) or wanted not in known:
        expected = f"architectures: one of {', '.join(sorted(known))}" if known else "a class in auto_map for its architecture"
        raise InputError("config.json", expected, f"'{wanted}' for model_type '{kind}'", remedy(checkpoint))
    found = getattr(transformers, wanted)
    assert isinstance(found, type)
    return found


def _without(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A config, nested ones included, without `keys`: how a model is run says nothing of its tensors."""
    return {k: _without(v, keys) if isinstance(v, dict) else v for k, v in config.items() if k.lstrip("_") not in keys}


def refuse_kernels(config: Any) -> None:
    """Raises InputError if a config, or one nested in it, names code of the Hub, which transformers would fetch and run."""
    for key, value in config.items() if isinstance(config, dict) else ():
        named = [value, *value.values()] if isinstance(value, dict) else [value]
        if key.lstrip("_") in _RUNNING and any(isinstance(one, str) and "/" in one for one in named):
            do = "take this line out: it says how to run the model, and nothing of what it is"
            raise InputError(f"config.json: {key}", "a name without '/'", f"{value}, code of the Hub that is not run", do)
        refuse_kernels(value)
