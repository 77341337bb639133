"""Fuzz: every parser gives an error of ours or what prints back, for any text; in bounded time and memory.

COMPRESS_FUZZ=20000 sets the examples of each property; `make fuzz` does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compress.checkpoint.gguf_config import config_of
from compress.checkpoint.gguf_header import Entry, GgufHeader, Info, read_gguf, write_gguf
from compress.checkpoint.gguf_tokenizer import tokenizer_texts
from compress.checkpoint.manifest import FILE, Manifest
from compress.checkpoint.reader import Checkpoint, open_checkpoint, read_json, size_of
from compress.checkpoint.safetensors_header import TensorRef, read_header, write_header
from compress.errors import CompressError, InputError, RecipeError, UsageError
from compress.pipeline.resolve import resolve
from compress.spec.byte_size import parse_size
from compress.spec.gguf_keys import NUMBERS
from compress.spec.gguf_types import TYPES
from compress.spec.recipe import Recipe, override, parse_one_liner, parse_value, print_value
from compress.spec.recipe_file import parse_yaml, read
from compress.spec.scheme import BITS, Scheme
from compress.spec.selectors import check
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import DTYPE_BYTES, State

EXAMPLES = int(os.environ.get("COMPRESS_FUZZ", "150"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=2000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], database=None
)
JUNK = (0, 1, -1, 2**63, 10**400, 1.5, math.nan, math.inf, True, None, "", "x", "\ud800", "../x", "/etc/passwd", [], {}, [[]], [None])  # fmt: skip
values = st.recursive(
    st.sampled_from(JUNK) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
dtypes = st.sampled_from([*DTYPE_BYTES, "F4", "f32", ""])
sizes = st.integers(0, 5) | st.sampled_from(JUNK)
entries = st.fixed_dictionaries(
    {
        "dtype": dtypes | values,
        "shape": st.lists(sizes, max_size=4) | values,
        "data_offsets": st.lists(sizes, max_size=3) | values,
    }
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "\x1b", ""]) | st.text(max_size=3), entries | values, max_size=4
)
sound = st.lists(st.tuples(st.sampled_from(list(DTYPE_BYTES)), st.lists(st.integers(0, 4), max_size=3)), max_size=4)


def mutated(data: bytes, draw: Any) -> bytes:
    """The same with a few bytes changed, put in, taken out, or repeated."""
    found = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 4))):
        at = draw.draw(st.integers(0, len(found)))
        kind, piece = draw.draw(st.integers(0, 3)), draw.draw(st.binary(max_size=4))
        if kind == 0:
            found[at : at + len(piece)] = piece
        elif kind == 1:
            found[at:at] = piece
        elif kind == 2:
            del found[at : at + draw.draw(st.integers(1, 20))]
        else:
            found[at:at] = found[at : at + 20]
    return bytes(found)


def read_within(data: bytes, read: Callable[..., Any], name: str) -> Any:
    """What a parser finds in a file with these bytes; None where it refuses them. Reads stay within the file."""

    def at(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        return data[offset : offset + length]

    try:
        return read(at, len(data), name)
    except InputError as refused:
        said = str(refused)
    assert 0 < len(said) < 2000
    return None


def header_of(data: bytes) -> list[TensorRef] | None:
    """The tensors of a file with these bytes; None where it is refused. Reads stay within the file."""
    if (found := read_within(data, read_header, "f.safetensors")) is None:
        return None
    refs, metadata = found
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert [ref.offset for ref in refs[:1]] in ([], [start])
    assert all(one.offset + one.nbytes == other.offset for one, other in pairwise(refs))
    assert (refs[-1].offset + refs[-1].nbytes if refs else start) == len(data)
    assert all(ref.nbytes == math.prod(ref.shape) * DTYPE_BYTES[ref.dtype] for ref in refs)
    assert len({ref.name for ref in refs}) == len(refs)
    for ref in refs:
        assert ref.name.isprintable()
    assert all(isinstance(text, str) for text in metadata.values())
    return refs


@fuzz
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    header_of(data)


@fuzz
@given(headers | values, st.integers(0, 300))
@example({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 1]}}, 1)
@example({"a": {"dtype": "U8", "shape": [10**4000, 10**4000], "data_offsets": [0, 0]}}, 0)
@example({"a": {"dtype": "U8", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, 0)
def test_what_looks_like_a_header(header: Any, payload: int) -> None:
    text = json.dumps(header).encode()
    header_of(struct.pack("<Q", len(text)) + text + bytes(payload))


@fuzz
@given(sound, st.data())
def test_headers_with_a_few_bytes_changed(tensors: list[tuple[str, list[int]]], draw: Any) -> None:
    from compress.spec.weight_state import TensorSpec

    specs = [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
    data = write_header(specs, {"format": "pt"}) + bytes(sum(spec.nbytes for spec in specs))
    assert {ref.name: ref.shape for ref in header_of(data) or ()} == {spec.name: spec.shape for spec in specs}
    header_of(mutated(data, draw))


def gguf_of(data: bytes) -> GgufHeader | None:
    """The header of a GGUF file with these bytes; None where it is refused. Reads stay within the file."""
    if (found := read_within(data, read_gguf, "f.gguf")) is None:
        return None
    assert all(0 < ref.offset <= ref.offset + ref.nbytes <= len(data) for ref in found.refs)
    assert all(one.offset + one.nbytes <= other.offset for one, other in pairwise(found.refs))
    assert len({ref.name for ref in found.refs}) == len(found.refs)
    for ref in found.refs:
        assert ref.name.isprintable()
        assert ref.nbytes == math.prod(ref.shape) * DTYPE_BYTES[ref.dtype]
    return found


tensors_of_gguf = st.lists(
    st.tuples(st.sampled_from(sorted(TYPES)), st.lists(st.integers(1, 3), min_size=1, max_size=3)), max_size=4
)
keys_of_gguf = st.dictionaries(
    st.text(max_size=4), st.integers(0, 9) | st.text(max_size=9) | st.lists(st.text(max_size=3), max_size=3), max_size=4
)


@fuzz
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_of_a_gguf_file(data: bytes, begun: bool) -> None:
    gguf_of(b"GGUF\3\0\0\0" + data if begun else data)


@fuzz
@given(tensors_of_gguf, keys_of_gguf, st.data())
def test_gguf_headers_with_a_few_bytes_changed(tensors: list[tuple[str, list[int]]], keys: dict[str, Any], draw: Any) -> None:
    infos = [
        Info(f"t{i}", TYPES[kind], (*shape[:-1], shape[-1] * TYPES[kind].weights)) for i, (kind, shape) in enumerate(tensors)
    ]
    entries = [Entry(f"k.{i}", "u32" if isinstance(v, int) else "str", v) for i, v in enumerate(keys.values())]
    header, _, size = write_gguf(entries, infos)
    data = header + bytes(size - len(header))
    found = gguf_of(data)
    assert found is not None
    assert found.metadata == {entry.key: entry.value for entry in entries}
    assert [ref.name for ref in found.refs if "[" not in ref.name] == [info.name for info in infos if len(info.shape) < 3]
    gguf_of(mutated(data, draw))


metadata = st.dictionaries(
    st.sampled_from(
        [f"llama.{key}" for key, _, _ in NUMBERS]
        + [
            f"tokenizer.ggml.{key}"
            for key in ("model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "add_bos_token")
        ]
        + ["llama.rope.scaling.type", "llama.rope.freq_base", "tokenizer.chat_template"]
    ),
    values | st.sampled_from(["gpt2", "llama", "yarn", ["a", "b"], [1, 2], [0.5, 1.0], 8, 1.5]),
)


@fuzz
@given(metadata)
def test_any_metadata_of_a_gguf_file(given_keys: dict[str, Any]) -> None:
    """A config and a tokenizer, or an error of ours."""
    whole = (
        {f"llama.{key}": 8 if kind == "u32" else 0.5 for key, kind, _ in NUMBERS} | given_keys | {"general.architecture": "llama"}
    )
    refs = [TensorRef("token_embd.weight", "F32", (8, 8), "f.gguf", 0, 256, "F32")]
    with contextlib.suppress(InputError):
        json.dumps(config_of(GgufHeader(whole, refs, 0), "f.gguf", lambda offset, length: bytes(length)))
    with contextlib.suppress(InputError):
        texts = tokenizer_texts(whole, "f.gguf")
        assert all(isinstance(text, str) for text in texts.values())


@fuzz
@given(st.integers(2, 30), st.integers(1, 3))
def test_nesting_of_any_depth(power: int, kind: int) -> None:
    """Up to what the interpreter would choke on, in headers, JSON files and recipes."""
    depth = min(2**power, 20_000)
    text = {1: b"[" * depth + b"]" * depth, 2: b'{"a":' * depth + b"1" + b"}" * depth, 3: b'{"a":' * depth}[kind]
    header_of(struct.pack("<Q", len(text)) + text)
    with contextlib.suppress(RecipeError):
        parse_yaml(text.decode()[: 1 << 19])


@pytest.fixture(scope="module")
def scratch() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@fuzz
@given(st.binary(max_size=200) | values.map(lambda v: json.dumps(v).encode()))
def test_any_json_file(scratch: Path, data: bytes) -> None:
    path = scratch / "any.json"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        content = read_json(path)
        json.dumps(content, ensure_ascii=False).encode()
        size = size_of(content, "hidden_size", "a", "x")
        assert size is None or size > 0


def opened(folder: Path) -> Checkpoint | None:
    try:
        found = open_checkpoint(folder)
    except InputError:
        return None
    assert {ref.file for ref in found.refs.values()} <= {path.name for path in folder.iterdir()}
    for entry in found.logical.values():
        assert entry.dtype in DTYPE_BYTES
        assert all(size >= 0 for size in entry.shape)
    found.close()
    return found


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["weight_map", "metadata"]),
        st.dictionaries(
            st.sampled_from(["a", "b", "c"]) | st.text(max_size=3),
            st.sampled_from(["one.safetensors", "two.safetensors"]) | values,
        )
        | values,
    )
)
def test_any_index(scratch: Path, index: dict[str, Any]) -> None:
    from compress.spec.weight_state import TensorSpec

    folder = scratch / "indexed"
    folder.mkdir(exist_ok=True)
    for name, file in (("a", "one"), ("b", "two")):
        (folder / f"{file}.safetensors").write_bytes(write_header([TensorSpec(name, "U8", (2,))], {}) + bytes(2))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = opened(folder)
    if found is not None:
        assert {name: ref.file for name, ref in found.refs.items()} == index["weight_map"]


@pytest.fixture(scope="module")
def canonical(tiny: Path, scratch: Path) -> Path:
    from support import run

    run(tiny, scratch / "canonical", "quantize.rtn(scheme=w4a16g32)")
    return scratch / "canonical"


@fuzz
@given(st.data())
def test_any_manifest(canonical: Path, draw: Any) -> None:
    """Other values in a manifest, sealed as if it were ours: refused, or one that speaks of what is there."""
    path = canonical / FILE
    before = path.read_text()
    content = json.loads(before)
    weight = next(iter(content["weights"].values()))
    node = draw.draw(st.sampled_from([content, weight, weight, content["lineage"][0], content["source"], content["digests"]]))
    key = draw.draw(st.sampled_from(sorted(node)))
    node[key] = draw.draw(
        values | st.sampled_from(["codes(w4a16g32)", "codes(w5a16)", "masked(2:4)", "F32", "dense", [64, 64], [-1, 3]])
    )
    try:
        with contextlib.suppress(ValueError):  # where it is no manifest any more, its seal does not matter
            content["fingerprint"] = Manifest.model_validate(content).compute_fingerprint()
        path.write_text(json.dumps(content))
        if opened(canonical) is not None:
            manifest = Manifest.read(canonical)
            assert manifest is None or Manifest.model_validate_json(manifest.to_text()).to_text() == manifest.to_text()
    finally:
        path.write_text(before)


words = st.text(max_size=12) | st.sampled_from(
    ["null", "True", "NULL", "~", "2020-01-01", "0x1F", "0o17", "1_000", "=", "<<", ">", "|", "-", "?", "...", "---", ".inf", ".nan", "1e999",
     "9" * 60, "+1", "1.", ".5", "a:", ":a", "a#", "#", "\x85", "\u2028", "\ufeff", "\x7f", "\U000e0001", "\ud800", "'", '"', "\\", "\t", "é"]
)  # fmt: skip
grammar = st.lists(
    st.sampled_from(["quantize.rtn", "pack", "(", ")", "[", "]", "=", ",", "|", ":", "-", " ", "\n", "{", "}", "version: 1\n", "passes:\n", "- ", "'", '"', "scheme", "\\u", "&a", "*a", "!!", "#"])
    | words,
    max_size=12,
).map("".join)  # fmt: skip


def prints_back(recipe: Recipe) -> None:
    assert parse_one_liner(recipe.one_liner()) == Recipe(recipe.lines)
    assert parse_yaml(recipe.to_yaml()) == recipe
    json.dumps(recipe.to_yaml(), ensure_ascii=False).encode()


@fuzz
@given(grammar, st.sampled_from(["", "version: 1\npasses:\n- ", "version: 1\npasses: [{pack: {format: ", "version: 1\nmodel: "]))
def test_any_yaml(text: str, before: str) -> None:
    with contextlib.suppress(RecipeError):
        prints_back(parse_yaml(before + text + ("}}]" if before.endswith("{format: ") else "")))


@fuzz
@given(st.binary(max_size=100))
def test_any_recipe_file(scratch: Path, data: bytes) -> None:
    (scratch / "r.yaml").write_bytes(b"version: 1\n" + data)
    with contextlib.suppress(RecipeError):
        prints_back(read(scratch / "r.yaml"))


@fuzz
@given(grammar, st.sampled_from(["", "pack(format=", "a | b("]))
def test_any_one_liner(text: str, before: str) -> None:
    with contextlib.suppress(RecipeError):
        prints_back(parse_one_liner(before + text))


@fuzz
@given(
    words, st.sampled_from(["pack(format={})", "quantize.rtn(scheme={})", "quantize.gptq(scheme=w4a16, damping={}, skip=[{}])"])
)
def test_any_value_of_an_option(word: str, line: str) -> None:
    with contextlib.suppress(CompressError):
        recipe = parse_one_liner(line.replace("{}", word))
        for made in resolve(recipe):
            assert resolve(Recipe((made.line(),))) == [made]


@fuzz
@given(words | grammar)
def test_any_setting(text: str) -> None:
    recipe = parse_one_liner("quantize.rtn(scheme=w4a16) | pack")
    for setting in (text, f"pack.format={text}", f"{text}.format=x", f"1.{text}"):
        with contextlib.suppress(RecipeError):
            prints_back(override(recipe, [setting]))
    with contextlib.suppress(RecipeError):
        value = parse_value(text)
        assert parse_value(print_value(value)) == value


@fuzz
@given(st.from_regex(r"w[0-9]{1,3}a[0-9]{1,3}(g[0-9]{1,8})?(-asym|-min)?", fullmatch=True) | words)
def test_any_scheme(text: str) -> None:
    with contextlib.suppress(UsageError):
        scheme = Scheme.parse(text)
        assert scheme.bits in BITS
        assert Scheme.parse(str(scheme)) == scheme


@fuzz
@given(st.from_regex(r"[0-9]{0,4}[.:][0-9]{1,30}", fullmatch=True) | st.floats() | st.integers() | words)
@example("2:" + "9" * 5000)
@example("0." + "0" * 30 + "1")
@example(1e-7)
@example("٢:٤")
def test_any_sparsity(text: Any) -> None:
    with contextlib.suppress(UsageError):
        sparsity = Sparsity.parse(text)
        assert Sparsity.parse(str(sparsity)) == sparsity
        assert sparsity.fraction is None or 0 < sparsity.fraction < 1


@fuzz
@given(st.from_regex(r"(codes\([^()]{0,12}\))?\+?(masked\([^()]{0,8}\))?", fullmatch=True) | words)
def test_any_state(text: str) -> None:
    with contextlib.suppress(UsageError, ValueError):
        state = State.parse(text)
        assert State.parse(str(state)) == state


@fuzz
@given(st.text(max_size=20) | st.from_regex(r"re:[(){}\[\]*+?|^$\\a0-9,]{0,12}", fullmatch=True))
@example("re:" + "(" * 5000)
@example("re:a{99999999999}")
def test_any_selector(text: str) -> None:
    with contextlib.suppress(UsageError):
        check([text])


@fuzz
@given(st.from_regex(r"\s*[0-9.]{1,20}\s*[kKMGTi]{0,3}B?\s*", fullmatch=True) | words)
@example("٥GB")
def test_any_size(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert 1 <= parse_size(text) < 10**25


def test_no_parser_is_quadratic() -> None:
    """A megabyte of the worst that we know of, each in a second or two."""
    import time

    worst: list[Callable[[], object]] = [
        lambda: header_of(_header("{" + ",".join(f'"k{i}":1' for i in range(60_000)) + ',"k59999":1}')),
        lambda: header_of(
            _header('{"a":{"dtype":"U8","shape":[' + ",".join(["9223372036854775807"] * 50_000) + '],"data_offsets":[0,0]}}')
        ),
        lambda: parse_one_liner("pack(format='" + "''" * 500_000),
        lambda: parse_one_liner('pack(format="' + "\\" * 1_000_000),
        lambda: parse_one_liner("a" + ".a" * 500_000 + "("),
        lambda: parse_value("[" + "1," * 200_000),
        lambda: Scheme.parse("w" + "4" * 1_000_000),
        lambda: Sparsity.parse("." + "0" * 1_000_000),
        lambda: parse_size(" " * 1_000_000 + "x"),
    ]
    for number, attack in enumerate(worst):
        started = time.perf_counter()
        with contextlib.suppress(CompressError):
            attack()
        assert time.perf_counter() - started < 5, number


def _header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
