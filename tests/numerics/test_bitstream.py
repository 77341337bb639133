"""Bit streams against Python's big integers."""

import pytest
import torch

from compress.numerics import bitstream


def oracle(row: list[int], bits: int) -> bytes:
    number = sum(code << (bits * i) for i, code in enumerate(row))
    return number.to_bytes(bitstream.row_bytes(len(row), bits), "little")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 43, 172, 256])
@pytest.mark.parametrize("chunk", [bitstream._CHUNK, 100], ids=["whole", "by rows"])
def test_pack_is_the_little_endian_stream_and_unpack_its_inverse(
    bits: int, columns: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitstream, "_CHUNK", chunk)
    codes = torch.randint(0, 2**bits, (3, 5, columns), dtype=torch.uint8)
    packed = bitstream.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, bitstream.row_bytes(columns, bits))
    for i in range(3):
        for j in range(5):
            assert bytes(packed[i, j].tolist()) == oracle(codes[i, j].tolist(), bits)
    assert torch.equal(bitstream.unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_non_contiguous_codes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 48), dtype=torch.uint8).T
    assert torch.equal(bitstream.unpack(bitstream.pack(codes, bits), bits, 64), codes)
