# SPDX-License-Identifier: Apache-2.0
"""The exact n-th largest of many integers, digit by digit.

Rows of usual length are the work of one program each. A long row is split into chunks: each digit is then a launch, in
which the programs of a row add up their histograms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST_ROW = 65536  # of one program
MAX_CHUNKS: tl.constexpr = tl.constexpr(256)


@triton.jit
def histogram_of(keys, begin, end, shift, value, TILE: tl.constexpr):
    """How many of keys[begin..end - 1] have each digit at `shift`, of those whose digits above it are `value`."""
    counts = tl.zeros([256], tl.int32)
    for first in range(begin, end, TILE):
        position = first + tl.arange(0, TILE)
        key = tl.load(keys + position, mask=position < end, other=0)
        agrees = (position < end) & ((key >> (shift + 8)) == value)
        counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=agrees)
    return counts


@triton.jit
def next_digit(counts, value, n):
    """`value` with the digit of the n-th largest key appended, and its place among the keys that have this digit."""
    at_least = tl.sum(counts) - tl.cumsum(counts) + counts  # keys with this digit or a higher one
    digit = tl.sum((at_least >= n).to(tl.int32)) - 1
    return value * 256 + digit, n - tl.max(tl.where(at_least < n, at_least, 0))


@triton.jit
def nth_largest(keys, count, n, TOP_SHIFT: tl.constexpr, TILE: tl.constexpr):
    """The n-th largest of the int64 keys[0..count - 1], and how many keys equal to it are among the n largest.

    Keys are not negative and below 2 ** (TOP_SHIFT + 8). One pass over them for each digit of 8 bits.
    """
    value = tl.full([], 0, tl.int64)
    for shift in tl.static_range(TOP_SHIFT, -8, -8):
        value, n = next_digit(histogram_of(keys, 0, count, shift, value, TILE), value, n)
    return value, n


@triton.jit
def known_digits(digits, row, n, TOP_SHIFT: tl.constexpr, NUMBER: tl.constexpr):
    """The first NUMBER digits of the n-th largest key of a row, from the finished histograms; as `nth_largest`."""
    value = tl.full([], 0, tl.int64)
    for number in tl.static_range(NUMBER):
        counts = tl.load(digits + (row * (TOP_SHIFT // 8 + 1) + number) * 256 + tl.arange(0, 256))
        value, n = next_digit(counts, value, n)
    return value, n


@triton.jit
def digit_kernel(
    keys, digits, seq_len, n, TOP_SHIFT: tl.constexpr, NUMBER: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    # One program: adds one chunk of a row to the histogram of digit NUMBER. Integers: the order does not matter.
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * CHUNK
    value, n = known_digits(digits, row, n, TOP_SHIFT, NUMBER)
    end = tl.minimum(begin + CHUNK, seq_len)
    counts = histogram_of(keys + row * seq_len, begin, end, TOP_SHIFT - 8 * NUMBER, value, TILE)
    target = digits + (row * (TOP_SHIFT // 8 + 1) + NUMBER) * 256 + tl.arange(0, 256)
    tl.atomic_add(target, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def count_kernel(
    keys, digits, before, seq_len, n, num_chunks, TOP_SHIFT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    # One program: how many keys of one chunk are above the n-th largest of the row, and how many equal to it.
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * CHUNK
    value, n = known_digits(digits, row, n, TOP_SHIFT, TOP_SHIFT // 8 + 1)
    above = tl.zeros([TILE], tl.int32)
    equal = tl.zeros([TILE], tl.int32)
    for first in range(begin, tl.minimum(begin + CHUNK, seq_len), TILE):
        position = first + tl.arange(0, TILE)
        key = tl.load(keys + row * seq_len + position, mask=position < seq_len, other=-1)
        above += (key > value).to(tl.int32)
        equal += (key == value).to(tl.int32)
    target = before + (row * num_chunks + tl.program_id(1)) * 2
    tl.store(target, tl.sum(above))
    tl.store(target + 1, tl.sum(equal))


@triton.jit
def start_of_chunk(digits, before, row, n, num_chunks, TOP_SHIFT: tl.constexpr):
    """What `nth_largest` returns, and the keys equal to it and above it in earlier chunks than the program's."""
    value, num_equal = known_digits(digits, row, n, TOP_SHIFT, TOP_SHIFT // 8 + 1)
    chunk = tl.arange(0, MAX_CHUNKS)
    source = before + (row * num_chunks + chunk) * 2
    above = tl.sum(tl.load(source, mask=chunk < tl.program_id(1), other=0))
    equal = tl.sum(tl.load(source + 1, mask=chunk < tl.program_id(1), other=0))
    return value, num_equal, equal, above


def tile_of(seq_len: int) -> tuple[int, int]:
    """Tokens that a program handles at once, and its warps: 8 tokens a thread."""
    tile = min(max(triton.next_power_of_2(seq_len), 256), 4096)
    return tile, tile // 256


class Chunks(NamedTuple):
    """How rows are split, and for long ones the histograms of all digits and the counts of every chunk."""

    num_chunks: int
    chunk: int
    digits: Tensor
    before: Tensor


def split_rows(keys: Tensor, n: int, top_shift: int) -> Chunks:
    """keys [B, L] -> what `start_of_chunk` needs to find the n-th largest of each row, if rows are long."""
    batch, seq_len = keys.shape
    if seq_len <= LONGEST_ROW:
        return Chunks(1, seq_len, keys, keys)
    tile, num_warps = tile_of(seq_len)
    chunk = tile * triton.cdiv(seq_len, tile * MAX_CHUNKS.value)
    num_chunks = triton.cdiv(seq_len, chunk)
    num_digits = top_shift // 8 + 1
    digits = torch.zeros((batch, num_digits, 256), dtype=torch.int32, device=keys.device)
    before = torch.empty((batch, num_chunks, 2), dtype=torch.int32, device=keys.device)
    options = {"TOP_SHIFT": top_shift, "CHUNK": chunk, "TILE": tile, "num_warps": num_warps}
    grid = (batch, num_chunks)
    for number in range(num_digits):
        digit_kernel[grid](keys, digits, seq_len, n, NUMBER=number, **options)
    count_kernel[grid](keys, digits, before, seq_len, n, num_chunks, **options)
    return Chunks(num_chunks, chunk, digits, before)
