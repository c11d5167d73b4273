"""Attention whose keys look different to text and to image queries (Eq. 3-5), in two forms that agree.

`plain_attention` is the equations as they stand, with their L x L matrices; `routed_attention` is the same on stock
kernels without a score matrix, at the cost of one causal attention for an image behind a few tokens.

Letters: B rows, L positions, H heads, d head_dim; a view is (keys, values) as queries of one modality see them.
"""
import functools
import math

import torch
import torch.nn.functional as F

from streams import IMAGE, TEXT

# On Hopper torch 2.11 and later take cuDNN's attention before flash: it plans anew for every length, which no two
# batches of chats or answers share, and under a mask its gradients can be NaN.
torch.backends.cuda.enable_cudnn_sdp(False)


def plain_attention(q, views, is_image, mask=None):
    """Eq. 3-5 as they stand, with the L x L matrices written out: for reading, for tests, for looking at the maps.

    q (B, H, L, d), the last of the keys; views {modality: (keys, values) as that modality's queries see them};
    is_image (B, L) bool; mask (B, 1, 1, keys) where rows differ in length -> outputs (B, H, L, d), maps (B, H, L, keys)
    """
    image_query = is_image[:, None, :, None]
    groups = q.shape[1] // next(iter(views.values()))[0].shape[1]

    def pick(f):                                          # row by row, the view of the query's modality
        text, image = (f(*(t.repeat_interleave(groups, dim=1) for t in views.get(m, next(iter(views.values())))))
                       for m in (TEXT, IMAGE))
        return torch.where(image_query, image, text)
    scores = pick(lambda k, v: q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])                # Eq. 4
    many, keys = scores.shape[-2:]
    seen = torch.ones(many, keys, dtype=torch.bool, device=q.device).tril(keys - many)
    maps = scores.masked_fill(~(seen if mask is None else seen & mask), -torch.inf).softmax(dim=-1)   # Eq. 1, Tril
    return pick(lambda k, v: maps @ v), maps                                                  # Eq. 5


def routed_attention(q, views, streams, mask=None):
    """Eq. 3-5 on stock kernels, without a score matrix (the paper's limitation, Sec. D.2).

    A stretch of queries of one modality sees the keys before it all in one way: that is plain causal attention of its
    queries, over one view of the keys. Rows whose images stand at the same places go together. For one image behind a
    few tokens this is a square call over the prefix and a call of the text tail over everything: the cost of one
    causal attention. Shapes as in plain_attention; mask (B, 1, 1, keys) when decoding rows of different lengths.
    """
    if len(views) == 1:
        (k, v), = views.values()
        return causal_attention(q, k, v, mask)
    if torch.compiler.is_compiling():
        return traced_attention(q, views, streams)
    if sum(len(cuts) for _, cuts in streams.groups) > MOST_CALLS:
        return twice(q, views, streams, mask)
    keys = views[TEXT][0].shape[2]
    out = []
    for rows, cuts in streams.groups:
        rows = slice(None) if rows is None else rows
        parts = []
        for modality, start, end in cuts:
            k, v = (t[rows, :, :keys - q.shape[2] + end] for t in views[modality])            # the cache, and up to end
            first = 0 if 2 * start <= end and keys == q.shape[2] else start       # a square: flash kernels take it
            part = causal_attention(q[rows, :, first:end], k, v, None if mask is None else mask[rows])
            parts.append(part[:, :, start - first:])
        out.append(torch.cat(parts, dim=2))
    if len(out) == 1:
        return out[0]
    return torch.cat(out)[torch.cat([rows for rows, _ in streams.groups]).argsort()]


def twice(q, views, streams, mask=None):
    """Every query over both views, the one of its modality taken: for any order, at twice the cost"""
    text, image = (causal_attention(q, *views[modality], mask) for modality in (TEXT, IMAGE))
    return torch.where(streams.is_image[:, None, :, None], image, text)


def traced_attention(q, views, streams):
    """routed_attention as torch.compile reads it, where each new list of stretches would be a new graph: one for the
    usual rows of text, an image and text, at routed_attention's cost, and one for all others."""
    if not streams.usual:
        return twice(q, views, streams)
    start, end = streams.spans[IMAGE][0]
    image = causal_attention(*(t[:, :, :end] for t in (q, *views[IMAGE])))
    text = causal_attention(torch.cat((q[:, :, :start], q[:, :, end:]), dim=2), *views[TEXT], streams.seen)
    return torch.cat((text[:, :, :start], image[:, :, start:], text[:, :, start:]), dim=2)


MOST_CALLS = 32    # beyond it two calls over everything are faster than many short ones


def causal_attention(q, k, v, mask=None):
    """The queries are the last of the keys, unless a mask says which keys each of them sees. torch's is_causal aligns
    the mask at the top left, so it serves only the square case. A tail has its own kernel on CUDA; elsewhere it takes
    small masks, in blocks: none of L x L is made."""
    many, keys, block = q.shape[2], k.shape[2], 256
    # CUDA's fast kernels take grouped heads or a mask, not both
    if q.is_cuda and q.shape[1] != k.shape[1] and (mask is not None or 1 < many < keys):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    gqa = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    if many == 1 or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, mask, **gqa)
    if many == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, lower_right(many, keys))
    parts = []
    for start in range(0, many, block):
        end = min(start + block, many)
        seen = keys - many + end
        allowed = torch.ones(end - start, seen, dtype=torch.bool, device=q.device).tril(seen - (end - start))
        parts.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], allowed, **gqa))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@functools.lru_cache(maxsize=8)                           # it holds a tensor of that size on the CPU: layers share it
def lower_right(many, keys):
    from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler along, seconds of it
    return causal_lower_right(many, keys)
