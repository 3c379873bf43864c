"""Random numbers that are a function of their key, so that every layout draws the same ones."""

import torch
from torch import Tensor

_INT64_MAX = 2**63 - 1


def hashed(seed: int, *keys: Tensor) -> Tensor:
    """An int64 of 64 random bits for each broadcast combination of integer keys.

    The keys pass through the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014, figure 16), which
    changes half of all output bits for any one input bit. Runs on the keys' device and keeps no state.

    Args:
        seed: the run's seed.
        keys: int64 tensors that broadcast together, such as positions (B, 1) and (1, B).
    """
    state = torch.full((), seed, dtype=torch.int64, device=keys[0].device)
    for key in keys:
        state = _mix(state + key + _signed(0x9E3779B97F4A7C15))
    return state


def gumbel(seed: int, *keys: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, for each broadcast combination of keys; see `hashed`."""
    uniform = (_shift(hashed(seed, *keys), 40).double() + 0.5) / 2**24
    return (-torch.log(-torch.log(uniform))).float()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own carries the sign along."""
    return (x >> bits) & (_INT64_MAX >> (bits - 1))


def _signed(constant: int) -> int:
    return constant - 2**64 if constant > _INT64_MAX else constant
