"""Random numbers that belong to a sample, not to a batch, a process or a device.

A key is an int64 made from the run's seed, the optimizer step and the sample's index. Everything drawn for a sample
(attack start, augmentation, drop path) is a pure function of its key, so that the draws are the same whoever shares
the batch, on however many processes the batch is spread, and after a resume. The generator is counter-based: the
finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) applied
to key and counter. It is made of integer operations, which give the same bits on CPU and GPU.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> keeps the sign of an int64; the algorithm wants zeros to move in.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _stream(keys: Tensor, count: int) -> Tensor:
    counter = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    return _mix(_mix(keys).unsqueeze(1) + counter)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def derive(keys: Tensor, *numbers: int) -> Tensor:
    """Fresh, unrelated keys from ``keys`` and a few integers (a purpose, a restart, a step).

    Args:
        keys: Keys of shape `[B]`, int64.
        numbers: Integers that tell this derivation from others.

    Returns:
        Keys of shape `[B]`, int64.
    """
    for number in numbers:
        # A Python int beyond int64 would overflow at the tensor operation, so it is wrapped here.
        wrapped = (number + (1 << 63)) % (1 << 64) - (1 << 63)
        keys = _mix(_mix(keys + _GOLDEN) ^ wrapped)
    return keys


def name_key(name: str) -> int:
    """A number that stands for a name, for `derive`: what is drawn for one attack tells nothing about another's."""
    return zlib.crc32(name.encode())


def sample_keys(seed: int, step: int, indices: Tensor) -> Tensor:
    """Keys of the samples of one step.

    Args:
        seed: The run's seed.
        step: The optimizer step, from 0.
        indices: Each sample's index of shape `[B]`, an integer dtype.

    Returns:
        Keys of shape `[B]`, int64, on the device of ``indices``.
    """
    return derive(_mix(indices.to(torch.int64) + _GOLDEN), seed, step)


def fresh_keys(count: int, device: torch.device | str) -> Tensor:
    """``count`` keys from torch's own generator, so that `torch.manual_seed` governs them."""
    return torch.randint(-(1 << 62), 1 << 62, (count,)).to(device)


def uniform(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), one row for each key.

    Args:
        keys: Keys of shape `[B]`, int64.
        shape: Shape of a row.
        dtype: float32 (24 random bits) or float64 (53 random bits).

    Returns:
        Tensor of shape `[B, *shape]`.
    """
    count = math.prod(shape)
    if dtype == torch.float64:
        return (_shift_right(_stream(keys, count), 11).to(dtype) * 2.0**-53).reshape(len(keys), *shape)
    # Two numbers of 24 bits from each 64, which halves the work.
    bits = _stream(keys, (count + 1) // 2)
    halves = torch.cat([_shift_right(bits, 40), bits & 0xFFFFFF], dim=1)[:, :count]
    return (halves.to(dtype) * 2.0**-24).reshape(len(keys), *shape)


def normal(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of shape `[B, *shape]`, one row for each key (Box-Muller transform)."""
    radius, angle = uniform(keys, (2, *shape), dtype).unbind(1)
    # 1 - u is in (0, 1], so the logarithm is finite.
    return torch.sqrt(-2 * torch.log(1 - radius)) * torch.cos(2 * math.pi * angle)
