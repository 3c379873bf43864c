"""Building blocks: attention, the MLP, pre-norm blocks.

What a token sees is a bool mask that broadcasts to (R, heads, L, S); None: everything. Every mask here follows from two
numbers per token (`sees`); the kinds that never change take scaled_dot_product_attention's fast paths.
Shapes: R rows, L query tokens, S key tokens, D width, N heads, H head width.
Source: "Attention Is All You Need", section 3; pre-norm as in ViT, section 3.1.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def padding_mask(used: Tensor) -> Tensor:
    """(R, L) bool, False where there is padding -> (R, 1, 1, L): every token sees all tokens but padding."""
    return used[:, None, None, :]


def sees(doc: Tensor, time: Tensor) -> Tensor:
    """Token i sees token j if both belong to one document, and j does not come later.

    Args:
        doc: (R, L) int64 document of each token; padding has one below 0, which nobody sees.
        time: (R, L) int64. All zero: bidirectional. The token's place: causal. A prefix of zeros: a prefix LM.

    Returns:
        (R, 1, L, L) bool.
    """
    same = (doc[:, :, None] == doc[:, None, :]) & (doc >= 0)[:, None, :]
    return (same & (time[:, None, :] <= time[:, :, None]))[:, None]


class SelfAttention(nn.Module):
    """Tokens of a row look at each other."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.head_width = width // heads
        self.causal = causal  # padding stands at the end, where no token of the caption sees it
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(R, L, D) -> (R, L, D)."""
        # Heads outermost: a tensor-parallel rank then holds whole heads, each with its q, k and v.
        q, k, v = rearrange(self.qkv(x), "r l (n c h) -> c r n l h", c=3, h=self.head_width)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.out(rearrange(mixed, "r n l h -> r l (n h)"))


class CrossAttention(nn.Module):
    """Tokens look at the tokens of their row's image. Keys and values are projected once per image."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, memory_rows: Tensor | None = None) -> Tensor:
        """(R, L, D) tokens, (B, S, memory width) images, (R,) image of each row, or row r's is r -> (R, L, D)."""
        q = rearrange(self.query(x), "r l (n h) -> r n l h", h=self.head_width)
        kv = rearrange(self.key_value(memory), "b s (n c h) -> c b n s h", c=2, h=self.head_width)
        k, v = kv if memory_rows is None else kv.index_select(1, memory_rows)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "r n l h -> r l (n h)"))


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block; with a memory width, one that also attends to images."""

    def __init__(
        self, width: int, heads: int, *, stack: int, memory_width: int | None = None, causal: bool = False
    ) -> None:
        """`stack`: how many blocks add to the residual stream that this one adds to; it scales initial weights."""
        super().__init__()
        self.stack = stack
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal)
        if memory_width is not None:
            self.cross_norm = nn.LayerNorm(width)
            self.cross = CrossAttention(width, memory_width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_rows: Tensor | None = None,
    ) -> Tensor:
        """(R, L, D) -> (R, L, D); the arguments are those of SelfAttention and CrossAttention."""
        x = x + self.attention(self.attention_norm(x), mask)
        if memory is not None:
            x = x + self.cross(self.cross_norm(x), memory, memory_rows)
        return x + self.mlp(self.mlp_norm(x))
