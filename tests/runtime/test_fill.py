"""Packed models at work: experts in one product, other tools' artifacts, device maps, adapters, compiled and exported."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import compress
from compress.architecture.experts import INPUT, MIDDLE, OUTPUT, Routed
from compress.architecture.weight_map import meta_model
from compress.checkpoint.reader import open_checkpoint
from compress.errors import InputError, UsageError
from compress.hf import CompressConfig, CompressQuantizer
from compress.kernels.dispatch import Backend
from compress.kernels.native.modules import DenseWeight, PackedExperts, PackedWeight, Stack
from compress.kernels.native.packed import Packed, pack
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.numerics.rounding import nearest
from compress.runtime import artifact, fuse_experts
from compress.runtime.device_map import where
from compress.runtime.fill import PackedWeights
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from families import build as build_family
from support import load as load_dense
from support import logits, run

Source = Callable[[str], Path]
NATIVE = "pack(format=native)"
MIXED = (
    "quantize.rtn(scheme=w2a16g32, targets='re:.*experts\\.[01]\\.w[12].*')"
    " | quantize.rtn(scheme=nf4g32, targets='re:.*experts\\.2.*')"
)
"""Experts of three kinds, the fourth of them dense, and a part of the first two."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build_family(name, folder)


@pytest.fixture(scope="module")
def packed(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder, made = tmp_path_factory.mktemp("packed"), dict[tuple[str, str], Path]()

    def make(name: str, recipe: str = "quantize.rtn(scheme=w4a16g32)") -> Path:
        if (name, recipe) not in made:
            made[name, recipe] = folder / str(len(made))
            run(source(name), made[name, recipe], f"{recipe} | {NATIVE}")
        return made[name, recipe]

    return make


def meant(directory: Path) -> torch.Tensor:
    """Logits of what a directory means, in fp32."""
    return logits(build(open_checkpoint(directory), rounded=False))


# Experts


def stack_of(text: str, experts: int = 4, rows: int = 48, columns: int = 128) -> tuple[torch.Tensor, Packed]:
    scheme = Scheme.parse(text)
    q = nearest(torch.randn(experts, rows, columns).bfloat16(), scheme, torch.bfloat16).q
    return q.dequantize(), Packed(State(scheme), rows, columns, pack(q))


def slowly(x: torch.Tensor, dense: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Each row by the matrix of its expert."""
    ends = offsets.tolist()
    return torch.stack(
        [row @ dense[next(e for e in range(len(dense)) if ends[e] <= i < ends[e + 1])].T for i, row in enumerate(x)]
    )


@pytest.mark.parametrize("text", ["w4a16g32", "w3a16g32-asym", "fp8-tensor", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_for_experts_under_torchs_own_checks(text: str, dtype: torch.dtype) -> None:
    dense, stack = stack_of(text)
    weight = PackedWeight(stack, dtype)
    x = torch.randn(9, 128, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    torch.library.opcheck(torch.ops.compress.packed_experts.default, (x, offsets, *weight.arguments()))
    gradient = torch.randn(9, 48, dtype=dtype)
    torch.library.opcheck(torch.ops.compress.packed_experts_gradient.default, (gradient, offsets, *weight.arguments()))
    out = weight.grouped(x, offsets)
    out.backward(gradient)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    exact = slowly(x.detach().double(), dense.double(), offsets)
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()
    exact = slowly(gradient.double(), dense.double().mT, offsets)
    assert x.grad is not None
    assert (x.grad - exact).abs().max() <= tolerance * exact.abs().max()
    assert weight.grouped(x[:0], offsets * 0).shape == (0, 48)
    # Rows that are no expert's of this stack have no part in it.
    part = weight.grouped(x, torch.tensor([2, 3, 5, 5, 6], dtype=torch.int32))
    torch.testing.assert_close(part[2:3], linear(x[2:3], dense[0].to(dtype)), rtol=2e-2, atol=0.2)


def test_rows_are_looked_up_under_torchs_own_checks() -> None:
    dense, stack = stack_of("w3a16g32-asym", 1)
    weight = PackedWeight(stack.expert(0), torch.bfloat16)
    ids = torch.tensor([[3, 47], [0, 3]])
    torch.library.opcheck(torch.ops.compress.packed_rows.default, (ids, torch.bfloat16, *weight.arguments()))
    assert torch.equal(weight.lookup(ids), dense[0][ids].bfloat16())


def test_inputs_may_be_none_or_lie_apart() -> None:
    dense, stack = stack_of("w4a16g32")
    for dtype in (torch.float32, torch.bfloat16):
        weight = PackedWeight(stack.expert(1), dtype)
        x = torch.randn(128, 2, 5, dtype=dtype).mT.transpose(0, 2).requires_grad_()
        torch.testing.assert_close(weight.linear(x), linear(x, dense[1].to(dtype)), rtol=2e-2, atol=0.2)
        none = torch.empty(3, 0, 128, dtype=dtype, requires_grad=True)
        weight.linear(none).sum().backward()
        assert none.grad is not None
        assert none.grad.shape == none.shape


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_experts_of_several_kinds_in_any_order(order: tuple[int, ...]) -> None:
    """The parameter of five experts whose kinds are dealt out in this order."""
    kinds = [order[0], order[1], order[0], order[2], order[1]]
    dense = {0: torch.randn(5, 32, 128)}
    dense[1], stack = stack_of("w4a16g32", 5, 32)
    dense[2], other = stack_of("nf4g32", 5, 32)

    def made(kind: int, members: list[int]) -> torch.nn.Module:
        if not kind:
            return DenseWeight(dense[0][members])
        whole = (stack, other)[kind - 1]
        return PackedWeight(Stack(len(members), lambda number: whole.expert(members[number])), torch.float32)

    told = {
        str(kind): fuse_experts.Kind(State(Scheme.parse(f"w{kind}a16")) if kind > 1 else None, 32, 128, kind) for kind in range(3)
    }
    stacks, places = fuse_experts.stacks([[(str(kind), e)] for e, kind in enumerate(kinds)], told.__getitem__)
    weights = [made(int(matrices[0][0][0]), [int(piece[1] or 0) for (piece,) in matrices]) for matrices in stacks]
    module = PackedExperts()
    module.awaited, module.stand_in = {"w": torch.empty(0)}, torch.empty(0)
    module.fill_experts("w", weights, places, False, torch.device("cpu"))
    x = torch.randn(12, 128, requires_grad=True)
    offsets = torch.tensor([0, 2, 5, 5, 9, 12], dtype=torch.int32)
    dense_view = torch.stack([dense[kind][e] for e, kind in enumerate(kinds)])
    found, wanted = module.product("w", x, offsets), slowly(x, dense_view, offsets)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, wanted)), rtol=1e-4, atol=1e-4)
    assert torch.equal(module.expanded("w"), dense_view)


def test_a_projection_is_one_product(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of all experts, which lie on disk each by itself, and down: two products a block, whatever the tokens."""
    directory, calls = packed("mixtral"), list[int]()
    model = compress.load(directory, "float32")
    straight = Backend.grouped

    def counted(self: Backend, x: torch.Tensor, weight: Packed, offsets: torch.Tensor) -> torch.Tensor:
        calls.append(weight.rows)
        return straight(self, x, weight, offsets)

    monkeypatch.setattr(Backend, "grouped", counted)
    assert torch.equal(logits(model), meant(directory))
    assert calls == [192, 64] * 2
    assert [len(w) for w in model.get_submodule("model.layers.0.mlp.experts").packed_weights.values()] == [1, 1]


@pytest.mark.parametrize(
    ("recipe", "stacks"),
    [
        ("quantize.rtn(scheme=nvfp4)", 2),
        ("quantize.rtn(scheme=fp8-tensor)", 2),
        ("quantize.rtn(scheme=w4a16g32, outliers=0.01)", 2),
        ("quantize.rtn(scheme=w4a16g32, targets='re:.*w2.*')", 0),
        (MIXED, 4),
    ],
)
def test_parts_that_cannot_be_one_matrix_are_stacks(recipe: str, stacks: int, packed: Any, caplog: Any) -> None:
    directory = packed("mixtral", recipe)
    with caplog.at_level(logging.INFO, "compress"):
        model = compress.load(directory, "float32")
    assert torch.equal(logits(model), meant(directory))
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert len(experts.packed_weights["gate_up_proj"] if stacks else []) == stacks
    said = [record.message for record in caplog.records if "multiplied by one kind after" in record.message]
    assert said == (["4 stacks, such as model.layers.0.mlp.experts.gate_up_proj: experts of 3 kinds, which are multiplied by one kind after the other"] if recipe == MIXED else [])  # fmt: skip


def test_a_listener_hears_packed_experts(packed: Any) -> None:
    model = compress.load(packed("mixtral"), "float32")
    experts, heard = model.get_submodule("model.layers.0.mlp.experts"), list[tuple[str, Routed]]()
    experts.listener = lambda which, routed: heard.append((which, routed))
    logits(model)
    assert [which for which, _ in heard] == [INPUT, MIDDLE, OUTPUT]
    assert heard[0][1].offsets[-1] == len(heard[0][1].tokens) == 2 * 24 * 2


# Artifacts of other tools


def second_version(directory: Path) -> None:
    """Makes a GPTQ directory one of version 2, whose zero points are stored as they are."""
    tensors = load_file(directory / "model.safetensors")
    for name, zeros in tensors.items():
        if name.endswith(".qzeros"):
            tensors[name] = zeros + 0x11111111
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = config["quantization_config"]["format"] = "gptq_v2"
    (directory / "config.json").write_text(json.dumps(config))
    for file in ("manifest.json", "quantize_config.json"):
        (directory / file).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", "quantize.rtn(scheme=w4a16g32) | pack(format=gptq)"),
        ("llama", "quantize.rtn(scheme=w4a16g32-asym, least_zero=1) | pack(format=gptq)"),
        ("mixtral", "quantize.rtn(scheme=w4a16g32) | pack(format=gptq)"),
        ("llama", "quantize.rtn(scheme=w4a16g32-asym) | pack(format=awq)"),
        ("llama", "quantize.rtn(scheme=w4a16g32) | pack(format=compressed-tensors)"),
        ("llama", "quantize.rtn(scheme=w4a8g32) | pack(format=compressed-tensors)"),
        ("llama", "quantize.rtn(scheme=fp8) | pack(format=compressed-tensors)"),
        ("llama", "quantize.rtn(scheme=nvfp4) | pack(format=compressed-tensors)"),
        ("llama", "quantize.rtn(scheme=mxfp4) | pack(format=compressed-tensors)"),
        ("tied", "quantize.rtn(scheme=w3a16g32, targets=[linear, embeddings])"),
        ("gpt_oss", "quantize.rtn(scheme=nf4g32)"),
        ("llama", "prune.magnitude(sparsity=2:4) | quantize.rtn(scheme=w4a16g32)"),
    ],
)
def test_other_artifacts_are_packed_while_they_load(name: str, recipe: str, source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", recipe)
    model = compress.load(tmp_path / "out", "float32", repack=True)
    torch.testing.assert_close(
        logits(model), meant(tmp_path / "out"), rtol=0, atol=5e-6 if name == "gpt_oss" or "a8" in recipe else 0
    )
    assert sum(artifact.backends(model).values()) == len(DenseView(open_checkpoint(tmp_path / "out")).weights)
    if "compressed-tensors" in recipe and "fp4" not in recipe:
        torch.testing.assert_close(logits(load_dense(tmp_path / "out", dtype=torch.float32)), logits(model), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="packed while they were read"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(UsageError, match="parts of the model on disk"):
        compress.load(tmp_path / "out", device=ONE_EACH, repack=True)
    with pytest.raises(InputError, match="repack=True"):
        compress.load(tmp_path / "out")


def test_gptq_of_version_2_means_the_same(source: Source, tmp_path: Path) -> None:
    run(source("llama"), tmp_path / "out", "quantize.rtn(scheme=w4a16g32-asym, least_zero=1) | pack(format=gptq)")
    first = logits(compress.load(tmp_path / "out", "float32", repack=True))
    second_version(tmp_path / "out")
    assert torch.equal(logits(compress.load(tmp_path / "out", "float32", repack=True)), first)


def test_an_artifact_of_ours_is_loaded_as_it_is(packed: Any) -> None:
    directory = packed("llama")
    assert torch.equal(logits(compress.load(directory, "float32", repack=True)), meant(directory))


def test_what_cannot_be_packed_stays_dense_and_is_counted(source: Source, tmp_path: Path, caplog: Any) -> None:
    recipe = "quantize.rtn(scheme=w4a16g24, skip=attention, ragged=channel) | quantize.rtn(scheme=w4a16g32, targets=attention)"
    run(source("llama"), tmp_path / "out", recipe)
    model = compress.load(tmp_path / "out", "float32", repack=True)
    assert sum(artifact.backends(model).values()) == 12
    torch.testing.assert_close(logits(model), meant(tmp_path / "out"), rtol=0, atol=1e-5)
    (said,) = [record.message for record in caplog.records if record.name == "compress"]
    assert said.startswith("dense: 2 weights, such as model.layers.0.mlp.down_proj.weight: kernels read groups of 16")


# Devices

ONE_EACH = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "lm_head": "disk",
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "tied", "mixtral"])
def test_device_maps_and_offloading(name: str, packed: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    recipe = MIXED if name == "mixtral" else "quantize.rtn(scheme=w4a16g32, targets=[linear, embeddings])"
    directory = packed(name, recipe)
    wanted = logits(compress.load(directory, "float32"))

    def held(model: torch.nn.Module) -> int:
        return sum(
            b.nbytes for part in model.modules() if isinstance(part, PackedWeight) for b in part.buffers() if not b.is_meta
        )

    everything = held(compress.load(directory, "float32"))
    for devices in ("auto", "balanced", {"": "cpu"}, ONE_EACH):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, device_map=devices, offload_folder=str(tmp_path / "off")
        )
        assert torch.equal(logits(model), wanted)
        assert torch.equal(logits(model), wanted)
        assert (0.3 * everything < held(model) < 0.7 * everything) if devices is ONE_EACH else held(model) == everything
    model = accelerate.cpu_offload(compress.load(directory, "float32"), torch.device("cpu"), offload_buffers=True)
    assert not held(model)
    assert torch.equal(logits(model), wanted)
    model = compress.load(directory, "float32")
    model = accelerate.dispatch_model(model, ONE_EACH, offload_dir=str(tmp_path / "out"), offload_buffers=True)
    assert held(model) < 0.7 * everything
    assert torch.equal(logits(model), wanted)


def test_devices_are_dealt_out_by_packed_sizes(packed: Any) -> None:
    from transformers.integrations.accelerate import compute_module_sizes

    for name in ("tied", "mixtral"):
        model: Any = meta_model(open_checkpoint(packed(name)))
        PackedWeights(model, open_checkpoint(packed(name)), torch.float32)
        sizes, _ = compute_module_sizes(model, CompressQuantizer(CompressConfig()))
        loaded = compress.load(packed(name), "float32")
        for path in ("", "model.layers.0", "model.layers.1.mlp"):
            part = loaded.get_submodule(path)
            assert sizes[path] == sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    room = {"cpu": int(sizes[""] - sizes["model.layers.1"] / 2)}
    model = AutoModelForCausalLM.from_pretrained(packed("mixtral"), dtype=torch.float32, device_map="auto", max_memory=room)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(model), logits(loaded))


def test_where_a_weight_is_used_and_kept() -> None:
    class Hook:
        execution_device = "cuda:1"

    class Model:
        _hf_hook = Hook()
        hf_device_map = {"a": "cuda:1", "a.b": "cpu", "c": "disk", "d": "cuda:0"}

    found = {path: where(Model(), path) for path in ("a.x.y", "a.b.c", "c", "d.e", "z")}
    assert {path: (str(place.device), place.kept, str(place.first)) for path, place in found.items()} == {
        "a.x.y": ("cuda:1", "", "cuda:1"), "a.b.c": ("cuda:1", "cpu", "cpu"), "c": ("cuda:1", "disk", "cpu"),
        "d.e": ("cuda:0", "", "cuda:0"), "z": ("cuda:1", "", "cuda:1"),
    }  # fmt: skip


def test_another_device_has_another_backend() -> None:
    dense, stack = stack_of("w4a16g32")
    for weight in (PackedWeight(stack.expert(0), torch.float32, backend="reference"), PackedWeight(stack, torch.float32)):
        # As if it had been loaded elsewhere.
        weight.device, weight.asked = "elsewhere", None
        assert weight.to("cpu").device == "cpu"
        assert weight.backend == "cpu"
        assert torch.equal(weight.dense(None if weight.work.experts is None else 0), dense[0])
    weight = PackedWeight(stack.expert(0), torch.bfloat16, backend="int4pack")
    weight.device = "elsewhere"
    with pytest.raises(UsageError, match=r"in the order of int4pack.*\n.*device='cpu'"):
        weight.to("cpu")


# Copies and saving


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_that_has_run_is_copied(name: str, packed: Any) -> None:
    model = compress.load(packed(name), "bfloat16")
    before = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    for module in other.modules():
        for part in module._buffers.values() if isinstance(module, PackedWeight) else ():
            part.zero_()  # type: ignore[union-attr]
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["llama", "tied", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_saved_bit_for_bit(name: str, dtype: str, packed: Any, tmp_path: Path) -> None:
    directory = packed(name, MIXED if name == "mixtral" else "quantize.rtn(scheme=w4a16g32)")
    model = compress.load(directory, dtype)
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    first, again = open_checkpoint(directory), open_checkpoint(tmp_path / "again")
    assert first.config["quantization_config"] == again.config["quantization_config"]
    assert set(first.refs) == set(again.refs)
    for tensor in DenseView(first).weights:
        assert all(torch.equal(first.read(n).view(torch.uint8), again.read(n).view(torch.uint8)) for n in first.refs if n.startswith(f"{tensor}."))  # fmt: skip
    assert torch.equal(logits(compress.load(tmp_path / "again", dtype)), logits(model))


def test_what_is_trained_beside_packed_weights_is_saved(packed: Any, tmp_path: Path) -> None:
    model: Any = compress.load(packed("llama"), "float32")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(compress.load(tmp_path / "again", "float32")), logits(model))
    assert not torch.equal(logits(model), meant(packed("llama")))


# Adapters


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_adapters_are_trained_saved_and_not_merged(name: str, packed: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(compress.load(packed(name), "float32"))
    targets = ["q_proj", "v_proj", *(["down_proj"] if name == "llama" else [])]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    before = {n: t.clone() for n, t in (*adapted.named_buffers(), *adapted.named_parameters()) if "lora" not in n}
    ids = torch.randint(3, 128, (4, 16))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not [n for n, p in adapted.named_parameters() if p.grad is not None and "lora" not in n]
    assert all(torch.equal(t, before[n]) for n, t in (*adapted.named_buffers(), *adapted.named_parameters()) if "lora" not in n)
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(compress.load(packed(name), "float32"), tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter, lambda: adapted.merge_adapter(safe_merge=True)):
        with pytest.raises(UsageError, match="keep the adapter beside it"):
            merge()


# Compiled and exported


@pytest.mark.parametrize(
    ("name", "recipe", "dtype"),
    [
        ("llama", "quantize.rtn(scheme=w4a16g32)", "bfloat16"),
        ("mixtral", MIXED, "float32"),
        ("tied", "quantize.rtn(scheme=w4a8g32)", "float32"),
        ("mixtral", "quantize.rtn(scheme=w3a16g32-asym)", "float32"),
    ],
)
@pytest.mark.slow
@torch.no_grad()
def test_a_whole_model_is_one_graph(name: str, recipe: str, dtype: str, packed: Any) -> None:
    model: Any = compress.load(packed(name, recipe), dtype)
    ids = torch.randint(3, 128, (2, 12))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = {"input_ids": {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", min=2, max=60)}, "use_cache": None}
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=sizes, strict=False).module()
    for some in (ids, ids[:1, :5]):
        wanted = model(input_ids=some, use_cache=False).logits
        assert torch.equal(exported(input_ids=some, use_cache=False).logits, wanted)
        assert torch.equal(compiled(input_ids=some, use_cache=False).logits, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_text_is_generated_by_compiled_code(name: str, packed: Any) -> None:
    model: Any = compress.load(packed(name), "float32")
    ids = torch.randint(3, 128, (1, 5))
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), wanted)


def test_a_plan_that_splits_weights_is_refused(packed: Any, tmp_path: Path) -> None:
    model: Any = meta_model(open_checkpoint(packed("llama")))
    model.config.distributed_config = object()
    with pytest.raises(UsageError, match="whole weights on each device"):
        CompressQuantizer(CompressConfig())._process_model_before_weight_loading(model, checkpoint_files=["x"])
