"""Figures: curves, pictures, and where a model looks on a picture (Fig. 4, 7).

matplotlib is imported only when something is plotted, and needs no screen.
"""
import numpy as np
from PIL import Image


def new_figure(width, height, title=None):
    """-> an empty figure of width x height inches (100 pixels each); write it with figure.savefig(path)"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="x-large")
    return figure


def plot_curves(axes, curves, x_label, y_label, window=1):
    """curves: {legend: values at steps 0, 1, ...}; None leaves a gap. A point is the mean of `window` values."""
    for legend, values in curves.items():
        n_points = len(values) // window
        points = np.array(values[:n_points * window], dtype=float).reshape(n_points, window)
        points = np.ma.masked_invalid(points).mean(1)
        axes.plot(np.arange(n_points) * window, points, marker="." if points.count() < 50 else "", label=legend)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend()


def show_pictures(figure, rows, row_labels=(), titles=()):
    """rows: lists of PIL pictures or arrays; titles: of the pictures, row by row. -> the axes, (rows, columns)"""
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            grid[r, c].imshow(picture)
    for axes, label in zip(grid[:, 0], row_labels):
        axes.set_ylabel(label)
    for axes, title in zip(grid.flat, titles):
        axes.set_title(title, fontsize="small")
    return grid


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
