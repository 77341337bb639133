"""K-quants through every pass and format: they work, fall back where 256 does not divide, or are refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint.reader import GGUF_FILE, open_checkpoint
from compress.context import Context
from compress.contract.discover import load_pass
from compress.errors import RecipeError, Refusal
from compress.evaluate.verify import verify_bytes
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.numerics.qtensor import specs
from compress.pipeline.resolve import resolve
from compress.spec.gguf_types import TYPES
from compress.spec.recipe import parse_one_liner
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from support import dense_meaning, do, linear, load, logits, ready_inputs, refused, run, tiny_llama

DATA = f"calibrate(data='{ready_inputs()}', samples=6)"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Super-blocks divide the columns of every matrix but those of down_proj, of 288."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "wide", hidden_size=256, intermediate_size=288)


@pytest.mark.parametrize("scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_packed_as_gguf_they_come_back_and_run(scheme: str, wide: Path, tmp_path: Path) -> None:
    done = run(wide, tmp_path / "out", f"quantize.rtn(scheme={scheme}, targets=[linear, embeddings]) | pack(format=gguf)")
    other = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "w5a16g32", "q5_k": "w5a16g32-min", "q6_k": "w8a16g32"}[scheme]
    states = [weight.state for weight in done.manifest.weights.values() if weight.state]
    assert states.count(f"codes({scheme})") == 13
    assert states.count(f"codes({other})") == 2
    assert done.plan.steps[-1].shards[0].nbytes == (tmp_path / "out" / GGUF_FILE).stat().st_size
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())
    run(tmp_path / "out", tmp_path / "codes", "unpack")
    run(tmp_path / "codes", tmp_path / "again", "pack(format=gguf)")
    assert (tmp_path / "again" / GGUF_FILE).read_bytes() == (tmp_path / "out" / GGUF_FILE).read_bytes()
    meant = logits(build(open_checkpoint(tmp_path / "codes")))
    assert torch.equal(meant, logits(build(open_checkpoint(dense_meaning(tmp_path / "codes", tmp_path / "dense")))))
    assert torch.equal(meant, logits(build(open_checkpoint(tmp_path / "out"))))


def test_as_a_file_alone_they_keep_their_codes(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    run(wide, tmp_path / "out", "quantize.rtn(scheme=q4_k) | pack(format=gguf)")
    for name in ("manifest.json", "config.json"):
        (tmp_path / "out" / name).unlink()
    ours, theirs = (DenseView(open_checkpoint(place)) for place in (tmp_path / "out", tmp_path / "out" / GGUF_FILE))
    kinds = [str(packed.scheme) for packed in theirs.foreign.weights.values() if packed.scheme]  # type: ignore[union-attr]
    assert sorted(kinds) == ["q4_k"] * 12 + ["w5a16g32"] * 2
    assert ours.weights.keys() == theirs.weights.keys()


def test_a_plan_tells_what_takes_their_place_and_its_bytes(wide: Path, tmp_path: Path) -> None:
    done = run(wide, tmp_path / "out", "quantize.rtn(scheme=q2_k) | pack(format=gguf)")
    (note,) = [note for note in done.plan.steps[0].notes if note.what == "ragged"]
    assert (note.reason, note.count) == ("288 columns, q2_k became iq4_nl", 2)
    stored = {note.reason: note.count for note in done.plan.steps[1].notes if note.what == "stored"}
    assert stored["q2_k as Q2_K"] == 12
    assert stored["iq4_nl as IQ4_NL"] == 2


def test_the_canonical_form_takes_the_bytes_of_the_blocks() -> None:
    for bits in range(2, 7):
        scheme, weight = Scheme.parse(f"q{bits}_k"), linear((7, 1024))
        own = sum(spec.nbytes for spec in specs(weight, State(scheme)))
        assert own == 7 * 4 * TYPES[f"Q{bits}_K"].nbytes


def test_columns_that_nothing_divides_are_refused(tmp_path: Path) -> None:
    odd = tiny_llama(tmp_path / "m", intermediate_size=88)
    with pytest.raises(compress.CompressError, match=r"groups of 32 .*do not divide 88 columns"):
        run(odd, tmp_path / "out", "quantize.rtn(scheme=q4_k)")


def test_gptq_llm_mq_loftq_and_lorc_take_them(wide: Path, tmp_path: Path) -> None:
    truth = logits(load(wide, dtype=torch.float32))
    made = {
        "rtn": "quantize.rtn(scheme=q2_k)",
        "gptq": f"{DATA} | quantize.gptq(scheme=q2_k, outliers=0.01)",
        "lorc": "quantize.rtn(scheme=q2_k) | quantize.lorc(rank=8)",
        "loftq": "quantize.loftq(scheme=q2_k, rank=8, iterations=1)",
        "llm_mq": f"{DATA} | quantize.llm_mq(schemes=[q2_k, q6_k], bits=4)",
    }
    lost = {}
    for name, recipe in made.items():
        done = do(wide, tmp_path / name, recipe, threads=1)
        assert any(f"({scheme})" in weight.state for weight in done.manifest.weights.values() for scheme in ("q2_k", "q6_k"))
        lost[name] = float((logits(build(open_checkpoint(tmp_path / name))) - truth).norm())
        verify_bytes(open_checkpoint(tmp_path / name), Context())
    assert max(lost["gptq"], lost["lorc"], lost["loftq"], lost["llm_mq"]) < lost["rtn"]


def test_masks_stay_where_the_middle_code_is_zero(wide: Path, tmp_path: Path) -> None:
    pruned = "prune.magnitude(sparsity=2:4, skip=['re:.*down_proj.*'])"
    run(wide, tmp_path / "out", f"{pruned} | quantize.rtn(scheme=q3_k) | pack(format=gguf)")
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())


def test_experts_have_super_blocks_too(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=128, num_key_value_heads=2, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    run(tmp_path / "m", tmp_path / "out", "quantize.rtn(scheme=q4_k, targets=[linear, experts]) | pack(format=gguf)")
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("quantize.rtn(scheme=q4_k) | pack", ("no format of it holds q4_k", "pack(format=gguf)")),
        ("quantize.rtn(scheme=q3_k) | pack", ("no format of it holds q3_k", "pack(format=gguf)")),
        ("quantize.rtn(scheme=q4_k) | pack(format=gptq)", ("not q4_k", "pack(format=gguf)")),
        ("quantize.rtn(scheme=q6_k) | pack(format=awq)", ("not q6_k", "pack(format=gguf)")),
        ("quantize.rtn(scheme=q6_k) | pack(format=mlx)", ("not q6_k", "pack(format=gguf)")),
        ("quantize.rtn(scheme=q2_k) | pack(format=native)", ("scales of one level, and q2_k has two", "pack(format=gguf)")),
        ("prune.magnitude(sparsity=0.5) | quantize.rtn(scheme=q4_k)", ("no code of q4_k need mean zero", "symmetric")),
        ("quantize.rtn(scheme=q4_k, granularity=adaptive)", ("scales of its rows",)),
        (f"{DATA} | quantize.rtn(scheme=q4_k) | distill.logits(batch=6)", ("q4_k binds scales to", "none can be moved")),
    ],
)  # fmt: skip
def test_what_cannot_hold_them_says_so_before_a_byte_moves(
    recipe: str, said: tuple[str, ...], wide: Path, tmp_path: Path
) -> None:
    refused(wide, tmp_path / "out", recipe, said)


def test_gptq_of_a_conv1d_is_refused() -> None:
    gptq = load_pass("quantize.gptq").model_validate({"scheme": "q4_k"})
    with pytest.raises(Refusal, match="fits no super-blocks of q4_k"):
        gptq.becomes(linear((256, 512), transposed=True), State())


def test_moqe_takes_plain_integers_alone() -> None:
    with pytest.raises(RecipeError, match="symmetric integers and a16, not q4_k"):
        resolve(parse_one_liner("quantize.moqe(scheme=q4_k)"))
