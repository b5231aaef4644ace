"""What gpt-wgpu draws at random, drawn by numpy: the starts of its batches and its initial weights (src/rng.rs tells how)."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# The sites: the last word of every counter, which keeps the uses apart.
DATA_TRAIN, DATA_VAL, INIT = 1, 2, 3

# Random123's known answers for philox4x32 with 10 rounds: counter, key, random words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def words(value):
    """A number below 2^64 as two words, the low one first: a seed as a key, a position as half a counter."""
    return [value & 0xFFFFFFFF, value >> 32]


def philox4x32(counter, key):
    """Philox4x32-10 of four counter words, integers or arrays that broadcast -> four arrays of uint64, each word below 2^32."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = p1 >> half ^ c1 ^ np.uint64(k0), p1 & low, p0 >> half ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def batch_starts(site, seed, position, rows, windows):
    """Where the rows of the `position`-th batch begin, uniform in 0..windows -> (rows) of int64."""
    random = philox4x32([*words(position), np.arange(rows), site], words(seed))
    # Multiply-shift needs 128 bits for files of more than 2^32 tokens: Python's integers have them.
    return np.array([(int(high) << 32 | int(low)) * windows >> 64 for low, high in zip(*random[:2])], np.int64)


def normals(seed, first, count, std):
    """`count` draws of N(0, std) from the stream of initial weights, after its `first` draws -> (count) of float32.

    Box-Muller in float64, two words a draw. numpy's logarithm and cosine may differ from another library's in the last bit
    of a float64, so one weight in hundreds of millions may differ in the last bit of its float32.
    """
    out = np.empty(count, np.float32)
    step = 1 << 15  # draws at a time: what a core's cache holds

    def fill(start):
        part = out[start : start + step]
        begin = first + start
        blocks = np.arange(begin // 2, (begin + len(part) + 1) // 2, dtype=np.uint64)  # four words are two draws
        counter = [blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32), 0, INIT]
        pairs = np.stack(philox4x32(counter, words(seed)), axis=1).reshape(-1, 2)[begin % 2 :][: len(part)]
        radius = (pairs[:, 0].astype(np.float64) + 0.5) * 2.0**-32
        angle = pairs[:, 1].astype(np.float64) * 2.0**-32
        part[:] = np.sqrt(-2.0 * np.log(radius)) * np.cos(math.tau * angle) * std

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, count, step)))
    return out
