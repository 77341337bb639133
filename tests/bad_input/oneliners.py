"""One-liners, and --set, with slips of the pen."""

from __future__ import annotations

import shlex

from bad_input.bench import Case


def _case(text: str, *said: str) -> Case:
    return Case(2, said, f"run {{model}} {{out}} -p {shlex.quote(text)}")


def _set(text: str, *said: str) -> Case:
    return Case(2, said, f"run {{model}} {{out}} rtn_w4 --set {shlex.quote(text)}")


CASES = {
    "empty": _case("", "-p:1:1", "the name of a pass", "the end of the text"),
    "spaces": _case("   ", "-p:1:4", "the name of a pass", "the end of the text"),
    "unclosed bracket": _case("pack(", "-p:1:6", "the name of an option", "the end of the text"),
    "unclosed list": _case("quantize.rtn(scheme=w4a16, skip=[a", "-p:1:35", "']'", "the end of the text"),
    "unclosed quote": _case('pack(format="gptq)', "-p:1:13", "a closing quote"),
    "unclosed single quote": _case("pack(format='gptq)", "-p:1:13", "a closing quote"),
    "option twice": _case("quantize.rtn(scheme=w4a16, scheme=w8a16)", "-p:1:28", "each option once", "'scheme' twice"),
    "unknown pass": _case("quantise.rtn", "-p:1:1", "one of", "'quantise.rtn' (did you mean 'quantize.rtn'?)"),
    "unknown option": _case("quantize.rtn(sheme=w4a16)", "quantize.rtn.sheme", "an unknown option (did you mean 'scheme'?)"),
    "no value": _case("pack(format=)", "-p:1:13", "a value", "')'"),
    "no option": _case("pack(=gptq)", "-p:1:6", "the name of an option", "'=gptq)'"),
    "nested list": _case("quantize.rtn(scheme=w4a16, skip=[[a]])", "-p:1:34", "a value", "'[a]])'"),
    "trailing pipe": _case("pack |", "-p:1:7", "the name of a pass", "the end of the text"),
    "two pipes": _case("pack || pack", "-p:1:7", "the name of a pass", "'| pack'"),
    "no pipe": _case("quantize.rtn(scheme=w8a16) pack", "-p:1:28", "'|'", "'pack'"),
    "a missing comma": _case("quantize.rtn(scheme=w4a16 clip=mse)", "-p:1:27", "')'"),
    "capital letters": _case("Pack", "-p:1:1", "the name of a pass", "'Pack'"),
    "very long": _case("pack | " * 20_000 + "pac", "did you mean 'pack'"),
    "a very long name": _case("a" * 100_000, "one of"),
    "NUL": _case("pack(format=\0)", "pack.format"),
    "NUL for a name": _case("\0", "the name of a pass"),
    "half a character": _case('pack(format="\\ud800")', "whole characters"),
    "not UTF-8": _case("pack(format=\udcff)", "a text in UTF-8", "bytes that are not"),
    "a bad escape": _case('pack(format="\\x")', "a quoted text with JSON's escapes"),
    "a path that climbs": _case("quantize...rtn(scheme=w4a16)", "-p:1:9", "'|'"),
    "a private module": _case("quantize.__init__", "'|'"),
    "a list for one value": _case("quantize.rtn(scheme=[w4a16])", "quantize.rtn.scheme", "a scheme such as w4a16g128"),
    "text for a truth value": _case("pack(dequantize=perhaps)", "pack.dequantize", "a valid boolean", "'perhaps'"),
    "set without a value": _set("quantize.rtn.scheme", "--set pass.option=value"),
    "set of no line": _set("quantize.rtm.scheme=w8a16", "one line of the recipe", "no such line (did you mean 'quantize.rtn'?)"),
    "set of a line beyond the end": _set("9.scheme=w8a16", "one line of the recipe", "no such line", "1. quantize.rtn"),
    "set of two values": _set("quantize.rtn.scheme=w8a16 w4a16", "the end of the value", "'w4a16'"),
    "set of an unknown option": _set("quantize.rtn.sheme=w8a16", "an unknown option (did you mean 'scheme'?)"),
    "set to nothing": _set("quantize.rtn.scheme=", "a value", "the end of the text"),
}  # fmt: skip
