"""Figures by matplotlib, which is imported only when something is plotted and needs no screen."""
import numpy as np


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
