"""Building blocks: attention, the two-layer perceptron, pre-norm blocks.

Shapes: R rows, L query tokens, S key tokens, D width, N heads, H head width.
Source: "Attention Is All You Need", section 3; pre-norm as in ViT, section 3.1.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Every token looks at every token of its row."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(R, L, D) -> (R, L, D). `mask` (R, L) int64 is 0 where a token must not be looked at."""
        # Heads outermost: a tensor-parallel rank then holds whole heads, each with its q, k and v.
        q, k, v = rearrange(self.qkv(x), "r l (n c h) -> c r n l h", c=3, h=self.head_width)
        attend = None if mask is None else mask[:, None, None, :].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        return self.out(rearrange(mixed, "r n l h -> r l (n h)"))


class CrossAttention(nn.Module):
    """Text tokens look at the tokens of their row's image. Keys and values are projected once an image."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, memory_rows: Tensor) -> Tensor:
        """(R, L, D) text, (B, S, memory width) images, (R,) image of each row -> (R, L, D)."""
        q = rearrange(self.query(x), "r l (n h) -> r n l h", h=self.head_width)
        kv = rearrange(self.key_value(memory), "b s (n c h) -> c b n s h", c=2, h=self.head_width)
        k, v = kv.index_select(1, memory_rows)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "r n l h -> r l (n h)"))


class Perceptron(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block; with a memory width, one that also attends to images.

    Its heirs are layers: they say which part of the flow it transforms.
    """

    def __init__(self, width: int, heads: int, memory_width: int | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        if memory_width is not None:
            self.cross_norm = nn.LayerNorm(width)
            self.cross = CrossAttention(width, memory_width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Perceptron(width)

    def transform(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None, memory_rows: Tensor | None = None
    ) -> Tensor:
        """(R, L, D) -> (R, L, D); the arguments are those of SelfAttention and CrossAttention."""
        x = x + self.attention(self.attention_norm(x), mask)
        if memory is not None and memory_rows is not None:
            x = x + self.cross(self.cross_norm(x), memory, memory_rows)
        return x + self.mlp(self.mlp_norm(x))
