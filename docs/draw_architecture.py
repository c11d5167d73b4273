"""Draws assets/architecture.png, the picture at the top of README.md:    python docs/draw_architecture.py"""
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

IMAGE, TEXT, BRIDGE, FROZEN, PLAIN = "#fde3c8", "#d6e6f7", "#d3edd3", "#e6e6e6", "white"
EDGES = {IMAGE: "#c8701a", TEXT: "#3b78b5", BRIDGE: "#3f9a47", FROZEN: "#888888", PLAIN: "#666666"}
LEFT, RIGHT, WIDTH, MIDDLE = 4.55, 9.55, 2.75, 8.43      # left edges of the two streams, their width, what is between
figure, ax = plt.subplots(figsize=(12.6, 6.6))


def label(x, y, words, size=11.5, **options):
    ax.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": size, "linespacing": 1.35} | options)


def box(x, y, width, height, words, fill, size=11.5):
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=fill,
                                edgecolor=EDGES[fill], linewidth=1.4))
    label(x + width / 2, y + height / 2, words, size)


def arrow(x, y, to_x, to_y, color="#222222"):
    ax.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6,
                                                      "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13})


def tokenizer():
    """The picture's path: CLIP to ids and E_c, together the input of the image stream (Sec. 3.2)"""
    x, y = 1.42, 5.12
    ax.add_patch(Rectangle((x, y), 1, 1, facecolor="#1c1c1c"))
    ax.add_patch(Circle((x + 0.28, y + 0.72), 0.17, color="#d8362c"))
    ax.add_patch(Rectangle((x + 0.6, y + 0.6), 0.25, 0.25, color="#e8d038"))
    ax.add_patch(Polygon([(x + 0.52, y + 0.12), (x + 0.9, y + 0.12), (x + 0.71, y + 0.45)], color="#3f5de0"))
    box(0.35, 4.3, 3.15, 0.5, "CLIP-ViT", FROZEN)
    box(1.6, 3.27, 1.9, 0.7, "LFQ\nsign of each bit", FROZEN)
    box(1.6, 2.17, 1.9, 0.7, "embeddings\n$E_1(id_1),\\ E_2(id_2)$", IMAGE)
    box(0.35, 1.05, 3.15, 0.75, "$X_I = \\mathrm{concat}(E_d, E_c)$  (Eq. 9)\nRMSNorm, linear layer", IMAGE)
    for x, y, to_y in ((1.92, 5.12, 4.8), (0.9, 4.3, 1.8), (2.55, 4.3, 3.97), (2.55, 3.27, 2.87), (2.55, 2.17, 1.8)):
        arrow(x, y, x, to_y)
    label(1.15, 3.07, "$E_c$", 13)
    label(3.08, 3.07, "$id_1,\\ id_2$", 12)
    label(2.83, 1.99, "$E_d$", 13)
    ax.plot([1.92, 1.92], [1.05, 0.5], color="#222222", linewidth=1.6, solid_capstyle="projecting")
    arrow(1.92, 0.5, LEFT, 0.5)


def stream(x, fill, name, letter, source, head):
    """The way of one modality through a layer, from bottom to top"""
    middle, weights = x + WIDTH / 2, f"$W_{letter}^Q,\\ W_{letter}^K,\\ W_{letter}^V$"
    box(x, 0.25, WIDTH, 0.5, source, fill)
    box(x, 1.2, WIDTH, 0.75, f"RMSNorm\n{weights}  (Eq. 1)", fill)
    box(x, 3.95, WIDTH, 0.75, f"$W_{letter}^O$,  RMSNorm\n$\\mathrm{{FFN}}_{letter}$  (Eq. 2)", fill)
    box(x, 5.15, WIDTH, 0.7, head, fill)
    for y, to_y in ((0.75, 1.2), (1.95, 2.3), (3.65, 3.95), (4.7, 5.15)):
        arrow(middle, y, middle, to_y)
    label(middle, 6.07, name, 14, fontweight="bold", color=EDGES[fill])


def attention():
    """One softmax over both modalities; what crosses between them goes over the bridge (Eq. 3-5)"""
    box(LEFT, 2.3, RIGHT + WIDTH - LEFT, 1.35, "", PLAIN)
    label(MIDDLE, 3.44, "one causal attention in sequence order  (Eq. 1, 4, 5)")
    for q, k, x, y in (("I", "I", 7.43, 2.82), ("I", "T", 8.43, 2.82), ("T", "I", 7.43, 2.42), ("T", "T", 8.43, 2.42)):
        fill, prime = (PLAIN, "") if q == k else (BRIDGE, "\\prime")
        ax.add_patch(Rectangle((x, y), 1, 0.4, linewidth=1.2, edgecolor="#666666", facecolor=fill))
        label(x + 0.5, y + 0.19, f"$Q_{q} K_{k}^{{{prime}\\top}}$")
    label(5.95, 2.83, "image queries see\n$K_I,\\ V_I$  and  $K_T',\\ V_T'$")
    label(10.9, 2.83, "text queries see\n$K_T,\\ V_T$  and  $K_I',\\ V_I'$")
    box(7.63, 1.05, 1.6, 0.97, "bridge (Eq. 3)\n$K' = K + X W^{K'}$\n$V' = V + X W^{V'}$", BRIDGE)
    for x, y, to_x, to_y in ((LEFT + WIDTH, 1.57, 7.63, 1.57), (RIGHT, 1.57, 9.23, 1.57), (MIDDLE, 2.02, MIDDLE, 2.3)):
        arrow(x, y, to_x, to_y, EDGES[BRIDGE])


tokenizer()
stream(LEFT, IMAGE, "visual expert", "I", "image tokens $X_I$", "two image heads\nnext $id_1$, next $id_2$")
stream(RIGHT, TEXT, "LLaMA", "T", "text tokens $X_T$", "lm_head\nnext text token")
attention()
ax.add_patch(Rectangle((LEFT - 0.25, 0.93), 8.25, 3.95, fill=False, linestyle="--", edgecolor="#999999"))
label(MIDDLE, 4.32, "in every layer\n(residuals not drawn)", 10, color="#666666")
label(MIDDLE, 5.5, "one mean of\nall losses (Eq. 6)")
for x, words, fill in ((0.35, "image stream: learns", IMAGE), (3.5, "bridge: learns", BRIDGE),
                       (5.85, "LLaMA: frozen in pretraining", TEXT), (9.85, "image tokenizer: frozen", FROZEN)):
    box(x, -0.35, 0.4, 0.26, "", fill)
    label(x + 0.55, -0.22, words, ha="left")
ax.set(xlim=(0.15, 12.75), ylim=(-0.4, 6.25), aspect="equal")
ax.axis("off")
figure.savefig(Path(__file__).parent.parent / "assets/architecture.png", dpi=130, bbox_inches="tight")
