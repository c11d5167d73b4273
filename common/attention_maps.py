"""Where a model looks on a picture (Fig. 4, 7): how much layers and heads differ, and heat maps of each layer."""
import numpy as np


def attention_difference(maps):
    """Fig. 4, 7: maps (layers, B, heads, n), divided by their one maximum. Cross-layer: distance of each layer from the
    mean over layers; inner-layer: of each head from the mean over heads. -> two tensors (layers,)"""
    maps = maps / maps.max()
    cross = (maps - maps.mean(dim=0, keepdim=True)).abs().mean(dim=(1, 2, 3))
    inner = (maps - maps.mean(dim=2, keepdim=True)).abs().mean(dim=(1, 2, 3))
    return cross, inner


def plot_attention(picture, maps, cross, inner, path):
    """Heat maps of each layer over a PIL image, mean over heads, and the two differences by layer -> a picture file.
    maps: (layers, 1, heads, G*G)"""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    heat = maps.mean(dim=(1, 2)).numpy()
    grid, columns = round(heat.shape[1] ** 0.5), 8
    rows = -(-len(heat) // columns)
    figure = pyplot.figure(figsize=(2 * min(columns, len(heat)), 2.2 * rows + 2.6), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=(2.2 * rows, 2.6))
    for layer, axes in enumerate(np.atleast_1d(upper.subplots(rows, min(columns, len(heat)))).flat):
        axes.axis("off")
        if layer < len(heat):
            axes.imshow(picture, extent=(0, grid, grid, 0))
            axes.imshow(heat[layer].reshape(grid, grid), extent=(0, grid, grid, 0), cmap="hot", alpha=0.6)
            axes.set_title(f"layer {layer}, at most {heat[layer].max():.3f}", fontsize=7)
    axes = lower.subplots()
    axes.plot(cross, marker=".", label="cross-layer difference")
    axes.plot(inner, marker=".", label="inner-layer difference")
    axes.set(xlabel="layer", ylabel="mean absolute difference")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
