"""Recipe files that are hostile, damaged, or slips of the pen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bad_input.bench import Case

FILE = "recipe.yaml"
ARGV = "run {model} {out} {work}/recipe.yaml"


def text(content: str | bytes) -> Callable[[Path], object]:
    """The recipe."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda model: (model.parent / FILE).write_bytes(data)


def _case(content: str | bytes, *said: str) -> Case:
    return Case(2, (FILE, *said), ARGV, text(content))


HEAD = "version: 1\npasses:\n"
CASES = {
    "anchor": _case(HEAD + "- pack: &a {}\n", ":3:9", "plain YAML", "an anchor or alias", "write the value out"),
    "alias": _case(HEAD + "- quantize.rtn: {scheme: *a}\n", "plain YAML", "an anchor or alias"),
    "billion laughs": _case("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n", "an anchor or alias"),
    "tag": _case(HEAD + "- pack: !!python/object/apply:os.system [ls]\n", "plain YAML", "the tag", "leave the tag out"),
    "a tag on a scalar": _case(HEAD + "- quantize.rtn: {scheme: !!binary w4}\n", "plain YAML", "the tag"),
    "deep nesting": _case(HEAD + "- pack: " + "[" * 5000, "at most 6 levels of nesting", "more"),
    "huge": _case(HEAD + "- pack: {}\n" + "#" * (1 << 20), "a recipe of at most 1,048,576 bytes", "a variant is another file"),
    "huge and not UTF-8": _case(b"\xff" * (1 << 21), "a recipe of at most 1,048,576 bytes"),
    "a key twice": _case(HEAD + "- quantize.rtn: {scheme: w4a16, scheme: w8a16}\n", ":3:33", "each key once", "'scheme' twice"),
    "two lists of passes": _case(HEAD + "- pack: {}\npasses:\n- pack: {}\n", ":4:1", "each key once", "'passes' twice"),
    "unknown pass": _case(HEAD + "- quantise.rtn: {scheme: w4a16}\n", ":3:3", "one of", "'quantise.rtn' (did you mean 'quantize.rtn'?)"),
    "unknown option": _case(HEAD + "- quantize.rtn: {sheme: w4a16}\n", ":3:3: quantize.rtn.sheme", "one of targets, skip, scheme", "an unknown option (did you mean 'scheme'?)"),
    "every mistake at once": _case(HEAD + "- quantize.rtn: {}\n- pac: {}\n- pack: {formt: x}\n", "quantize.rtn.scheme", "did you mean 'pack'", "did you mean 'format'", "3 problems"),
    "an option of an option": _case(HEAD + "- pack: {format: {name: gptq}}\n", ":3:18", "pack.format: a scalar or a flat list", "a mapping"),
    "wrong version": _case("version: 2\npasses: [pack]\n", ":1:1", "version: 1", "version 2"),
    "a version that is a text": _case("version: '1'\npasses: [pack]\n", "version: 1"),
    "no version": _case("passes: [pack]\n", "version: 1", "no version", "begin with `version: 1`"),
    "no passes": _case("version: 1\n", "passes: a list of `- name: {options}`", "nothing"),
    "an empty list of passes": _case("version: 1\npasses: []\n", ":2:9", "passes: a list of", "a list"),
    "passes that are a mapping": _case("version: 1\npasses: {pack: {}}\n", "passes: a list of", "a mapping"),
    "two passes in one line": _case(HEAD + "- {pack: {}, calibrate: {}}\n", ":3:3", "one pass, `name: {options}`", "a mapping"),
    "an unknown key": _case("version: 1\nmodle: x\npasses: [pack]\n", ":2:1", "'modle' (did you mean 'model'?)"),
    "negative seed": _case("version: 1\nseed: -1\npasses: [pack]\n", ":2:7", "a whole number >= 0", "'-1'"),
    "seed that is no number": _case("version: 1\nseed: 1.5\npasses: [pack]\n", ":2:7", "a whole number >= 0", "'1.5'"),
    "model that is a list": _case("version: 1\nmodel: [a]\npasses: [pack]\n", ":2:8", "a directory or a Hub id", "a list"),
    "binary": _case(bytes(range(256)), "UTF-8"),
    "control characters": _case("version: 1\n\x00\x1b[2J", "valid YAML 1.2", "special characters are not allowed"),
    "a BOM and nothing else": _case(b"\xef\xbb\xbf", "a mapping with version and passes", "nothing"),
    "not UTF-8": _case("version: 1 # é".encode("latin-1"), "a recipe in UTF-8", "bytes that are not"),
    "UTF-16": _case("version: 1\n".encode("utf-16"), "a recipe in UTF-8"),
    "empty": _case("", "a mapping with version and passes", "nothing"),
    "a list": _case("- pack: {}\n", "a mapping with version and passes", "a list"),
    "two documents": _case("version: 1\n---\nversion: 1\n", "valid YAML 1.2", "another document"),
    "unclosed": _case("version: 1\npasses: [", ":2:10", "valid YAML 1.2"),
    "tabs": _case("version: 1\npasses:\n\t- pack: {}\n", "valid YAML 1.2"),
    "half a character": _case(HEAD + '- pack: {format: "\\ud800"}\n', "pack.format: whole characters", "half of a surrogate pair"),
    "NaN": _case(HEAD + "- quantize.gptq: {scheme: w4a16, damping: .nan}\n", "quantize.gptq.damping", "number", "'.nan'"),
    "infinity": _case(HEAD + "- quantize.gptq: {scheme: w4a16, damping: 1e999}\n", "quantize.gptq.damping", "number"),
    "a folder": Case(2, ("recipe", "a file, or one of", "neither"), "run {model} {out} {work}"),
    "no such file": Case(2, ("a file, or one of", "neither"), "run {model} {out} {work}/none.yaml"),
}  # fmt: skip
