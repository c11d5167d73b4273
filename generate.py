"""Figures 4 and 7"""


def attention_difference(maps):
    """Fig. 7: maps (layers, B, heads, n) of the attention that predicts a word, on the image's codes.

    Divided by their one maximum; cross-layer: the distance of each layer from the mean over layers; inner-layer: of
    each head from the mean over heads; averaged over all else. -> two tensors (layers,)
    """
    maps = maps / maps.max()
    cross = (maps - maps.mean(dim=0, keepdim=True)).abs().mean(dim=(1, 2, 3))
    inner = (maps - maps.mean(dim=2, keepdim=True)).abs().mean(dim=(1, 2, 3))
    return cross, inner
