"""Attention of one new token to a static cache equals torch's, in torch and in Triton.

The kernel runs with TRITON_INTERPRET=1 where triton is installed, and on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsecraft.kernels import attend as module
from sparsecraft.kernels.attend import attend
from sparsecraft.kernels.device import INTERPRETED

KINDS = ("none", "prefix", "padded", "window", "added", "smallest", "shared", "nothing")


def mask_of(kind: str, batch: int, length: int) -> torch.Tensor | None:
    at = torch.arange(length)
    masks = {
        "none": None,
        "prefix": at < torch.arange(1, batch + 1)[:, None] * 13,
        "padded": (at >= torch.arange(batch)[:, None] * 7) & (at < length // 2 + 1),
        "window": ((at > 40) & (at < 50)).expand(batch, -1),
        "shared": (at < 20)[None],
        "nothing": (at < 5) & (torch.arange(batch)[:, None] > 0),
    }
    if kind == "added":
        return torch.randn(batch, 1, 1, length).masked_fill(at > length // 2, -torch.inf)
    if kind == "smallest":  # of float32: hides a position unless all have it
        shown = torch.arange(batch)[:, None] * 20
        mask = torch.zeros(batch, length).masked_fill(at >= shown, torch.finfo(torch.float32).min)
        return mask[:, None, None, :]
    return None if masks[kind] is None else masks[kind][:, None, None, :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "of_keys", "width"), [(4, 4, 16), (6, 2, 24), (4, 1, 64)])
def test_it_is_attention(kind, heads, of_keys, width, dtype, monkeypatch):
    torch.manual_seed(0)
    B, L = 3, 150
    q = torch.randn(B, heads, 1, width).to(dtype)
    k, v = (torch.randn(B, of_keys, L, width).to(dtype) for _ in range(2))
    mask = mask_of(kind, B, L)
    wide = mask.double() if kind in ("added", "smallest") else mask
    wanted = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=wide, scale=0.3, enable_gqa=True
    )
    for programs in (1, 512):  # all positions in one part, or in several
        monkeypatch.setattr(module, "PROGRAMS", programs)
        found = attend(q, k, v, mask, 0.3)
        bound = 1e-5 if dtype == torch.float32 else 2e-3
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


def test_it_takes_what_a_cache_and_a_projection_look_like():
    torch.manual_seed(0)
    q = torch.randn(2, 1, 4, 16).transpose(1, 2)
    k, v = torch.randn(2, 2, 2, 70, 16).unbind(0)
    k, v = k.transpose(2, 3).contiguous().transpose(2, 3), v.expand(2, 2, 70, 16)
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, None, None), wanted)


def test_what_it_does_not_take():
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 70, 16)
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool)
    assert module.fits(q, k, k, None) and module.fits(q, k, k, mask)
    assert module.fits(q, k, k, mask[:1])
    assert not module.fits(q, k, k, mask.expand(2, 4, 1, 70))  # one for each head
    assert not module.fits(q, k, k, mask[..., :60])
    assert not module.fits(q.expand(2, 4, 3, 16), k, k, None)
    assert not module.fits(q.double(), k.double(), k.double(), None)
    assert not module.fits(q, k, k[..., :8], None)
    assert not module.fits(q[:, :3], k, k, None)
    assert not module.fits(q.half(), k, k, None)
