"""Reader: an immutable checkpoint directory, opened by reading only its headers.

Opening checks everything that headers can tell: the index against the files, every file against its header,
no path out of the directory, no pickle, a readable `config.json`. Reads use pread, never mmap: with
mmap, resident memory counts every page touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.gguf_header import read_gguf
from compress.checkpoint.gguf_source import file_of, folder_for
from compress.checkpoint.manifest import FILE as MANIFEST_FILE
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.safetensors_header import CANONICAL_STEM, STEM, TensorRef, read_header
from compress.errors import InputError
from compress.numerics.qtensor import PARTS, specs
from compress.spec.strict_json import parse_json
from compress.spec.weight_state import DENSE, State, Weight

if TYPE_CHECKING:
    import torch

GGUF, GGUF_FILE = ".gguf", "model.gguf"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
TRAINING = ("training.jsonl", "training.svg", "domains.svg")
"""The record of a training pass, the last only where weights of domains move; it stays in the directory of its step."""
ALLOCATION = ("allocation.jsonl", "allocation.svg")
"""The decisions of an allocator, one line for each weight; they stay in the directory of their step, too."""
RECORDS = ("evaluation.json", "verification.json")
"""What was measured and verified of an artifact, after its manifest was sealed; see compress/evaluate/records.py."""
_NOT_CARRIED = {MANIFEST_FILE, "config.json", "quantize_config.json", "quant_config.json", *TRAINING, *ALLOCATION, *RECORDS}
README = "README.md"
PICTURE = "bits.svg"
"""The picture in the README.md of an artifact."""
ABOUT = (README, "EVAL.md", PICTURE)
"""Texts and pictures about a checkpoint, whose numbers do not hold for what is made from it."""
INDEXES = tuple(f"{stem}.safetensors.index.json" for stem in (STEM, CANONICAL_STEM))
CALIBRATION = "calibration.safetensors"
"""Calibration tokens, a side file of a checkpoint until it is packed."""
ADAPTER = "loftq_init"
"""The folder of an adapter that belongs to the weights in the same directory."""
ADAPTER_CONFIG, ADAPTER_TENSORS = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"
CANONICAL = "compress"
"""`quant_method` of a checkpoint that holds canonical codes, so that no other reader takes it for a dense one."""
NATIVE = "native"
"""`format` next to that `quant_method` in an artifact of the native layout; a canonical checkpoint has `canonical`."""


@dataclass(frozen=True)
class Logical:
    """A weight as passes see it: dense dtype and stored shape, whatever form its bytes are in."""

    dtype: str
    shape: tuple[int, ...]
    state: State
    transposed: bool


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose headers have been read and found sound."""

    path: Path
    refs: dict[str, TensorRef]
    config: dict[str, Any]
    side_files: tuple[str, ...]
    manifest: Manifest | None = None
    left_behind: tuple[str, ...] = ()
    """Folders, and weights in other formats, that lie in the directory and are not copied to the output."""
    name: str = ""
    origin: dict[str, Any] = field(default_factory=dict)
    """Hub commit, licence and dataset ids where the source came from the Hub."""
    trusted: bool = False
    """Whether Python files of the checkpoint may be run."""

    @cached_property
    def logical(self) -> dict[str, Logical]:
        """Every weight by its source name, in stored order; the parts of a quantized weight are one entry."""
        records = self.manifest.weights if self.manifest and self.manifest.format == "canonical" else {}
        found: dict[str, Logical] = {}
        for ref in self.refs.values():
            whole, _, part = ref.name.rpartition(".")
            if part in PARTS and whole in records:
                record = records[whole]
                found[whole] = Logical(record.dtype, record.shape, State.parse(record.state), record.transposed)
            else:
                state = State.parse(records[ref.name].state) if ref.name in records else DENSE
                found[ref.name] = Logical(ref.dtype, ref.shape, state, False)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of tensor payload."""
        return sum(ref.nbytes for ref in self.refs.values())

    @cached_property
    def _files(self) -> dict[str, int]:
        return {}

    def descriptor(self, file: str) -> int:
        """An open descriptor of a shard; shards stay open as long as the checkpoint lives."""
        if file not in self._files:
            try:
                self._files[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise InputError(str(self.path / file), "a readable file", error.strerror or str(error)) from None
        return self._files[file]

    def close(self) -> None:
        """Closes the shards that were opened."""
        while self._files:
            os.close(self._files.popitem()[1])

    def chunks(self, name: str, chunk_bytes: int = 4 << 20) -> Iterator[memoryview]:
        """The bytes of a tensor, piece by piece, in one buffer that each piece overwrites."""
        ref = self.refs[name]
        buffer = memoryview(bytearray(min(chunk_bytes, ref.nbytes)))
        for start in range(0, ref.nbytes, chunk_bytes):
            piece = buffer[: min(chunk_bytes, ref.nbytes - start)]
            self._fill(ref, start, piece)
            yield piece

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor, or rows `start:stop` of its first dimension."""
        import torch

        ref = self.refs[name]
        dtype = torch_dtype(ref.dtype)
        if not ref.nbytes:
            return torch.empty(ref.shape, dtype=dtype)
        rows = ref.shape[0] if ref.shape else 1
        stop = rows if stop is None else stop
        row_bytes = ref.nbytes // rows
        data = bytearray((stop - start) * row_bytes)
        self._fill(ref, start * row_bytes, memoryview(data))
        return torch.frombuffer(data, dtype=dtype).reshape((stop - start, *ref.shape[1:]) if ref.shape else ())

    def _fill(self, ref: TensorRef, start: int, view: memoryview) -> None:
        """Reads bytes of a tensor, from `start`, until `view` is full."""
        done, descriptor = 0, self.descriptor(ref.file)
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done:]], ref.offset + start + done)
            except OSError as error:
                raise InputError(str(self.path / ref.file), "a readable file", error.strerror or str(error)) from None
            if not got:
                raise InputError(
                    str(self.path / ref.file),
                    f"{len(view)} bytes of '{ref.name}'",
                    f"{done} bytes: the file was cut while we read it",
                )
            done += got


_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32",
    "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors dtype name."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(str(path), "a readable file", error.strerror or str(error)) from None
    except ValueError as error:
        raise InputError(str(path), "a JSON object", str(error)) from None
    if not isinstance(content, dict):
        raise InputError(str(path), "a JSON object", type(content).__name__)
    return content


def size_of(config: dict[str, Any], *keys: str) -> int | None:
    """The first of these keys under which the text model of a config.json has a size."""
    text = config.get("text_config")
    found = (text if isinstance(text, dict) and text else config).get
    return next((n for key in keys if isinstance(n := found(key), int) and not isinstance(n, bool) and n > 0), None)


def inside(directory: Path, file: Any, index: str) -> Path:
    """`directory / file`, if that is a plain name in it. Raises InputError for a path that leads out."""
    if not isinstance(file, str) or not file or Path(file).name != file or file in (".", ".."):
        raise InputError(index, "names of files in the same directory", f"'{file}'", "refused: a path out of it")
    return directory / file


def check_file(path: Path) -> None:
    """Raises InputError for an entry of a checkpoint's directory that is not a regular file inside it.

    A link may lead to a file in the directory, or from a snapshot in the Hub's cache to the blobs of its repository: a link
    that leads elsewhere would put a file of this machine into the artifact. Reading a pipe or a device would hang.
    """
    if not path.name.isprintable():
        raise InputError(str(path.parent), "names of files that can be printed", repr(path.name), "rename the file")
    if not os.path.lexists(path):
        return
    # Path.resolve raises for links in a circle.
    target, own = Path(os.path.realpath(path)), path.parent.resolve()
    places = [own, own.parent.parent / "blobs"] if own.parent.name == "snapshots" else [own]
    if path.is_symlink() and not any(place in target.parents for place in places):
        do = "copy the file itself there, if it belongs to the model"
        raise InputError(str(path), "a file of this directory, or a link to one", "a link out of it", do)
    if path.is_symlink() and not target.exists():
        raise InputError(str(path), "a file", "a link that leads nowhere: the file is missing", "fetch the checkpoint again")
    if not path.is_file():
        raise InputError(str(path), "a file", "a folder" if path.is_dir() else "a pipe, a socket or a device", "take it out")


def open_checkpoint(path: Path, name: str = "", origin: dict[str, Any] | None = None, trusted: bool = False) -> Checkpoint:
    """Opens a directory, or a GGUF file, by its headers. Raises InputError; nothing but headers and JSON is read."""
    if (alone := file_of(path)) is not None:
        if path.is_dir() and alone.parent == path:
            check_file(alone)
        return _open_alone(alone, name, origin or {}, trusted)
    if not path.is_dir():
        raise InputError(str(path), "a directory with config.json and safetensors", "no such directory")
    files = sorted(entry.name for entry in path.iterdir() if not entry.is_dir())
    folders = sorted(f"{entry.name}/" for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if (path / ADAPTER_TENSORS).is_file() and not (path / ADAPTER).is_symlink():
        folders.remove(f"{ADAPTER}/")
        files.append(ADAPTER_TENSORS)
    label = name or path.resolve().name
    return assemble(path, files, folders, lambda file: local_header(path / file), label, origin or {}, trusted)


def _open_alone(file: Path, name: str, origin: dict[str, Any], trusted: bool) -> Checkpoint:
    """A GGUF file that stands alone, with what its metadata means beside it."""
    folder, target = folder_for(file), str(file.resolve())
    files = [*sorted(entry.name for entry in folder.iterdir()), file.name]
    found = assemble(folder, files, [], lambda _: local_header(file), name or file.stem, origin, trusted)
    return replace(found, refs={name: replace(ref, file=target) for name, ref in found.refs.items()})


def assemble(
    path: Path, files: list[str], others: list[str], header: Callable[[str], list[TensorRef]], name: str,
    origin: dict[str, Any], trusted: bool = False,
) -> Checkpoint:  # fmt: skip
    """The checkpoint that `files` make up, checked. Raises InputError.

    JSON is read from `path`; `header` reads the header of a shard, which may lie elsewhere. `others` are not copied.
    """
    for file in files:
        if not file.startswith("."):
            check_file(path / file)
    shards = shard_files(path, [file for file in files if file != CALIBRATION])
    refs: dict[str, TensorRef] = {}
    for file in (*shards, *(file for file in files if file == ADAPTER_TENSORS)):
        for ref in header(file):
            ref = ref if ref.file == file else replace(ref, file=file)
            if ref.name in refs:
                raise InputError(str(path / file), "each tensor once", f"'{ref.name}', also in {refs[ref.name].file}")
            refs[ref.name] = ref
    config_path = path / "config.json"
    if "config.json" not in files:
        raise InputError(str(config_path), "the model's config.json", "no such file")
    side = tuple(f for f in files if f not in _NOT_CARRIED and "/" not in f and not f.startswith(".") and not is_weights(f))
    side += (CALIBRATION,) if CALIBRATION in files else ()
    read = (*shards, CALIBRATION, ADAPTER_TENSORS)
    left = [f for f in files if f.endswith(_PICKLES) or (f.endswith((".safetensors", GGUF)) and f not in read)] + others
    manifest = Manifest.read(path)
    # Without a manifest of ours, files of these names are another tool's.
    left += [file for file in (MANIFEST_FILE, *RECORDS) if file in files and manifest is None]
    checkpoint = Checkpoint(path, refs, read_json(config_path), side, manifest, tuple(left), name, origin, trusted)
    check_index(checkpoint, path, files, set(shards))
    check_records(checkpoint)
    return checkpoint


def is_weights(file: str) -> bool:
    """Whether a file's name says that it holds weights or is an index of them."""
    return file.endswith((".safetensors", ".safetensors.index.json", GGUF, *_PICKLES)) or file.endswith(".index.json")


def shard_files(path: Path, files: list[str]) -> list[str]:
    """The files of the model's weights: safetensors by the index, or the single one; else the single GGUF file."""
    files = [file for file in files if "/" not in file]
    if indexes := [file for file in INDEXES if file in files]:
        index = path / indexes[0]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(str(index), "a weight_map", "none")
        # Each file once; of what is no text there is no set.
        named = {repr(file): file for file in weight_map.values()}
        wanted = sorted({inside(path, file, str(index)).name for file in named.values()})
        missing = [file for file in wanted if file not in files]
        if missing:
            raise InputError(str(index), "every file that it names", f"missing: {', '.join(missing)}", "fetch them")
        if stray := [f for f in wanted if not f.endswith(".safetensors")]:
            raise InputError(str(index), "safetensors files", ", ".join(stray))
        return wanted
    if "model.safetensors" in files:
        return ["model.safetensors"]
    single = [file for file in files if file.endswith(".safetensors")]
    if len(single) == 1:
        return single
    if not single and (ggufs := [file for file in files if file.endswith(GGUF)]):
        if len(ggufs) > 1:
            do = "name the file itself; what llama.cpp has split, `llama-gguf-split --merge` makes whole"
            raise InputError(str(path), "one GGUF file", f"{len(ggufs)}: {', '.join(ggufs[:3])}", do)
        return ggufs
    if not single and (pickles := [file for file in files if file.endswith(_PICKLES)]):
        raise InputError(
            str(path),
            "safetensors",
            f"only {', '.join(pickles[:3])}: a pickle can run code when it is opened, so it is refused",
            "save the model with save_pretrained, which writes safetensors",
        )
    got = f"{len(single)} safetensors files and no index" if single else "no safetensors file"
    raise InputError(str(path), "model.safetensors, or model.safetensors.index.json with its shards", got)


def local_header(path: Path) -> list[TensorRef]:
    """The tensors of one local file. Raises InputError."""
    target = path.resolve()
    if not target.is_file():
        raise InputError(str(path), "a file", "a link that leads nowhere")
    with open(path, "rb") as stream:

        def read(offset: int, length: int) -> bytes:
            stream.seek(offset)
            return stream.read(length)

        return header_of(read, os.fstat(stream.fileno()).st_size, path.name)


def header_of(read: Callable[[int, int], bytes], size_bytes: int, file: str) -> list[TensorRef]:
    """The tensors of a file of weights, by the kind that its name says. Raises InputError."""
    if file.endswith(GGUF):
        return read_gguf(read, size_bytes, file).refs
    return read_header(read, size_bytes, file)[0]


def check_index(checkpoint: Checkpoint, path: Path, files: list[str], shards: set[str]) -> None:
    """Raises InputError unless the index and the shards name the same tensors."""
    indexes = [file for file in INDEXES if file in files]
    if not indexes:
        return
    index = path / indexes[0]
    weight_map = read_json(index)["weight_map"]
    for tensor, file in weight_map.items():
        ref = checkpoint.refs.get(tensor)
        if ref is None or ref.file != file:
            where = f"it is in {ref.file}" if ref else "no shard has it"
            raise InputError(str(index), f"'{tensor}' in {file}", where, "fetch the checkpoint again")
    if extra := sorted({ref.name for ref in checkpoint.refs.values() if ref.file != ADAPTER_TENSORS} - set(weight_map)):
        raise InputError(str(index), "every tensor of its shards", f"{len(extra)} that it does not name: {extra[0]}")


def check_records(checkpoint: Checkpoint) -> None:
    """Raises InputError unless the manifest records the tensors that are there."""
    manifest = checkpoint.manifest
    if manifest is None:
        return
    where = str(checkpoint.path / MANIFEST_FILE)
    if set(manifest.digests) != set(checkpoint.refs):
        odd = sorted(set(manifest.digests) ^ set(checkpoint.refs))
        raise InputError(where, "the tensors of the shards", f"{len(odd)} that differ: {odd[0]}", "make it anew")
    if manifest.format != "canonical":
        return
    for name, record in manifest.weights.items():
        weight = Weight(name, record.dtype, record.shape, transposed=record.transposed)
        for spec in specs(weight, State.parse(record.state)):
            ref = checkpoint.refs.get(spec.name)
            if ref is None or (ref.dtype, ref.shape) != (spec.dtype, spec.shape):
                got = f"{ref.dtype} {list(ref.shape)} in the shards" if ref else "no such tensor"
                raise InputError(where, f"'{spec.name}' of {spec.dtype} {list(spec.shape)}", got, "make it anew")
