"""Swap-AB: Triton kernels that multiply packed tiles, with weights on the left.

Legend: N rows of the weight, K columns, M tokens; BN rows by BM tokens are a program's tile of out^T = W x^T, so that
weights are the operand that tensor cores take from registers, and tokens come in eights. A chunk is KC columns, in PLANES
planes of 32; a plane, or where groups are of 16 columns half of one (WIDTH), multiplies a plain slice of x.

The PTX in ASM (ptx.py) converts planes to halves. Without it, on machines without a GPU, `value` computes the same in fp32,
and x is multiplied in fp32. A group's sum is in fp32 and scaled afterwards, or weights are scaled as halves before they are
multiplied (PRE), which takes fewer registers; a scale of a whole row is applied at the end (WHOLE). Nothing is added
atomically: if K is split, each split writes its fp32 sums, and `add` adds them in order.
"""

# Triton's language has no types, its constants are in capitals, and it supports neither unpacking nor `and` of its values.
# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005, SIM102

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def value(words, high, r, zero, PLANE: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, TABLE: tl.constexpr):
    """The values of a plane, fp32: `words` int16 [BN, WIDTH], for 3 bits also `high`, `r` the columns, `zero` fp32."""
    low: tl.constexpr = 2 if BITS == 3 else BITS
    code = (words.to(tl.int32) >> (low * PLANE)) & ((1 << low) - 1)
    if BITS == 3:
        bit = (2 * (PLANE % 4) + 2 + PLANE // 4 + 8 * (r // 2 % 2)) % 16
        code |= ((high.to(tl.int32) >> bit) & 1) << 2
    if FLOAT is not None:
        fraction: tl.constexpr = FLOAT[0]
        exponent = (code & 0x7F) >> fraction
        power = ((tl.maximum(exponent, 1) + (127 - FLOAT[1])) << 23).to(tl.float32, bitcast=True)
        part = (code & ((1 << fraction) - 1)).to(tl.float32) / (1 << fraction) + tl.where(exponent > 0, 1.0, 0.0)
        found = tl.where(code > 0x7F, -part, part) * power
    elif TABLE is not None:
        found = tl.zeros_like(code).to(tl.float32)
        for i in tl.static_range(16):
            found += tl.where(code == i, TABLE[i], 0.0)
    else:
        found = code.to(tl.float32) - zero
    return found


@triton.jit
def step(stored, KIND: tl.constexpr, LIFT: tl.constexpr):
    """The values of stored scales, fp32; those in E4M3 are multiplied by LIFT."""
    if KIND == "e8m0":
        bits = stored.to(tl.int32)
        # The lowest byte is 2^-127, which is subnormal in fp32, and the highest is NaN.
        found = ((bits << 23) | tl.where(((bits + 1) & 0xFE) == 0, 0x400000, 0)).to(tl.float32, bitcast=True)
    elif KIND == "e4m3":
        bits = stored.to(tl.int32)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        found = half.to(tl.float32) * (256.0 * LIFT)
    else:
        found = stored.to(tl.float32)
    return found


@triton.jit
def _grids(
    s, z, c, shift, ZERO: tl.constexpr, SCALED: tl.constexpr, PLANES: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Scales and zero points of a chunk, a vector [BN] for each group in it."""
    scales, zeros = (), ()
    for i in tl.static_range(PLANES // SHARED * (32 // WIDTH)):
        g = (c * (32 * PLANES) + i * SHARED * WIDTH) >> shift
        if SCALED:
            scales = scales + (tl.load(s + g * 16),)
        if ZERO:
            zeros = zeros + (tl.load(z + g * 16),)
    return scales, zeros


@triton.jit(do_not_specialize=["M", "nblocks", "per"])
def swap(
    x, tiles, scale, zero, bias, tensor_scale, blocks, out, M, N, K, ldx, chunks, groups, shift, nblocks, per,
    ASM: tl.constexpr, OFFSET: tl.constexpr, UNIT: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, TABLE: tl.constexpr,
    FOLD: tl.constexpr, SCALE: tl.constexpr, LIFT: tl.constexpr, WHOLE: tl.constexpr, PRE: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [M, K], its rows `ldx` apart, by `tiles` into out [M, N], or with SPLIT fp32 sums [splits, M, N].

    The grid is (blocks of tokens, blocks of rows, splits), a split has `per` chunks. `blocks` int32 [3, nblocks] are the
    experts of blocks of tokens, as `block_map` has them.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    PLANES: tl.constexpr = 16 // LOW
    KC: tl.constexpr = 32 * PLANES
    WORDS: tl.constexpr = 48 if BITS == 3 else 32
    WIDTH: tl.constexpr = 32 if FOLD else 16
    HALVES: tl.constexpr = 32 // WIDTH
    SHARED: tl.constexpr = FOLD if FOLD else 1
    DTYPE: tl.constexpr = x.dtype.element_ty
    block, n, split = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2)
    # Rows beyond the last tile read the last one; their results are dropped.
    held = (N + 15) // 16
    tile = tl.minimum(n // 16, held - 1).to(tl.int64)
    if blocks is None:
        m, rows = block * BM, M - block * BM
    else:
        expert, m, rows = tl.load(blocks + block), tl.load(blocks + nblocks + block), tl.load(blocks + 2 * nblocks + block)
        tile += expert.to(tl.int64) * held
        if rows == 0:
            return
    r, t = tl.arange(0, WIDTH), tl.arange(0, BM)
    w = tiles + tile * (chunks * 16 * WORDS) + n % 16 * WORDS
    s = scale + tile * (groups * 16) + n % 16
    z = s if zero is None else zero + tile * (groups * 16) + n % 16
    xs = x + (m + t).to(tl.int64)[None, :] * ldx + r[:, None]
    token = (t < rows)[None, :]
    select = tl.where(r // 2 % 2 == 1, 0x2301, 0x3210).to(tl.int16)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    start, end = split * per, tl.minimum((split + 1) * per, chunks)
    # The words of the next chunk are loaded while one is multiplied.
    scales, zeros = _grids(s, z, start, shift, zero is not None, not WHOLE, PLANES, SHARED, WIDTH)
    for c in range(start, end):
        later = _grids(s, z, tl.minimum(c + 1, end - 1), shift, zero is not None, not WHOLE, PLANES, SHARED, WIDTH)
        for half in tl.static_range(HALVES):
            words = tl.load(w[:, None] + c * (16 * WORDS) + half * WIDTH + r[None, :])
            high = words
            if BITS == 3:
                # Columns 8a + 4b + 2i + h of both i find their high bits in the same word 4a + 2b + h.
                high = tl.load(w[:, None] + c * (16 * WORDS) + 32 + half * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :])
                high = tl.broadcast_to(tl.reshape(high, (BN, WIDTH // 4, 1, 2)), (BN, WIDTH // 4, 2, 2))
                high = tl.reshape(high, (BN, WIDTH))
            part = tl.zeros((BN, BM), tl.float32)
            for p in tl.static_range(PLANES):
                k = c * KC + p * 32 + half * WIDTH
                if not WHOLE:
                    by = step(scales[p // SHARED * HALVES + half], SCALE, LIFT)[:, None]
                if zero is not None:
                    point = zeros[p // SHARED * HALVES + half].to(tl.int32)[:, None]
                a = tl.load(xs + k, mask=token if EVEN else token & (k + r < K)[:, None], other=0.0)
                if ASM is None:
                    middle = 1 << (BITS - 1) if zero is None else point
                    q = value(words, high, r[None, :], middle, p, BITS, FLOAT, TABLE) * UNIT
                    if PRE:
                        q *= by
                    a = a.to(tl.float32)
                else:
                    operands = (words,)
                    if BITS == 3:
                        operands = operands + (high, select)
                    if zero is not None:
                        # The integer is put into the mantissa of 2^23, so that no conversion is needed.
                        point = (point | 0x4B000000).to(tl.float32, bitcast=True)
                        operands = operands + ((OFFSET[p] + 8388608.0 - point).to(DTYPE),)
                    if PRE:
                        operands = operands + (by.to(DTYPE),)
                    q = tl.inline_asm_elementwise(
                        ASM[p], "=r" + ",r" * len(operands), operands, dtype=x.dtype.element_ty, is_pure=True, pack=2
                    )
                if WHOLE or PRE:
                    acc = tl.dot(q, a, acc)
                else:
                    part = tl.dot(q, a, part)
                    if p % SHARED == SHARED - 1:
                        acc += part * by
                        part = tl.zeros((BN, BM), tl.float32)
        scales, zeros = later
    if WHOLE:
        acc *= step(tl.load(s), SCALE, LIFT)[:, None]
    acc *= 1.0 / (UNIT * LIFT)
    if tensor_scale is not None:
        acc /= tl.load(tensor_scale) if blocks is None else tl.load(tensor_scale + expert)
    if bias is not None:
        if split == 0:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    row = (m + t).to(tl.int64)
    if SPLIT:
        row += split.to(tl.int64) * M
    tl.store(out + row[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & token)


@triton.jit(do_not_specialize=["splits"])
def add(sums, out, size, splits, BLOCK: tl.constexpr):
    """fp32 sums [splits, size] -> out [size], added in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(sums + i, mask=i < size, other=0.0)
        sums += size
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)
