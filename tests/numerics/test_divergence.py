"""Divergences against their definitions in fp64, and the properties that a distillation loss must have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from compress.numerics import divergence as module
from compress.numerics.divergence import Divergence, Kind, against_top, divergence, loss_sum, top

INF = math.inf
KINDS: list[Kind] = ["forward", "reverse", "skew", "skew-reverse", "jsd"]
EVERY = [*(Divergence(kind, t) for kind in KINDS for t in (1.0, 2.5)), Divergence(top_k=3), Divergence(temperature=2, top_k=3)]


def oracle(teacher: list[float], student: list[float], how: Divergence) -> float:
    def softmax(row: list[float]) -> list[float]:
        exps = [math.exp(x / how.temperature) for x in row]
        return [e / sum(exps) for e in exps]

    def kl(p: list[float], q: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x)

    p, q = softmax(teacher), softmax(student)
    if how.top_k:
        order = sorted(range(len(p)), key=lambda i: -p[i])
        p, q = ([x[i] for i in order[: how.top_k]] + [sum(x[i] for i in order[how.top_k :])] for x in (p, q))
    mix = how.mix if how.mix is not None else 0.5 if how.kind == "jsd" else 0.1
    of_p, of_q = ([mix * x + (1 - mix) * y for x, y in zip(*pair, strict=True)] for pair in ((p, q), (q, p)))
    found = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "skew": kl(p, of_p),
        "skew-reverse": kl(q, of_q),
        "jsd": mix * kl(p, of_p) + (1 - mix) * kl(q, of_p),
    }
    return found[how.kind] * how.temperature**2


def pair(tokens: int = 6, columns: int = 11, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(tokens * columns)
    teacher, student = torch.randn(2, tokens, columns, generator=made) * spread
    return teacher, student.requires_grad_()


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.floats(0.3, 5),
    st.floats(0.01, 0.99),
    st.integers(0, 6),
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=8),
)
def test_it_is_the_definition(kind: Kind, temperature: float, mix: float, k: int, logits: list[tuple[float, float]]) -> None:
    how = Divergence(kind, temperature, mix, k if kind == "forward" else 0)
    # Which of equals are the likeliest is nobody's business.
    assume(not how.top_k or len({round(x, 3) for x, _ in logits}) == len(logits))
    p, q = torch.tensor(logits, dtype=torch.float64).T.unsqueeze(1)
    found = divergence(p, q, how)
    assert found.dtype == torch.float64
    wanted = oracle(p[0].tolist(), q[0].tolist(), how)
    assert found.item() == pytest.approx(wanted, rel=1e-7, abs=1e-12)
    assert divergence(p.float(), q.float(), how).item() == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_it_is_zero_only_at_equality_and_blind_to_a_constant(how: Divergence) -> None:
    teacher, student = pair()
    shift = torch.linspace(-3, 3, len(teacher)).unsqueeze(-1)
    found = divergence(teacher, student, how)
    assert (found > 1e-2).all()
    torch.testing.assert_close(divergence(teacher + shift, student - 2 * shift, how), found, rtol=1e-4, atol=1e-5)
    assert divergence(teacher, teacher + shift, how).abs().max() < 1e-5
    assert divergence(teacher, teacher, how).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mixes_reach_the_plain_kinds_exactly(temperature: float) -> None:
    teacher, student = pair()
    forward, reverse = (divergence(teacher, student, Divergence(kind, temperature)) for kind in KINDS[:2])
    assert torch.equal(divergence(teacher, student, Divergence("jsd", temperature, 0)), forward)
    assert torch.equal(divergence(teacher, student, Divergence("jsd", temperature, 1)), reverse)
    assert torch.equal(divergence(teacher, student, Divergence("skew", temperature, 0)), forward)
    assert torch.equal(divergence(teacher, student, Divergence("skew-reverse", temperature, 0)), reverse)
    near = divergence(teacher.double(), student.double(), Divergence("jsd", temperature, 1e-6)) / 1e-6
    torch.testing.assert_close(near.float(), forward, rtol=1e-3, atol=0)


def test_a_skew_is_bounded_however_far_apart() -> None:
    teacher, student = torch.tensor([[300.0, 0, 0]]), torch.tensor([[0.0, 300, 0]], requires_grad=True)
    for kind in KINDS[2:4]:
        found = divergence(teacher, student, Divergence(kind))
        assert found.item() == pytest.approx(-math.log(0.1), rel=1e-5)
        assert found.item() <= -math.log(0.1) + 1e-5
        (gradient,) = torch.autograd.grad(found, student)
        assert gradient.isfinite().all()
    assert divergence(teacher, student, Divergence()).item() == pytest.approx(300)


def test_temperature_squared_keeps_gradients() -> None:
    """As T grows they go to (centred student - centred teacher) / V."""
    teacher, student = (logits.double() for logits in pair(1, 50, 1.0))
    limit = ((student - student.mean()) - (teacher - teacher.mean())).detach() / 50
    gaps = []
    for temperature in (1.0, 2.0, 10.0, 1000.0):
        (gradient,) = torch.autograd.grad(divergence(teacher, student, Divergence("forward", temperature)).sum(), student)
        gaps.append((gradient - limit).norm().item() / limit.norm().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-2


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_the_teacher_gets_no_gradient_and_the_student_the_right_one(how: Divergence) -> None:
    teacher, student = pair(2, 6)
    teacher = teacher.double().requires_grad_()
    student = student.detach().double().requires_grad_()
    divergence(teacher, student, how).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert torch.autograd.gradcheck(lambda logits: divergence(teacher, logits, how), student)
    # All of them ignore a constant, so gradients of a row sum to zero.
    assert student.grad.sum(-1).abs().max() < 1e-12


def test_top_k_grows_to_the_whole() -> None:
    teacher, student = pair(4, 12)
    whole = divergence(teacher, student, Divergence(temperature=2))
    found = torch.stack([divergence(teacher, student, Divergence(temperature=2, top_k=k)) for k in range(1, 15)])
    assert (found.diff(dim=0) >= -1e-5).all()
    assert (found[0] < whole).all()
    torch.testing.assert_close(found[11:], whole.expand(3, -1))
    kept = top(teacher, 3, 2)
    assert kept.ids.dtype == torch.int64
    assert torch.equal(kept.ids, teacher.topk(3).indices)
    torch.testing.assert_close(kept.log_probs.exp().sum(-1) + kept.log_tail.exp(), torch.ones(4))
    assert torch.equal(against_top(kept, student, 2), found[2])


def test_top_k_tails_do_not_cancel() -> None:
    """1 - sum would be 0 in fp32, and its logarithm infinite."""
    teacher, student = torch.tensor([[40.0, 0, 0, 0]]), torch.tensor([[60.0, 0, 0, 0]], requires_grad=True)
    found = divergence(teacher, student, Divergence(top_k=1))
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert 0 < found.item() < 1e-12
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("k", "tail"), [(2, True), (3, True), (2, False)])
def test_the_best_student_of_top_k_is_the_teacher(k: int, tail: bool) -> None:
    """Renormalised top-k puts .571 on a token of .40; with the tail it is .40."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    q = torch.zeros(1, 4, requires_grad=True)
    for _ in range(400):
        share = p[:k] / p[:k].sum()
        renormalised = -(share * q.log_softmax(-1)[0, :k]).sum()
        loss = divergence(p.log().unsqueeze(0), q, Divergence(top_k=k)).sum() if tail else renormalised
        (gradient,) = torch.autograd.grad(loss, q)
        q = (q - 2 * gradient).detach().requires_grad_()
    found = q.softmax(-1)[0]
    if tail:
        torch.testing.assert_close(found[:k], p[:k], rtol=0, atol=1e-3)
    else:
        assert found[0].item() == pytest.approx(0.571, abs=2e-3)


@pytest.mark.parametrize("how", [*EVERY, None], ids=str)
def test_chunks_are_invisible(how: Divergence | None, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pair(13, 9)
    labels = torch.arange(13) % 9
    weights = (0.0, 1.0) if how is None else (0.7, 0.3)

    def found(chunk: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_sum(teacher if how else None, student, labels, how, *weights, chunk)
        return loss, torch.autograd.grad(loss, student)[0]

    plain = weights[1] * cross_entropy(student, labels, reduction="sum")
    if how is not None:
        plain = plain + weights[0] * divergence(teacher, student, how).sum()
    wanted = plain, torch.autograd.grad(plain, student)[0]
    for chunk in (1, 2, 5, 13, 100, None):
        torch.testing.assert_close(found(chunk), wanted, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 9 * 4)
    torch.testing.assert_close(found(None), wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        loss = loss_sum(teacher if how else None, student, labels, how, *weights, 3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted[0].detach())


def test_only_one_chunk_is_in_fp32_at_a_time() -> None:
    """What is kept for the backward pass is bf16 logits, whatever the number of chunks."""
    kept: list[torch.Tensor] = []
    student = torch.randn(32, 50, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = loss_sum(student.detach().flip(0), student, torch.zeros(32, dtype=torch.int64), Divergence(), 1.0, 0.5, 4)
    assert all(x.dtype != torch.float32 or x.numel() < 4 * 50 for x in kept)
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_half_precision_is_computed_in_fp32(how: Divergence) -> None:
    teacher, student = (logits.detach().bfloat16() for logits in pair())
    found = divergence(teacher, student, how)
    assert found.dtype == torch.float32
    assert torch.equal(found, divergence(teacher.float(), student.float(), how))


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_a_token_ruled_out_costs_nothing(how: Divergence) -> None:
    teacher, student = pair(3, 8)
    teacher[:, 6:] = -INF
    for both in (False, True):
        logits = student.detach().clone()
        if both:
            logits[:, 6:] = -INF
        logits.requires_grad_()
        found = divergence(teacher, logits, how)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert found.isfinite().all()
        assert gradient.isfinite().all()
        assert (found > 0).all()
        if both or how.kind == "reverse":
            torch.testing.assert_close(found, divergence(teacher[:, :6], logits[:, :6], how), rtol=1e-4, atol=1e-5)
            assert (gradient[:, 6:] == 0).all()
    # Nothing is left for the tail, on either side.
    if how.top_k:
        logits = student.detach().clone()
        teacher[:, 2:] = logits[:, 2:] = -INF
        logits.requires_grad_()
        loss = divergence(teacher, logits, how).sum()
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_padded_vocabularies_are_cut(how: Divergence) -> None:
    teacher, student = pair()
    wanted = divergence(teacher, student, how)
    padding = torch.full((len(teacher), 3), 50.0)
    assert torch.equal(divergence(torch.cat([teacher, padding], -1), student, how), wanted)
    assert torch.equal(divergence(teacher, torch.cat([student, padding], -1), how), wanted)
    # Cross entropy is over what the student has, so that a label may be among what the teacher lacks.
    wide = torch.cat([student, padding], -1)
    labels = torch.full((len(teacher),), wide.shape[-1] - 1)
    found = loss_sum(teacher, wide, labels, how, 1.0, 2.0)
    torch.testing.assert_close(found, wanted.sum() + 2 * cross_entropy(wide, labels, reduction="sum"))


def test_cross_entropy_alone_needs_no_teacher() -> None:
    _, student = pair()
    labels = torch.arange(len(student))
    found = loss_sum(None, student, labels, None, 0.0, 1.0)
    torch.testing.assert_close(found, cross_entropy(student, labels, reduction="sum"))
    teacher = torch.full_like(student, math.nan)
    assert torch.equal(loss_sum(teacher, student, labels, Divergence(), 0.0, 1.0), found)


def test_no_tokens_are_no_loss() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = loss_sum(torch.zeros(0, 5), student, torch.zeros(0, dtype=torch.int64), Divergence(), 1.0, 1.0)
    loss.backward()
    assert loss.item() == 0


def test_what_has_no_meaning_is_refused() -> None:
    for wrong in (
        {"temperature": 0.0},
        {"temperature": INF},
        {"mix": 1.5},
        {"kind": "skew", "mix": 1.0},
        {"top_k": -1},
        {"kind": "jsd", "top_k": 5},
    ):
        with pytest.raises(ValueError):
            Divergence(**wrong)  # type: ignore[arg-type]
    teacher, student = pair()
    labels = torch.zeros(len(student), dtype=torch.int64)
    with pytest.raises(ValueError, match="nothing to learn"):
        loss_sum(teacher, student, labels, Divergence(), 0.0, 0.0)
    with pytest.raises(ValueError, match="no teacher"):
        loss_sum(None, student, labels, Divergence(), 1.0, 0.0)
    with pytest.raises(ValueError, match="same tokens"):
        loss_sum(teacher[:-1], student, labels, Divergence(), 1.0, 0.0)
    with pytest.raises((IndexError, RuntimeError)):
        loss_sum(None, student, labels - 100, None, 0.0, 1.0)
