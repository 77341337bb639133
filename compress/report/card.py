"""Card: the README.md of an artifact: metadata for the Hub, evidence for people.

It depends on nothing but the facts, and has no times: the same artifact and the same records give the same text.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

from compress.checkpoint.reader import ADAPTER, PICTURE
from compress.evaluate.records import Number, QualityRecord
from compress.report.escape import Safe, block, checked, code, plain, printable
from compress.report.facts import Facts, Layer, ReaderFacts
from compress.report.numbers import estimate, protocol, range_of, size

MARK = "<!-- Written by compress from manifest.json and the records beside it. -->"
_LICENCE = re.compile(r"[\w.+-]{1,64}", re.ASCII)
_TASKS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}
"""Endings of architectures -> the Hub's tasks; others have none that always fits."""
_LIBRARY = {"peft": "peft", "native": "compress", "gguf": "gguf"}
_TRY = """\
tokenizer = AutoTokenizer.from_pretrained("{here}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0]))"""
LOADING = {
    "transformers": 'from transformers import {model}{tokenizer}\n\nmodel = {model}.from_pretrained("{here}"){try_}',
    "native": 'import compress{tokenizer}\n\nmodel = compress.load("{here}"){try_}',
    "vllm": 'from vllm import LLM\n\nmodel = LLM("{here}")\nprint(model.generate("The capital of France is"))',
    "gptqmodel": 'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{here}")',
    "llama.cpp": (
        'import xllamacpp\n\nsettings = xllamacpp.CommonParams()\nsettings.model.path = "{here}/model.gguf"\n'
        "model = xllamacpp.Server(settings)\n"
        'print(model.handle_completions({{"prompt": "The capital of France is", "max_tokens": 8}}))'
    ),
    "auto-gptq": 'from auto_gptq import AutoGPTQForCausalLM\n\nmodel = AutoGPTQForCausalLM.from_quantized("{here}")',
    "peft": (
        "from peft import PeftModel\nfrom transformers import {model}\n\n"
        'model = PeftModel.from_pretrained({model}.from_pretrained("{here}"), "{here}/{adapter}")'
    ),
}
"""Example code by which each reader loads an artifact; that of transformers, compress and PEFT runs in a test."""


def card(facts: Facts, place: str = "PATH") -> str:
    """The text of README.md; `place` is what the example code loads: a directory, or an id on the Hub."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, finalize=checked, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters |= {
        "safe_text": Safe, "number": lambda given: Number(**given),
        "short": lambda value: Safe("-" if value is None else f"{value:.2g}"),
        "percent": lambda value: Safe("-" if value is None else f"{value:.1%}"),
    }  # fmt: skip
    head = metadata(facts).to_yaml()
    text = environment.get_template("card.md.jinja").render(
        facts=facts, mark=Safe(MARK), metadata=Safe(head), code=code, plain=plain, block=block, size=lambda n: Safe(size(n)),
        estimate=lambda *given: plain(estimate(*given)), protocol=protocol, picture=Safe(PICTURE), title=title(facts),
        summary=plain(summary(facts)), groups=list(_groups(facts)), stages=list(_stages(facts)), command=command(facts),
        base_link=base_link(facts), examples=list(_examples(facts, place)), bits=lambda n: Safe("-" if n is None else f"{n:.3f}"),
    )  # fmt: skip
    ModelCard(text)  # raises for metadata that the Hub would not read
    return text


def metadata(facts: Facts) -> Any:
    """The card's metadata: what the Hub indexes. Only what is known is there."""
    from huggingface_hub import ModelCardData

    source, schemes = facts.manifest.source, {layer.state.scheme for layer in facts.layers} - {None}
    relation = "adapter" if facts.manifest.format == "peft" else "quantized" if schemes else "finetune"
    licence = {key: text for key, text in source.licence_fields().items() if key != "license" or _LICENCE.fullmatch(text)}
    tags = ["compress", *([] if facts.manifest.format == "canonical" else [facts.manifest.format])]
    tags += sorted({f"{scheme.bits}-bit" for scheme in schemes if scheme is not None and scheme.whole})
    tags += ["sparse"] if any(layer.zeros is not None for layer in facts.layers) else []
    task = next((task for ending, task in _TASKS.items() if facts.architecture.endswith(ending)), None)
    results = _results(facts)
    return ModelCardData(
        base_model=facts.base or None, base_model_relation=relation if facts.base else None, license=licence.get("license"),
        license_name=licence.get("license_name"), license_link=licence.get("license_link"),
        library_name=_LIBRARY.get(facts.manifest.format, "transformers"), pipeline_tag=task, tags=tags,
        datasets=facts.datasets or None, model_name=printable(facts.name) if results else None, eval_results=results or None,
    )  # fmt: skip


def _results(facts: Facts) -> list[Any]:
    """The measurements as entries of the metadata's model-index."""
    from huggingface_hub import EvalResult

    found = []
    for record in facts.quality:
        metrics = {"perplexity": record.perplexity, "kl_to_source": record.kl, "top1_agreement": record.top1}
        found += [
            EvalResult(
                task_type="text-generation", dataset_type="text", dataset_name=printable(record.data),
                dataset_args={"sha256": record.data_sha256, "tokens": record.tokens, "length": record.length}, metric_type=kind,
                metric_name=kind, metric_value=float(f"{number.value:.6g}"),
            )
            for kind, number in metrics.items() if number.value is not None
        ]  # fmt: skip
    for task in facts.tasks:
        found.append(EvalResult(
            task_type="text-generation", dataset_type=printable(task.dataset or "text"), dataset_name=printable(task.task),
            dataset_config=printable(task.config) or None, dataset_split=printable(task.split) or None, metric_value=task.value,
            metric_type=printable(task.metric), metric_name=printable(f"{task.metric}, {task.shots}-shot"),
        ))  # fmt: skip
    return found


def title(facts: Facts) -> Safe:
    """The heading: whose model this is, and in what scheme."""
    states = list(dict.fromkeys(str(layer.state) for layer in facts.layers))
    what = re.sub(r"^codes\((.*)\)$", r"\1", states[0]) + " " if len(states) == 1 else ""
    return Safe(f"{plain(facts.manifest.source.name)}, {plain(what)}by compress")


def base_link(facts: Facts) -> Safe:
    """The source, with a link to its own card where the Hub has it."""
    from huggingface_hub.constants import HUGGINGFACE_CO_URL_HOME

    source = facts.manifest.source
    commit = f", commit {code(source.commit)}" if source.commit else ""
    if facts.base:
        return Safe(f"[{plain(facts.base)}]({HUGGINGFACE_CO_URL_HOME}{facts.base}), whose card tells of the model itself{commit}")
    return Safe(f"{code(source.name)}{commit}")


def summary(facts: Facts) -> str:
    """One sentence of what became of the source."""
    count, numel = len(facts.layers), sum(layer.numel for layer in facts.layers)
    share = f", {facts.nbytes / facts.source_bytes:.1%} of the source's {size(facts.source_bytes)}" if facts.source_bytes else ""
    inside = f"; {count} weights with {numel:,} parameters take {facts.bits:.3f} bits each" if facts.bits is not None else ""
    return f"{size(facts.nbytes)} of tensors{share}{inside}."


def command(facts: Facts) -> str:
    """The command that makes the artifact again from its source."""
    manifest, source = facts.manifest, facts.manifest.source
    revision = f"@{source.commit}" if facts.base else ""
    # A directory is named by its last part only, which may look like an option.
    model = facts.base + revision if facts.base else f"./{printable(source.name)}"
    seed = ["--seed", str(manifest.seed)] if manifest.seed else []
    return shlex.join(["compress", "run", model, "OUT", "-p", printable(facts.recipe), *seed])


def _groups(facts: Facts) -> list[tuple[Safe, ...]]:
    """A row for each state: how many weights, bits, and errors."""
    groups: dict[str, list[Layer]] = defaultdict(list)
    for layer in facts.layers:
        groups[str(layer.state)].append(layer)
    rows = []
    for state, layers in groups.items():
        bits = sum(layer.bits * layer.numel for layer in layers) / max(1, sum(layer.numel for layer in layers))
        errors = [range_of([getattr(layer, name) for layer in layers]) for name in ("error", "output_error")]
        rows.append((Safe(f"{len(layers)}"), code(state), Safe(f"{bits:.3f}"), *map(Safe, errors)))
    return rows


def _stages(facts: Facts) -> list[tuple[Safe, ...]]:
    """A row for the source and each step: size, bits, and quality on the first text."""
    texts = [record.text[1:] for record in facts.quality[:1]]

    def cells(records: tuple[QualityRecord, ...]) -> list[Safe]:
        found = next((record for record in records if record.text[1:] in texts), None)
        if found is None:
            return [Safe("-")] * 3
        return [plain(estimate(found.perplexity)), plain(estimate(found.kl)), plain(estimate(found.top1, True))]

    first = facts.quality[0].source_perplexity if facts.quality else None
    source = plain(estimate(first)) if first is not None else Safe("-")
    rows = [(Safe("source"), Safe(size(facts.source_bytes or None)), Safe("-"), source, Safe("-"), Safe("-"))]
    for number, stage in enumerate(facts.stages, start=1):
        bits = Safe("-" if stage.bits is None else f"{stage.bits:.3f}")
        rows.append((Safe(f"{number}. {code(stage.name)}"), Safe(size(stage.nbytes)), bits, *cells(stage.quality)))  # type: ignore[arg-type]
    return rows  # type: ignore[return-value]


def _examples(facts: Facts, place: str) -> list[tuple[ReaderFacts, Safe]]:
    """Code for each reader that was verified; where none was, for those that are expected to load it."""
    chosen = [reader for reader in facts.verified or facts.readers if reader.name in LOADING and reader.usable]
    if not facts.readers and facts.manifest.format == "canonical" and not any(layer.state.scheme for layer in facts.layers):
        chosen = [ReaderFacts("transformers", "yes", "it is a dense checkpoint")]
    generates = facts.tokenizer and facts.architecture.endswith("ForCausalLM")
    here = re.sub(r"[^\w./-]", "_", place, flags=re.ASCII)
    words = {"here": here, "model": facts.architecture or "AutoModel", "adapter": ADAPTER}
    try_ = "\n" + _TRY.format(here=here) if generates else ""
    found = []
    for reader in chosen:
        both = ", AutoTokenizer" if reader.name == "transformers" else "\nfrom transformers import AutoTokenizer"
        text = LOADING[reader.name].format(**words, try_=try_, tokenizer=both if generates else "")
        found.append((reader, block(text, "python")))
    return found
