"""Where a model looks on a picture (Fig. 4, 7): how much layers and heads differ, and heat maps of each layer."""
from PIL import Image

from common.plots import new_figure, plot_curves, show_pictures


def attention_difference(maps):
    """Fig. 4, 7: maps (layers, B, heads, n), divided by their one maximum. Cross-layer: distance of each layer from the
    mean over layers; inner-layer: of each head from the mean over heads. -> two tensors (layers,)"""
    maps = maps / maps.max()
    cross = (maps - maps.mean(dim=0, keepdim=True)).abs().mean(dim=(1, 2, 3))
    inner = (maps - maps.mean(dim=2, keepdim=True)).abs().mean(dim=(1, 2, 3))
    return cross, inner


def plot_attention(picture, maps, cross, inner):
    """maps: (layers, 1, heads, G*G) -> a figure: heat maps of each layer over a PIL image, mean over heads, and the two
    differences by layer"""
    heat = maps.mean(dim=(1, 2)).unflatten(1, (round(maps.shape[-1] ** 0.5), -1))             # (layers, G, G)
    rows = [[overlay(picture, of_layer) for of_layer in heat[first:first + 8]] for first in range(0, len(heat), 8)]
    titles = [f"layer {layer}, at most {of_layer.max():.3f}" for layer, of_layer in enumerate(heat)]
    figure = new_figure(2 * len(rows[0]), 2.2 * len(rows) + 2.6)
    upper, lower = figure.subfigures(2, height_ratios=(2.2 * len(rows), 2.6))
    show_pictures(upper, rows, titles=titles)
    plot_curves(lower.subplots(), {"cross-layer difference": cross, "inner-layer difference": inner}, "layer",
                "mean absolute difference")
    return figure


def overlay(picture, heat):
    """heat: (n, n), scaled by its maximum and laid over a PIL image in red -> a PIL image"""
    opacity = Image.fromarray((215 * heat / heat.max()).byte().numpy())
    return Image.composite(Image.new("RGB", picture.size, "red"), picture, opacity.resize(picture.size))
