"""quantize.kv: scales are those of transformers' own cache, rounding is E4M3's, and what a model then loses is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from compress.checkpoint.reader import open_checkpoint
from compress.checkpoint.writer import Writer
from compress.contract.discover import load_pass
from compress.errors import CoverageError, FormatError, InputError, RecipeError
from compress.evaluate.perplexity_kl import compare
from compress.layerwise.model import build as runnable
from compress.numerics.inputs import cache_scale, in_cache
from compress.runtime.artifact import load as packed_model
from families import build
from forked import compress
from support import do, load, ready_inputs, step_of, tiny_llama, tree

TOKENS = f"calibrate(data='{ready_inputs()}', samples=6)"
HEAD = "quantize.kv(granularity=head)"
ATTENTION = "model.layers.0.self_attn"


def scales(folder: Path) -> dict[str, torch.Tensor]:
    """The scales of a checkpoint by name."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.refs if name.endswith(("k_scale", "v_scale"))}


def kept(source: Path, batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values) [samples, heads, tokens, width] of each layer that keeps any, in transformers' own cache."""
    with torch.no_grad():
        cache = load(source, dtype=torch.float32)(**batch, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers if hasattr(layer, "keys")]


class Rounding(DynamicCache):
    """transformers' cache, which keeps values of E4M3: the nearest of all its codes, scaled."""

    def __init__(self, k: list[torch.Tensor], v: list[torch.Tensor]) -> None:
        super().__init__()
        self.k, self.v = k, v

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **rest: Any) -> Any:
        return super().update(nearest(keys, self.k[layer_idx]), nearest(values, self.v[layer_idx]), layer_idx, **rest)


def nearest(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each number as the nearest finite value of E4M3; of two as near, the one with an even code."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).float()
    codes, table = codes[table.isfinite()], table[table.isfinite()]
    order = (codes % 2).argsort(stable=True)
    table, s = table[order], scale.float()
    return table[((x / s)[..., None] - table).abs().argmin(-1)] * s


def test_scales_are_largest_magnitudes_in_the_cache(tmp_path: Path) -> None:
    """Of keys after their rotary positions (and norms), whatever the family calls its weights."""
    batch = load_file(ready_inputs())
    for name in ("llama", "qwen3", "gemma3", "phi3", "mixtral", "olmo_hybrid"):
        source = build(name, tmp_path)
        there = kept(source, batch)
        one = scales(do(source, tmp_path / f"{name}-tensor", f"{TOKENS} | quantize.kv").out)
        each = scales(do(source, tmp_path / f"{name}-head", f"{TOKENS} | {HEAD}").out)
        assert len(one) == len(each) == 2 * len(there), name
        for (key, scale), (_, by_head), x in zip(one.items(), each.items(), (x for pair in there for x in pair), strict=True):
            peaks = x.abs().amax((0, 2, 3))
            assert (scale.dtype, scale.shape, by_head.shape) == (torch.bfloat16, (1,), (len(peaks), 1, 1)), key
            assert torch.allclose(by_head.float().flatten() * 448, peaks, rtol=2**-8), key
            assert torch.equal(scale, by_head.amax().view(1)), key


def test_tokens_of_padding_do_not_count(tiny: Path, tmp_path: Path) -> None:
    ids = load_file(ready_inputs())["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "padded.safetensors")
    result = do(tiny, tmp_path / "out", f"calibrate(data='{tmp_path / 'padded.safetensors'}', samples=6) | {HEAD}")
    keys, values = kept(tiny, {"input_ids": ids[:, :20]})[1]
    for name, x in (("k_scale", keys), ("v_scale", values)):
        found = scales(result.out)[f"model.layers.1.self_attn.{name}"].float().flatten()
        assert torch.allclose(found * 448, x.abs().amax((0, 2, 3)), rtol=2**-8)


def test_rounding_is_that_of_e4m3_and_of_the_reader() -> None:
    x = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-6, 1, 8)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, 448.0, 449.0, 464.0, 1e6, -1e6, 2.0**-10])
    for scale in (torch.tensor([0.5]), torch.tensor([[[0.01]], [[1.0]], [[3.0]]])):
        assert torch.equal(in_cache(x, scale), nearest(x, scale))
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    for dtype in (torch.float32, torch.bfloat16):
        for scale, strategy in ((torch.tensor([0.013]), "tensor"), (torch.rand(3, 1, 1) + 0.01, "attn_head")):
            args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy)
            read = fake_quantize(x.to(dtype), scale.to(dtype), None, args)
            assert torch.equal(in_cache(x.to(dtype), scale.to(dtype)), read), (dtype, strategy)


def test_a_head_without_magnitudes_divides_by_nothing() -> None:
    assert cache_scale(torch.tensor([0.0, 448.0]), torch.bfloat16).tolist() == [1.0, 1.0]
    assert cache_scale(torch.tensor([1e-9]), torch.float16).tolist() == [1.0]


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention decides: a random one spreads it evenly, and rounding costs it next to nothing."""
    folder = tiny_llama(tmp_path_factory.mktemp("sharp") / "llama")
    tensors = load_file(folder / "model.safetensors")
    times = {"q_proj": 8, "k_proj": 8, "v_proj": 4, "o_proj": 4, "lm_head": 8}
    made = {name: tensor * next((n for word, n in times.items() if word in name), 1) for name, tensor in tensors.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("recipe", ["quantize.kv", f"quantize.rtn(scheme=w4a16g32) | {HEAD} | pack"])
def test_what_eval_measures_is_what_a_rounding_cache_costs(recipe: str, sharp: Path, tmp_path: Path) -> None:
    """KL of logits in fp32 that transformers computes with a cache of our values; for a kept step as for an artifact."""
    out = do(sharp, tmp_path / "out", f"{TOKENS} | {recipe}").out
    ids = torch.randint(3, 128, (3, 32), generator=torch.Generator().manual_seed(1))
    found = compare(open_checkpoint(sharp), open_checkpoint(out), ids)
    weights = runnable(open_checkpoint(out), cache=False)
    k, v = ([scale for name, scale in scales(out).items() if name.endswith(which)] for which in ("k_scale", "v_scale"))
    with torch.no_grad():
        p = load(sharp, dtype=torch.float32)(ids).logits.double().log_softmax(-1)
        rounded = weights(ids, past_key_values=Rounding(k, v), use_cache=True).logits.double().log_softmax(-1)
        plain = weights(ids).logits.double().log_softmax(-1)
        ours = runnable(open_checkpoint(out))(ids).logits.double().log_softmax(-1)

    def divergence(q: torch.Tensor) -> float:
        return float((p.exp() * (p - q))[:, :-1].sum(-1).mean())

    assert torch.allclose(rounded, ours, atol=1e-6)
    assert found.kl.value == pytest.approx(divergence(rounded), rel=1e-3)
    assert found.kl.value != pytest.approx(divergence(plain), rel=1e-3)
    assert found.protocol.endswith(", keys and values rounded to FP8 by the artifact's scales")


def test_text_is_continued_with_rounded_keys(tiny: Path, tmp_path: Path) -> None:
    """Token by token, from a cache, as in one forward of the whole text."""
    model = runnable(open_checkpoint(do(tiny, tmp_path / "out", f"{TOKENS} | {HEAD}").out))
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        steps = [model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(12)]
    assert cache.get_seq_length() == 12
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_it_goes_with_codes_into_one_artifact(tiny: Path, tmp_path: Path) -> None:
    coded = "quantize.gptq(scheme=w4a16g32, ragged=divide)"
    plain = do(tiny, tmp_path / "plain", f"{TOKENS} | {coded} | pack").out
    result = do(tiny, tmp_path / "out", f"{TOKENS} | {coded} | {HEAD} | pack")
    tensors, others = load_file(result.out / "model.safetensors"), load_file(plain / "model.safetensors")
    assert tensors.keys() - others.keys() == scales(result.out).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in others.items())
    config = json.loads((result.out / "config.json").read_text())["quantization_config"]
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "attn_head", "dynamic": False}
    assert config == {
        **json.loads((plain / "config.json").read_text())["quantization_config"], "kv_cache_scheme": scheme,
    }  # fmt: skip
    told = {(note.what, note.count) for note in result.manifest.notes}
    assert {("kv cache", 4), ("not read", 4)} <= told
    verdicts = {verdict.reader: verdict.reason for verdict in result.plan.verdicts}
    assert "5.24 leaves their scales unread" in verdicts["transformers"]
    assert "keeps keys and values in FP8 with FlashAttention" in verdicts["vllm"]
    # A kept step can be packed later; what was packed goes back, and is run packed, with its scales.
    later = do(step_of(result.out, "quantize.kv"), tmp_path / "later", "pack").out
    assert (later / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()
    back = do(result.out, tmp_path / "back", "unpack(to=dense)").out
    assert all(torch.equal(scale, scales(back)[name]) for name, scale in scales(result.out).items())
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = packed_model(result.out, "float32", backend="reference", repack=True)(ids).logits
        ours, plain = (runnable(open_checkpoint(result.out), rounded=False, cache=cache)(ids).logits for cache in (True, False))
    assert torch.allclose(packed, ours, atol=1e-5)
    assert not torch.allclose(packed, plain, atol=1e-5)


def test_it_goes_alone_into_an_artifact(tiny: Path, tmp_path: Path) -> None:
    out = do(tiny, tmp_path / "out", f"{TOKENS} | quantize.kv | pack").out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["config_groups"], config["format"], config["kv_cache_scheme"]["strategy"]) == ({}, "dense", "tensor")
    found = compress("verify", out, "--json")
    assert (found.returncode, json.loads(found.stdout)["bytes"]["tensors"]) == (0, len(load_file(out / "model.safetensors")))


def test_a_killed_run_measures_only_what_it_has_not_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    recipe, made, record = f"{TOKENS} | {HEAD}", [], Writer.record
    whole = tree(do(tiny, tmp_path / "whole", recipe).out)

    def dies(self: Writer, weight: str, *rest: Any) -> None:
        if weight == "model.layers.1.self_attn.k_scale":
            raise KeyboardInterrupt
        record(self, weight, *rest)

    monkeypatch.setattr(Writer, "record", dies)
    with pytest.raises(KeyboardInterrupt):
        do(tiny, tmp_path / "out", recipe)
    monkeypatch.setattr(Writer, "record", record)
    kind = load_pass("quantize.kv")
    scale = kind.scale
    monkeypatch.setattr(kind, "scale", lambda *given: made.append(given) or scale(*given))
    assert tree(do(tiny, tmp_path / "out", recipe).out) == whole
    assert len(made) == 2


def test_processes_find_the_same_scales(tiny: Path, tmp_path: Path) -> None:
    recipe = f"{TOKENS} | {HEAD}"
    for ranks in (1, 2):
        found = compress("run", tiny, tmp_path / f"{ranks}", "-p", recipe, "--dtype", "float32", "--threads", "1", ranks=ranks)
        assert found.returncode == 0, found.stderr
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v3", "DeepseekV3Attention (multi-head latent attention) keeps one latent vector instead of them"),
        ("gpt2", "GPT2Attention has neither k_proj nor qkv_proj, by which readers know attention"),
        ("t5", "an encoder-decoder keeps those of two texts"),
        ("mamba2", "no layer of it keeps keys and values"),
    ],
)
def test_models_without_keys_and_values_to_scale_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CoverageError) as error:
        do(build(name, tmp_path), tmp_path / "out", f"{TOKENS} | quantize.kv")
    assert error.value.problems[0].got == reason


def test_layers_that_keep_no_keys_are_counted(tmp_path: Path) -> None:
    notes = do(build("olmo_hybrid", tmp_path), tmp_path / "out", f"{TOKENS} | quantize.kv").manifest.notes
    told = {note.what: (note.count, note.names) for note in notes if "kv cache" in note.what}
    assert told["kv cache"][0] == 2
    assert told["no kv cache"] == (3, ("decoder block 0", "decoder block 1", "decoder block 2"))


@pytest.mark.parametrize("fmt", ["gptq", "awq", "native", "gguf", "mlx", "peft"])
def test_other_formats_refuse_the_scales(fmt: str, tiny: Path, tmp_path: Path) -> None:
    recipe = f"{TOKENS} | quantize.rtn(scheme=w4a16g32, ragged=divide) | quantize.kv | pack(format={fmt})"
    with pytest.raises(FormatError, match=f"no reader of {fmt} takes scales of keys and values"):
        do(tiny, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_it_is_the_last_pass_before_pack(tiny: Path, tmp_path: Path) -> None:
    for after in ("quantize.rtn(scheme=w4a16g32)", "quantize.kv"):
        found = compress("plan", tiny, "-p", f"{TOKENS} | quantize.kv | {after}")
        assert (found.returncode, found.stdout) == (2, "")
        assert "expected: quantize.kv after every pass that changes weights, and once" in found.stderr
        assert "do:       move quantize.kv behind it" in found.stderr
    out = do(tiny, tmp_path / "out", f"{TOKENS} | quantize.kv").out
    with pytest.raises(RecipeError, match="measured with its weights as they are"):
        do(out, tmp_path / "again", "quantize.rtn(scheme=w4a16g32)")
    with pytest.raises(RecipeError, match="calibration tokens"):
        do(tiny, tmp_path / "none", "quantize.kv")


def test_a_plan_tells_layers_and_sizes(tiny: Path) -> None:
    found = compress("plan", tiny, "-p", f"{TOKENS} | {HEAD} | pack", "--layers")
    assert found.returncode == 0, found.stderr
    rule = "scale = largest magnitude on the calibration tokens / 448"
    assert f"kv cache: 4 (keys and values in FP8, {rule}; a token takes 128 bytes of cache instead of 256)" in found.stdout
    assert "no kv cache" not in found.stdout
    assert f"{ATTENTION}.k_scale" in found.stdout
    assert "5.24 leaves their scales unread" in found.stdout


@pytest.mark.parametrize(
    ("name", "tensor", "wrong"),
    [
        (f"{ATTENTION}.k_scale", torch.tensor([0.0]), "positive"),
        (f"{ATTENTION}.k_scale", torch.tensor([float("nan")]), "positive"),
        (f"{ATTENTION}.v_scale", torch.ones(3, 1, 1), "2 heads"),
        (f"{ATTENTION}.v_scale", None, "a scale of keys and one of values"),
    ],
)
def test_scales_that_cannot_be_used_are_told(
    name: str, tensor: torch.Tensor | None, wrong: str, tiny: Path, tmp_path: Path
) -> None:
    out = do(tiny, tmp_path / "out", f"{TOKENS} | quantize.kv").out
    (out / "manifest.json").unlink()
    tensors = load_file(out / "model.safetensors")
    tensors.pop(name)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=wrong):
        runnable(open_checkpoint(out))
    found = compress("verify", out)
    if tensor is not None and not bool((tensor > 0).all()):
        assert found.returncode in (3, 5)
        assert "expected: " + ("positive scales" if bool(tensor.isfinite()) else "finite numbers") in found.stderr


@pytest.mark.slow
def test_transformers_is_told_not_to_read_them(tiny: Path, tmp_path: Path) -> None:
    """What it leaves out is a note; the logits that it is compared with are then those of keys as they are."""
    out = do(tiny, tmp_path / "out", f"{TOKENS} | quantize.rtn(scheme=w4a16g32) | quantize.kv | pack").out
    found = compress("verify", out, "--reader", "transformers", "--dtype", "float32", "--json")
    assert found.returncode == 0, found.stderr
    (reading,) = json.loads(found.stdout)["readers"]
    assert reading["equal"]
