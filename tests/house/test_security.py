"""Security: no pickle, no code chosen by a file's words, no write outside OUT, no secret told, no file of the machine taken."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import compress.kernels
import compress.passes
from compress.architecture.weight_map import resolve
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.corpus.encoder import Encoder
from compress.corpus.spec import CorpusSpec
from compress.errors import InputError
from compress.layerwise.model import build
from forked import Server, python
from hub_server import Hub, serve
from support import run

RTN = "quantize.rtn(scheme=w4a16g32) | pack"
SOURCES = sorted(
    path for package in (compress, compress.passes, compress.kernels) for root in package.__path__ for path in Path(root).rglob("*.py")
)  # fmt: skip
PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "tarfile",
    "zipfile",
}
BY_NAME = {
    ("__init__.py", "importlib.import_module(f'compress.{_HOMES[name]}')"): "public names, from a table of ours",
    ("discover.py", "importlib.import_module(f'compress.passes.{name}')"): "a pass that lies there, by its path",
    ("dispatch.py", "importlib.import_module(f\"compress.kernels.{name.replace('-', '_')}.layout\")"): "a format that lies there",
    ("dispatch.py", "importlib.import_module(f'compress.kernels.native.{name}')"): "a backend, from a table of ours",
    ("__init__.py", "import_module(f\"compress.importers.{method.replace('-', '_')}\")"): "one of METHODS",
    ("reader.py", "getattr(torch, _TORCH_NAMES[name])"): "a dtype, from a table of ours",
    ("model.py", "getattr(torch, dtype)"): "a dtype, checked where it is given",
    ("probe.py", "getattr(torch, request['dtype'])"): "the same, handed to a reader's process",
    ("probe.py", "runpy.run_path(script)"): "a script of ours, beside it",
    ("time_llama_cpp.py", "runpy.run_path(str(Path(__file__).with_name('probe_llama_cpp.py')))"): "a script of ours, beside it",
    ("probe_auto_gptq.py", "importlib.import_module('auto_gptq')"): "one name",
    ("probe_gptqmodel.py", "importlib.import_module('gptqmodel')"): "one name",
    ("probe_gptqmodel.py", "importlib.import_module('torch')"): "one name",
    ("probe_vllm.py", "importlib.import_module('vllm')"): "one name",
    ("probe_llama_cpp.py", "importlib.import_module('xllamacpp')"): "one name",
    ("probe_llama_cpp.py", "importlib.import_module('tokenizers')"): "one name",
    ("probe_mlx.py", "importlib.import_module('mlx.core')"): "one name",
    ("probe_mlx.py", "importlib.import_module('mlx_lm.utils')"): "one name",
    ("probe_peft.py", "importlib.import_module('peft')"): "one name",
    ("model_class.py", "getattr(modeling_auto, name)"): "the names of transformers' own tables",
    ("model_class.py", "getattr(transformers, wanted)"): "a class that those tables list for the model_type",
}
"""Where code or an attribute of a library is found by a name, and why nobody else can choose the name."""


@lru_cache(maxsize=1)
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call of a file, and what is called, as it is written."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name of it or empty) of every import of a file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def bound(path: Path) -> set[str]:
    """The names that a file's imports bind."""
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).partition(".")[0] for node in nodes for alias in node.names}


def opens_no_pickle_and_runs_no_text(path: Path) -> None:
    for module, name in imported(path):
        # Our own archives of compiled kernels, which hold bytes for the GPU's driver alone.
        if (path.parent.name, module) != ("cuda", "zipfile"):
            assert module.split(".")[0] not in PICKLES, module
        assert (module, name) not in {
            ("torch", "load"),
            ("os", "system"),
            ("os", "popen"),
            ("builtins", "eval"),
            ("builtins", "exec"),
        }
    for call, called in calls(path):
        words = {keyword.arg: keyword.value for keyword in call.keywords}
        assert called not in {"eval", "exec", "compile", "__import__"}, called
        assert not re.fullmatch(
            r"torch\.(jit\.|hub\.|serialization\.|package\.)?load|(np|numpy|pd|pandas)\.(load|read_pickle)", called
        )
        assert not re.fullmatch(r"os\.(system|popen|exec\w+|spawn\w+)|subprocess\.get(status)?output", called), called
        assert "shell" not in words, called
        assert "allow_pickle" not in words, called
        assert not called.endswith(("extractall", "unpack_archive", "add_safe_globals")), called
        assert called not in {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"} or _safe_loader(call), called
        if "trust_remote_code" in words:
            value = words["trust_remote_code"]
            assert (isinstance(value, ast.Constant) and value.value is False) or ast.unparse(value) == "trusted"


def test_no_source_opens_a_pickle_or_runs_a_text() -> None:
    assert len(SOURCES) > 200
    for path in SOURCES:
        try:
            opens_no_pickle_and_runs_no_text(path)
        except AssertionError as error:
            raise AssertionError(f"{path}: {error}") from None


def _safe_loader(call: ast.Call) -> bool:
    return any("SafeLoader" in ast.unparse(base) for base in (*call.args[1:], *(k.value for k in call.keywords)))


def test_code_is_found_by_name_only_where_nobody_else_chooses_it() -> None:
    found = set()
    for path in SOURCES:
        modules = bound(path)
        for call, called in calls(path):
            by_name = called.endswith(("import_module", "run_path", "run_module", "spec_from_file_location", "exec_module"))
            if called == "getattr" and not isinstance(call.args[1], ast.Constant):
                by_name = isinstance(call.args[0], ast.Name) and call.args[0].id in modules
            if by_name:
                found.add((path.name, ast.unparse(call)))
    assert found == BY_NAME.keys()


def test_code_of_a_model_is_loaded_in_one_place() -> None:
    users = {path.name for path in SOURCES if any(module == "transformers.dynamic_module_utils" for module, _ in imported(path))}
    assert users == {"remote_code.py"}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A folder on the path whose modules tell that they were imported; so do kernels of the Hub, and any connection."""
    from transformers.integrations import hub_kernels

    heard: list[str] = []
    folder = tmp_path / "path"
    folder.mkdir()
    for name in ("canary", "modeling_canary"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'sang')!r}, 'a').write('{name}')\n")
    monkeypatch.syspath_prepend(str(folder))

    def listen(word: str) -> Callable[..., Any]:
        def heard_of(*args: Any, **_: Any) -> None:
            heard.append(f"{word} {args}")
            raise OSError(word)

        return heard_of

    for name in ("get_kernel", "load_and_register_attn_kernel"):
        monkeypatch.setattr(hub_kernels, name, listen(name))
    monkeypatch.setattr(socket.socket, "connect", listen("connect"))
    monkeypatch.setattr(os, "system", listen("system"))
    return lambda: heard + [path.name for path in [tmp_path / "sang"] if path.exists()]


CODE = "__import__('canary')"
HOSTILE: list[tuple[str, Any]] = [
    *(("architectures", [name]) for name in ("canary.Model", CODE, "AutoModelForCausalLM", "pipeline", "utils", 3, {"a": 1})),
    *(("model_type", name) for name in ("canary", CODE, "../canary", "llama.canary", ["llama"], None)),
    *((key, name) for key in ("dtype", "torch_dtype") for name in ("load", "hub.load", CODE, "canary", {"a": "load"}, ["load"])),
    *((key, "owner/canary") for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")),
    ("_attn_implementation", {"": "owner/canary"}),
    ("text_config", {"attn_implementation": "owner/canary"}),
    *((key, "owner/canary") for key in ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")),
    *((key, "owner/canary") for key in ("use_kernels", "kernel_config", "custom_generate", "_name_or_path", "_commit_hash")),
    ("custom_pipelines", {"text-generation": {"impl": "modeling_canary.Pipeline", "pt": ["AutoModelForCausalLM"]}}),
    *(("quantization_config", {"quant_method": name}) for name in ("canary", CODE, "../canary", "foreign.canary", "packed", 3)),
    ("quantization_config", {"quant_method": "compressed-tensors", "format": CODE, "config_groups": {CODE: {"targets": [CODE]}}}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "load"}),
    ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": CODE, "modules_to_not_convert": [CODE, "("]}),
    *(("tokenizer_class", name) for name in ("canary.Tokenizer", CODE, "AutoTokenizer")),
    ("auto_map", {"AutoConfig": "modeling_canary.Config", "AutoModelForCausalLM": "modeling_canary.Model"}),
    ("auto_map", {"AutoConfig": "owner/canary--modeling_canary.Config"}),
    ("auto_map", CODE),
    *(("hidden_act", name) for name in (CODE, "canary", "os.system", ["silu"])),
    *(("rope_parameters", {"rope_type": name, "rope_theta": 1e4}) for name in (CODE, "canary", ["default"])),
    ("rope_scaling", {"type": CODE}),
]


def test_the_canary_sings(canary: Callable[[], list[str]]) -> None:
    importlib.import_module("canary")
    with pytest.raises(OSError, match="connect"):
        socket.create_connection(("127.0.0.1", 9))
    assert len(canary()) == 2


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=lambda value: re.sub(r"\W+", "-", str(value))[:40])
def test_a_config_chooses_no_code(key: str, value: Any, tiny: Path, tmp_path: Path, canary: Callable[[], list[str]]) -> None:
    """A hostile word is an error of ours or means nothing; its module is there to be imported, and is not."""
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    shutil.copyfile(tmp_path / "path" / "modeling_canary.py", source / "modeling_canary.py")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    for use in (
        lambda: resolve(open_checkpoint(source)),
        lambda: build(open_checkpoint(source)),
        lambda: run(source, tmp_path / "out", RTN),
    ):
        with suppress(InputError):
            use()
    assert canary() == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "canary.Tokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": CODE, "auto_map": {"AutoTokenizer": [None, "modeling_canary.T"]}}),
        ("tokenizer_config.json", {"auto_map": ["modeling_canary.T", None]}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["owner/canary--modeling_canary.T", None]}}),
        ("tokenizer_config.json", {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}),
        (
            "tokenizer_config.json",
            {"chat_template": "{% import 'canary' as c %}{{ cycler.__init__.__globals__.os.system('x') }}"},
        ),
        (
            "generation_config.json",
            {"custom_generate": "owner/canary", "cache_implementation": CODE, "compile_config": {"a": CODE}},
        ),
    ],
)
def test_side_files_choose_no_code(
    file: str, content: dict[str, Any], demo_model: Path, tmp_path: Path, canary: Callable[[], list[str]]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo_model, source)
    shutil.copyfile(tmp_path / "path" / "modeling_canary.py", source / "modeling_canary.py")
    old = json.loads((source / file).read_text()) if (source / file).is_file() else {}
    (source / file).write_text(json.dumps({**old, **content}))
    with suppress(InputError):
        build(open_checkpoint(source))
    with suppress(InputError):
        encoder = Encoder(CorpusSpec(("-",), chat="chat_template" in content), source)
        if "chat_template" in content:
            with pytest.raises(Exception, match=r"unsafe|undefined|no loader"):
                encoder.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert canary() == []


@pytest.mark.parametrize("name", ["canary", "gptq.layout", "../canary", CODE])
def test_a_manifest_chooses_no_code(name: str, tiny: Path, tmp_path: Path, canary: Callable[[], list[str]]) -> None:
    out = run(tiny, tmp_path / "out", RTN).out
    manifest = Manifest.read(out)
    assert manifest is not None
    (out / "manifest.json").write_text(manifest.model_copy(update={"format": name}).sealed().to_text())
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["quant_method"] = name
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="one of awq"):
        build(open_checkpoint(out))
    assert canary() == []


def link(target: str | Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def bound_socket(path: Path) -> None:
    """A socket that outlives its owner; its path may be longer than a socket's may be."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a link to a file of the machine": ("notes.txt", link("/etc/passwd"), "a link out of it"),
    "a link to a neighbour": ("notes.txt", link("../secret"), "a link out of it"),
    "a link to a link": ("notes.txt", link("hop"), "a link out of it"),
    "a link to nothing": ("notes.txt", link("gone"), "the file is missing"),
    "a link to itself": ("notes.txt", link("notes.txt"), "link"),
    "a link to a device": ("notes.txt", link("/dev/zero"), "a link out of it"),
    "a config elsewhere": ("config.json", link("../secret"), "a link out of it"),
    "a shard elsewhere": ("model.safetensors", link("../secret"), "a link out of it"),
    "a pipe": ("notes.txt", os.mkfifo, "a pipe, a socket or a device"),
    "a pipe for a config": ("config.json", os.mkfifo, "a pipe, a socket or a device"),
    "a pipe for a manifest": ("manifest.json", os.mkfifo, "a pipe, a socket or a device"),
    "a pipe for a shard": ("model.safetensors", os.mkfifo, "a pipe, a socket or a device"),
    "a socket": ("notes.txt", bound_socket, "a pipe, a socket or a device"),
    "a line break in a name": ("a\nerror: b.txt", Path.touch, "names of files that can be printed"),
    "an escape in a name": ("\x1b[2Ja.txt", Path.touch, "names of files that can be printed"),
    "no text for a name": (os.fsdecode(b"\xff.txt"), Path.touch, "names of files that can be printed"),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_no_file_of_a_checkpoint_is_refused(case: str, tiny: Path, tmp_path: Path) -> None:
    name, make, said = SPECIAL[case]
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    shutil.copyfile(source / name, tmp_path / "secret") if (source / name).exists() else (tmp_path / "secret").touch()
    (source / name).unlink(missing_ok=True)
    if make.__name__ == "<lambda>" and case == "a link to a link":
        (source / "hop").symlink_to("../secret")
    make(source / name)
    with pytest.raises(InputError) as caught:
        run(source, tmp_path / "out", RTN)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    text = str(caught.value)
    assert all(part.isprintable() for part in text.splitlines())
    assert "\nerror: b" not in text


def test_a_message_does_not_steer_the_terminal(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "config.json").write_text(json.dumps({"model_type": "\x1b[2J\x9b\r\u202enope"}))
    with pytest.raises(InputError) as caught:
        resolve(open_checkpoint(source))
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert r"\x1b[2J\x9b\r\u202enope" in str(caught.value)


def test_links_that_stay_are_followed(tiny: Path, tmp_path: Path) -> None:
    """Within the directory, by a linked directory, and from a snapshot of the Hub's cache to its blobs; copies go out."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    shutil.copyfile(tiny / "config.json", snapshot / "LICENSE")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "source").symlink_to(snapshot)
    out = run(tmp_path / "source", tmp_path / "out", RTN).out
    assert not [path for path in out.iterdir() if path.is_symlink()]
    assert (out / "NOTICE").read_bytes() == (out / "LICENSE").read_bytes()
    (blobs / "evil").symlink_to("/etc/passwd")
    (snapshot / "notes.txt").symlink_to("../../blobs/evil")
    with pytest.raises(InputError, match="a link out of it"):
        open_checkpoint(snapshot)


VERBS = """
import sys
from pathlib import Path
from compress.cli.app import build
model, text = sys.argv[1:]
data = f"calibrate(data='{text}', samples=4, length=32)"
for line in (
    ["plan", model, "-p", "quantize.rtn(scheme=w4a16g32) | pack"],
    ["run", model, "out", "-p", f"{data} | quantize.gptq(scheme=w4a16g32) | pack"],
    ["run", model, "tuned", "-p", f"distill.logits(data='{text}', samples=2, length=16, batch=2)"],
    ["calibrate", model, "tokens", "--data", text, "--samples", "2", "--length", "16"],
    ["quantize", "rtn", model, "codes", "--scheme", "w4a16g32"],
    ["eval", "out", "--data", text, "--tokens", "64", "--length", "32"],
    ["show", "out"],
    ["card", "out", "--write"],
    ["report", "out"],
    ["diff", model, "out"],
    ["verify", "out", "--reader", "transformers"],
    ["generate", "out", "--prompt", "def", "--new-tokens", "2"],
    ["clean", "out"],
):
    try:
        build(line)(line, standalone_mode=False)
    except SystemExit as stop:
        assert not stop.code, (line, stop.code)
"""
AUDITED = """
import os, sys, tempfile
record, work, *sys.argv[1:] = sys.argv[1:]
record, where = open(record, "a", buffering=1), {"open": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2}
tempfile.tempdir = None
os.chdir(work)
def note(event, given):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        if event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return
        paths = given[: where.get(event, 1)]
        folders = given[-len(paths) :] if event not in ("open", "os.truncate") else (-1,)
        for path, folder in zip(paths, folders):
            if isinstance(path, (str, bytes, os.PathLike)):
                base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
                full = os.path.normpath(os.path.join(base, os.fsdecode(path)))
                # What is there already cannot be made.
                if event != "os.mkdir" or not os.path.isdir(full):
                    record.write(full + "\\n")
sys.addaudithook(note)
"""
"""Writes down each path that Python opens to write, makes, moves or removes; the first argument is the file for them."""
OUTS = ("out", "tuned", "tokens", "codes")
CHANGES = "openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat,mknod,mknodat"


def paths_changed(trace: str, cwd: Path) -> set[Path]:
    """What a trace of strace opens to write, makes, moves or removes."""
    found: set[Path] = set()
    for line in trace.splitlines():
        call = re.search(r"(\w+)\((.*)\) += (-?\d+)", line)
        if call is None or int(call[3]) < 0:
            continue
        if call[1] in ("open", "openat") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", call[2]):
            continue
        found |= {
            Path(os.path.normpath(cwd / folder / name)) for folder, name in re.findall(r'(?:<([^>]*)>, )?"([^"]*)"', call[2])
        }
    return found


@pytest.fixture
def watched(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment whose home, caches and scratch folders are empty directories of this test, and a working directory."""
    for name in ("home", "scratch", "work"):
        (tmp_path / name).mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "COMPRESS_", "TORCH", "PYTHON"))}
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "scratch")}
    return {**kept, **places, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, tmp_path / "work"


def given(demo_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A source that is read-only, and a text."""
    source, text = tmp_path / "source", tmp_path / "text.txt"
    shutil.copytree(demo_model, source)
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    for path in [*source.iterdir(), source, text]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return source, text


def only_out(changed: set[Path], work: Path, tmp_path: Path, demo_model: Path) -> None:
    """What was changed lies in the outputs, their steps and reports; the source is as it was."""
    # Drafts of reports stand beside them, with a number in the name, until they are renamed.
    reports = [work / f"{out}.report.html" for out in OUTS]
    changed = {path.with_name(re.sub(r"^\.(.*)\.\d+\.draft$", r"\1", path.name)) for path in changed}
    places = [*reports, *(work / f"{out}{steps}" for out in OUTS for steps in ("", ".steps"))]
    outside = {path for path in changed if not any(path == place or place in path.parents for place in places)}
    # The scratch folder is tried out by Python, torch makes an empty one in it, a reader and a picture have one each.
    scratch = rf"{re.escape(str(tmp_path / 'scratch'))}/(\w{{8}}|torchinductor_\w+|compress-(reader|fonts)-\w+(/.*)?)"
    assert not [path for path in outside if not re.fullmatch(rf"/dev/(null|tty|shm/.*)|/proc/.*|{scratch}", str(path))]
    assert changed > {*reports, *(work / out for out in OUTS)}, "the trace tells nothing"
    assert {path.name for path in work.iterdir()} == {*OUTS, *(path.name for path in reports)}
    assert not [*(tmp_path / "home").iterdir()]
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    source = tmp_path / "source"
    assert {path.name: path.read_bytes() for path in source.iterdir()} == {p.name: p.read_bytes() for p in demo_model.iterdir()}
    source.chmod(0o755)


def test_nothing_is_written_outside_out(watched: tuple[dict[str, str], Path], demo_model: Path, tmp_path: Path) -> None:
    """Every verb that is no other program's, with each call of Python watched."""
    variables, work = watched
    told = {name: variables[name] for name in ("HOME", "TMPDIR")}
    verbs = "".join(line for line in VERBS.splitlines(keepends=True) if '"verify"' not in line)
    done = python(AUDITED + verbs, tmp_path / "trace", work, *given(demo_model, tmp_path), **told)
    assert done.returncode == 0, done.stderr[-3000:]
    only_out({Path(line) for line in (tmp_path / "trace").read_text().splitlines()}, work, tmp_path, demo_model)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_nothing_is_written_outside_out_by_any_system_call(
    watched: tuple[dict[str, str], Path], demo_model: Path, tmp_path: Path
) -> None:
    """Every verb, with each system call watched, of a reader's process and of libraries in C."""
    variables, work = watched
    strace = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-s", "4096", "-e", f"trace={CHANGES}", "-o", str(tmp_path / "trace")]
    command = [*strace, sys.executable, "-P", "-c", VERBS, *map(str, given(demo_model, tmp_path))]
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    only_out(paths_changed((tmp_path / "trace").read_text(errors="replace"), work), work, tmp_path, demo_model)


TOKEN = "hf_SECRETsecretSECRETsecret0123456789"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as server:
        yield server


def test_a_token_is_told_nowhere(hub: Hub, watched: tuple[dict[str, str], Path], tiny: Path, tmp_path: Path) -> None:
    """Neither in what is printed, tracebacks of the Hub's refusals among it, nor in any file that is written; wherever it is."""
    variables, work = watched
    server = Server({k: v for k, v in variables.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": hub.url})
    hub.add("someone/tiny", tiny)
    hub.add("someone/gated", tiny)
    hub.repos["someone/gated"].gated = True
    cache = tmp_path / "home" / ".cache"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", ""):
        lines: list[tuple[list[str], int]] = [
            (["run", "someone/tiny", f"out{name}", "-p", RTN, "--json"], 0),
            (["run", "someone/gated", "no", "-p", RTN, "--json", "--debug"], 1),
            (["plan", "someone/missing", "-p", RTN, "--debug"], 1),
            (["plan", "someone/missing", "-p", RTN, "--json"], 3),
        ]
        if not name:
            (cache / "huggingface").mkdir(parents=True)
            (cache / "huggingface" / "token").write_text(TOKEN)
        hub.requests.clear()
        told, given = b"", {name: TOKEN} if name else {}
        for line, status in lines if name == "HF_TOKEN" else lines[:2]:
            done = server.compress(*line, cwd=work, **given)
            assert done.returncode == status, done.stderr
            told += (done.stdout + done.stderr).encode()
        hub.status = 500
        done = server.compress("plan", "someone/other", "-p", RTN, "--debug", cwd=work, HF_HUB_DISABLE_TELEMETRY="1", **given)
        hub.status = None
        assert done.returncode, done.stdout
        told += (done.stdout + done.stderr).encode()
        assert any(request.authorized for request in hub.requests), "the token was not used"
        assert b"gated" in told
        written = [path for path in (tmp_path).rglob("*") if path.is_file() and path.name != "token"]
        assert any(path.name == "manifest.json" for path in written)
        for bytes_ in (told, *(path.read_bytes() for path in written)):
            assert TOKEN.encode() not in bytes_
            assert TOKEN[3:].encode() not in bytes_
        # Each begins with nothing.
        shutil.rmtree(cache)
