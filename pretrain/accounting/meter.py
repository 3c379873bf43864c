"""Counts what runs on the meta device: FLOPs, bytes of tensors, and what would go to other ranks."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

# The meta device would compute attention in single steps, and keep what each token sees of each other one. This kernel
# keeps no such thing, as all do that a GPU or a CPU takes.
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLOPS = flop_registry | {
    _FUSED: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Meter(TorchDispatchMode):
    """What runs, by the place that was entered last."""

    def __init__(self) -> None:
        super().__init__()
        self.place: Any = "", ""
        self.flops = Counter[Any]()
        self.sent, self.messages = Counter[Any](), Counter[Any]()
        """By place, axis of the mesh, and kind of collective."""
        self.held = 0
        """Bytes of tensors that are there now."""
        self.peak: dict[Any, int] = {}
        self._storages: dict[int, Any] = {}

    def own(self, tensors: Iterable[Tensor]) -> None:
        """These are there anyway, and stay."""
        self._storages |= {tensor.untyped_storage()._cdata: None for tensor in tensors}

    def enter(self, place: Any) -> None:
        self.place = place
        self.peak[place] = max(self.peak.get(place, 0), self.held)

    def note(self, axis: str, kind: str, size: int) -> None:
        """Of a collective; see `collectives.Pretended`."""
        self.sent[self.place, axis, kind] += size
        self.messages[self.place, axis, kind] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        if count := FLOPS.get(func._overloadpacket):
            self.flops[self.place] += count(*args, **(kwargs or {}), out_val=outcome)
        for tensor in outcome if isinstance(outcome, tuple | list) else (outcome,):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return outcome

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def let_go(_: Any) -> None:
            self.held -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, let_go)
        self.held += size
        self.peak[self.place] = max(self.peak.get(self.place, 0), self.held)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation waits seconds for the import of a compiler


def fuse_attention(forward: Callable[..., Any], *reads: Tensor, **spans: Any) -> Any:
    """A layer's forward pass, in which attention is one kernel. (Backward passes leave modes that enclose them.)"""
    with _FusedAttention():
        return forward(*reads, **spans)


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_fused if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    mask = None if attn_mask is None else q.new_zeros(()).masked_fill(attn_mask, 0)
    return _FUSED(q, k, v, 0.0, is_causal, attn_mask=mask)[0]
