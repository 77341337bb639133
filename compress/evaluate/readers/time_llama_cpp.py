"""Times llama.cpp on a GGUF file: prompts and greedy decoding, tokens a second.

Run by path in its environment: python -P time_llama_cpp.py FILE THREADS PROMPT NEW ROUNDS SEED. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def main(file: str, *numbers: str) -> None:
    threads, prompt, new, rounds, seed = map(int, numbers)
    probe: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("probe_llama_cpp.py")))
    library, errors = probe["library_and_errors"]()
    model = library.llama_model_load_from_file(os.fsencode(file), library.llama_model_default_params())
    settings = library.llama_context_default_params()
    settings.data[:4] = (prompt + new).to_bytes(4, sys.byteorder)  # its first field: the tokens of a context
    context = library.llama_init_from_model(model, settings) if model else None
    if not context:
        sys.exit("it does not load the file: " + " ".join(errors)[-500:])
    library.llama_set_n_threads(context, threads, threads)
    width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    if prompt + new > library.llama_n_ctx(context):
        sys.exit(f"{prompt + new} tokens, of which it takes {library.llama_n_ctx(context)}")
    drawn = random.Random(seed)
    ids = [drawn.randrange(width) for _ in range(prompt)]
    many, one = library.llama_batch_init(prompt, 0, 1), library.llama_batch_init(1, 0, 1)

    def decode(batch: Any, tokens: list[int], at: int) -> int:
        """The next token; only the last one's logits are computed."""
        probe["fill"](batch, tokens, at, last=True)
        if status := library.llama_decode(context, batch):
            sys.exit(f"it ends with status {status}: " + " ".join(errors)[-500:])
        import numpy

        return int(numpy.ctypeslib.as_array(library.llama_get_logits_ith(context, len(tokens) - 1), (width,)).argmax())

    rates: dict[str, list[float]] = {"prompt": [], "decode": []}
    for number in range(rounds + 1):
        library.llama_memory_clear(library.llama_get_memory(context), True)
        began = time.perf_counter()
        token = decode(many, ids, 0)
        between = time.perf_counter()
        for i in range(new):
            token = decode(one, [token], prompt + i)
        ended = time.perf_counter()
        if number:  # the first round warms up
            rates["prompt"].append(prompt / (between - began))
            rates["decode"].append(new / (ended - between))
    print(json.dumps({"rates": rates, "version": metadata.version("xllamacpp")}))


if __name__ == "__main__":
    main(*sys.argv[1:7])
