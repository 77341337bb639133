"""llama.cpp as a reader: its own library, called through its C interface.

The library is in the wheel of xllamacpp. Large structs are passed as they come, with room to spare: their defaults are what is
wanted, and their layout changes from version to version. Before logits are computed, a text is split by its tokenizer and by
tokenizer.json.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_void_p
from pathlib import Path
from typing import Any

_POINTER = ".gguf-file"
_TEXT = "Hello  World! It's 12345 tokens,\n\n  we'll see:\tnaïve CAFÉ, 東京 3.14 a/b//c 😀 DON'T stop ...  "
_ERROR = 4


class _Params(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint8 * 4096)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_Log, c_void_p]), "llama_backend_init": (None, []),
    "llama_model_default_params": (_Params, []), "llama_context_default_params": (_Params, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _Params]), "llama_init_from_model": (c_void_p, [c_void_p, _Params]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]), "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_type": (ctypes.c_int, [c_void_p]), "llama_n_ctx": (ctypes.c_uint32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]), "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]), "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]), "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
}  # fmt: skip


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str], trusted: bool) -> Callable[[Any], Any]:
    """Ids [1, length] -> logits [1, length, vocabulary], arrays of numpy."""
    library, errors = library_and_errors()
    file = artifact / "model.gguf"
    if not file.is_file():
        pointer = artifact / _POINTER
        file = Path(pointer.read_text()) if pointer.is_file() else next(iter(sorted(artifact.glob("*.gguf"))), file)
    model = library.llama_model_load_from_file(os.fsencode(file), library.llama_model_default_params())
    if not model:
        raise ValueError("it does not load the file: " + (" ".join(errors)[-500:] or "it says nothing"))
    vocabulary = library.llama_model_get_vocab(model)
    _same_tokens(library, vocabulary, artifact, notes)
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    if not context:
        raise ValueError("it makes no context: " + " ".join(errors)[-500:])
    threads = int(os.environ["OMP_NUM_THREADS"])
    library.llama_set_n_threads(context, threads, threads)
    notes.append("it rounds activations to 8 bits, by blocks of 32")
    size, longest = library.llama_vocab_n_tokens(vocabulary), library.llama_n_ctx(context)

    def forward(ids: Any) -> Any:
        import numpy

        row = [int(token) for token in ids[0]]
        if len(row) > longest:
            raise ValueError(f"{len(row)} tokens, of which it takes {longest}")
        library.llama_memory_clear(library.llama_get_memory(context), True)
        batch = library.llama_batch_init(len(row), 0, 1)
        fill(batch, row, 0)
        status = library.llama_decode(context, batch)
        library.llama_batch_free(batch)
        if status:
            raise ValueError(f"it ends with status {status}: " + " ".join(errors)[-500:])
        return numpy.stack(
            [numpy.ctypeslib.as_array(library.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(row))]
        )[None]

    return forward


def fill(batch: _Batch, tokens: list[int], at: int, last: bool = False) -> None:
    """Puts tokens of one text, from position `at` on, into a batch; logits are computed of all, or of the last one."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
        batch.logits[i] = not last or i == len(tokens) - 1
        batch.seq_id[i][0] = 0


def library_and_errors() -> tuple[Any, list[str]]:
    """llama.cpp's library, and the list that its errors go to."""
    # Imported by name, because it is not installed where types are checked.
    package = Path(str(importlib.import_module("xllamacpp").__file__)).parent
    library: Any = ctypes.CDLL(str(next(package.glob("*.so"))))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    errors: list[str] = []

    def note(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())
            print(errors[-1], flush=True)

    library.note = _Log(note)
    library.llama_log_set(library.note, None)
    library.llama_backend_init()
    return library, errors


def _same_tokens(library: Any, vocabulary: Any, artifact: Path, notes: list[str]) -> None:
    """Raises ValueError if a text has other tokens by its tokenizer than by tokenizer.json."""
    if not library.llama_vocab_type(vocabulary) or not (artifact / "tokenizer.json").is_file():
        notes.append("no tokenizer was compared")
        return
    tokenizers = importlib.import_module("tokenizers")
    ours = tokenizers.Tokenizer.from_file(str(artifact / "tokenizer.json")).encode(_TEXT).ids
    text, found = _TEXT.encode(), (c_int32 * 4096)()
    count = library.llama_tokenize(vocabulary, text, len(text), found, len(found), True, True)
    theirs = list(found[: max(count, 0)])
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        raise ValueError(
            f"it splits a text into other tokens than tokenizer.json: {theirs[at : at + 4]}, not {ours[at : at + 4]}, at {at}"
        )
    notes.append(f"it splits a text into the {len(ours)} tokens that tokenizer.json has")
