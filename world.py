"""The toy world: pictures, captions, questions, and a detector that says what a picture shows. No learning in here.

56 x 56 pictures of one to three objects, each a circle, square or triangle of one of five colours and two sizes in a
cell of a 2 x 2 grid, on a dark noisy background. Training and held-out scenes differ in their compositions; two pairs
of colour and shape occur in no training scene at all. Everything is drawn from the random generator that is handed in.
"""
import itertools
import zlib

import numpy as np

# ---------------------------------------------------------------- pictures

SIDE, CELL, PATCH = 56, 28, 8                            # pixels: picture, cell, the eye's patch
SIZES = {"small": 6, "large": 11}                         # radius in pixels
COLOURS = {"red": (220, 50, 40), "green": (50, 180, 70), "blue": (60, 90, 230), "yellow": (235, 210, 50),
           "purple": (165, 70, 205)}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
THINGS = tuple(itertools.product(SIZES, COLOURS, SHAPES, range(4)))
NUMBERS = ("no", "one", "two", "three")
ONE_WORD = (*(f"{colour} object" for colour in COLOURS), *SHAPES)
UNSEEN = {("green", "triangle"), ("purple", "square")}    # pairs that no training scene shows


def outline(shape, radius):
    """Coverage of a cell by a shape at its middle, (28, 28) in [0, 1], from 4 x 4 samples a pixel"""
    y, x = (np.mgrid[:CELL * 4, :CELL * 4] + 0.5) / 4 - CELL / 2
    inside = {"circle": x ** 2 + y ** 2 <= radius ** 2,
              "square": np.maximum(abs(x), abs(y)) <= radius * 0.89,
              "triangle": (y <= radius * 0.87) & (y >= 2 * abs(x) - radius)}[shape]
    return inside.reshape(CELL, 4, CELL, 4).mean((1, 3))


MASKS = {(size, shape): outline(shape, radius) for size, radius in SIZES.items() for shape in SHAPES}


def draw_scene(random, objects):
    """objects: 1 to 3 -> a scene: tuple of (size, colour, shape, cell) by cell, no two alike in colour and shape"""
    kinds = list(itertools.product(COLOURS, SHAPES))
    chosen = random.choice(len(kinds), objects, replace=False)
    cells = sorted(random.choice(4, objects, replace=False).tolist())
    return tuple((list(SIZES)[random.integers(2)], *kinds[k], cell) for k, cell in zip(chosen, cells))


def split_of(scene):
    """'train', 'held out' (12 % of the compositions, whatever the places) or 'unseen pair'"""
    if any((colour, shape) in UNSEEN for _, colour, shape, _ in scene):
        return "unseen pair"
    composition = "".join(sorted("".join(thing[:3]) for thing in scene))
    return "held out" if zlib.crc32(f"7{composition}".encode()) % 100 < 12 else "train"


def render(scene, random):
    """-> (56, 56, 3) uint8"""
    picture = random.integers(8, 33) + random.normal(0, 5, (SIDE, SIDE, 1)) + random.normal(0, 2, (SIDE, SIDE, 3))
    for size, colour, shape, cell in scene:
        dy, dx = random.integers(-1, 2, 2)
        mask = np.roll(MASKS[size, shape], (dy, dx), (0, 1))[..., None]
        part = picture[cell // 2 * CELL:, cell % 2 * CELL:][:CELL, :CELL]
        part[:] = part * (1 - mask) + mask * (np.array(COLOURS[colour]) + random.normal(0, 3, 3))
    return picture.clip(0, 255).round().astype(np.uint8)


def detect(picture):
    """The world's own detector: (56, 56, 3) uint8 -> for each cell (size, colour, shape), None where it is clean
    background, or 'unclear'"""
    found = []
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=float)
    for cell in range(4):
        part = picture[cell // 2 * CELL:, cell % 2 * CELL:][:CELL, :CELL].astype(float)
        bright = part.max(-1) > 90
        if bright.sum() < 12:
            found.append(None)
            continue
        mean = part[bright].mean(0)                       # hue decides, so compare directions
        cosine = palette @ mean / np.linalg.norm(palette, axis=1) / np.linalg.norm(mean)
        weight = np.clip(part.max(-1) / max(np.percentile(part.max(-1)[bright], 60), 1), 0, 1) * bright
        best = (0.0, None)
        for (size, shape), mask in MASKS.items():
            for dy, dx in itertools.product(range(-2, 3), repeat=2):
                moved = np.roll(mask, (dy, dx), (0, 1))
                overlap = np.minimum(weight, moved).sum() / np.maximum(weight, moved).sum()
                if overlap > best[0]:
                    best = (overlap, (size, names[cosine.argmax()], shape))
        found.append(best[1] if best[0] > 0.6 and cosine.max() > 0.93 else "unclear")
    return found


def map_word(thing):
    """A word of the drawn maps that the stand-in LLaMA has read: object and cell, or empty ground"""
    return "<" + thing[0][0] + thing[1][0] + thing[2][0] + str(thing[3]) + ">" if thing else "<.>"


def map_words(scene):
    """The scene as 7 x 7 words, each for what covers most of a patch"""
    cover = np.zeros((len(scene) + 1, SIDE, SIDE))
    cover[0] = 0.2
    for number, (size, _, shape, cell) in enumerate(scene, 1):
        cover[number, cell // 2 * CELL:, cell % 2 * CELL:][:CELL, :CELL] = MASKS[size, shape]
    grid = SIDE // PATCH
    most = cover.reshape(len(cover), grid, PATCH, grid, PATCH).mean((2, 4)).argmax(0).flatten()
    return [map_word(scene[number - 1] if number else None) for number in most]


# ---------------------------------------------------------------- what is said about a scene

SUFFIX = "\nAnswer the question using a single word or phrase."
DESCRIBE = "Describe the image."


def name(thing, size=True):
    return f"a {thing[0]} {thing[1]} {thing[2]}" if size else f"a {thing[1]} {thing[2]}"


def caption(scene, random):
    """All objects in reading order with their places; or, for one in five, how two of them stand to each other"""
    if len(scene) > 1 and random.random() < 0.2:
        for a, b in random.permutation(list(itertools.permutations(range(len(scene)), 2))):
            if relation := beside(scene[a], scene[b]):
                return f"{name(scene[a])} {relation} {name(scene[b])}"
    return full_caption(scene)


def full_caption(scene):
    return " and ".join(f"{name(thing)} in the {PLACES[thing[3]]}" for thing in scene)


def beside(a, b):
    """How a stands to b where they share a row or a column of the grid; nothing stands beside itself"""
    (ya, xa), (yb, xb) = divmod(a[3], 2), divmod(b[3], 2)
    if ya == yb and xa != xb:
        return "left of" if xa < xb else "right of"
    if xa == xb and ya != yb:
        return "above" if ya < yb else "below"
    return None


def questions(scene, random, brief=0.0):
    """-> {kind: list of (question, answer)}: all that can be asked about a scene without ambiguity.

    brief: in training, the share of things that are named by their shape alone where that suffices, else by their
    colour; so often existence is asked of one word. Named by both, the colour nearly always does, and a small model
    never learns to find by shape."""
    asked = {kind: [] for kind in KINDS}
    shapes, colours = [t[2] for t in scene], [t[1] for t in scene]
    pairs = {(t[1], t[2]) for t in scene}
    asked["count"].append(("How many objects are there?", NUMBERS[len(scene)]))
    for thing in scene:
        size, colour, shape, cell = thing
        called = f"{colour} {shape}"
        if random.random() < brief:
            called = shape if shapes.count(shape) == 1 else f"{colour} object" if colours.count(colour) == 1 else called
        if shapes.count(shape) == 1:
            asked["colour"].append((f"What colour is the {shape}?", colour))
        if colours.count(colour) == 1:
            asked["shape"].append((f"What shape is the {colour} object?", shape))
        asked["size"].append((f"How large is the {called}?", size))
        asked["where"].append((f"Where is the {called}?", PLACES[cell]))
        asked["exist"].append((f"Is there a {colour} {shape}?", "yes"))
        for side in ("left of", "right of", "above", "below"):
            there = [other for other in scene if beside(other, thing) == side]
            if there or random.random() < 0.15:
                asked["relation"].append((f"What is {side} the {called}?",
                                          name(there[0], False) if there else "nothing"))
        near = [(c, shape) for c in COLOURS] + [(colour, s) for s in SHAPES]                  # one attribute apart
        if random.random() < 0.2:
            near = list(itertools.product(COLOURS, SHAPES))
        near = [pair for pair in near if pair not in pairs | UNSEEN]                          # never taught as a no
        colour, shape = near[random.integers(len(near))]
        asked["exist"].append((f"Is there a {colour} {shape}?", "no"))
        if random.random() < brief:                       # of one word: of both it is learned last
            word = ONE_WORD[random.integers(len(ONE_WORD))]
            there = word in shapes or word.removesuffix(" object") in colours
            asked["exist"].append((f"Is there a {word}?", "yes" if there else "no"))
    for cell, place in enumerate(PLACES):
        there = [thing for thing in scene if thing[3] == cell]
        if there or random.random() < 0.3:
            asked["what"].append((f"What is in the {place}?", name(there[0], False) if there else "nothing"))
    return asked


KINDS = ("colour", "shape", "size", "count", "exist", "where", "what", "relation")
SHARES = np.array([2, 1, 2, 1, 5, 4, 5, 6]) / 26          # in training: what is learned late is asked more often
FIRST = np.array([8, 1, 4, 1, 2, 5, 2, 0]) / 23           # at first: what is found by its shape, and nothing about two


def ask(scene, random, rounds, shares=SHARES):
    """-> `rounds` different (question, answer); existence half yes, half no"""
    asked, chosen = questions(scene, random, brief=0.5), []
    for answer in ("yes", "no"):
        asked[answer] = [pair for pair in asked["exist"] if pair[1] == answer]
    while len(chosen) < rounds:
        kind = KINDS[random.choice(len(KINDS), p=shares)]
        if kind == "exist":
            kind = ("yes", "no")[random.integers(2)]
        if asked[kind] and (pair := asked[kind][random.integers(len(asked[kind]))]) not in chosen:
            chosen.append(pair)
    return chosen


def talk(scene, random, rounds=6, shares=SHARES):
    """Turns of a chat over one picture: short questions, or first a description"""
    pairs = ask(scene, random, rounds, shares)
    first = (DESCRIBE, 1, full_caption(scene)) if random.random() < 0.3 else (pairs[0][0] + SUFFIX, 1, pairs[0][1])
    return [first] + [(question, 0, answer) for question, answer in pairs[1:]]


def scenes(random, split, objects=None):
    """Endless scenes of one split, 1, 2 and 3 objects in turn unless `objects` is given"""
    for number in itertools.count():
        while split_of(scene := draw_scene(random, objects or 1 + number % 3)) != split:
            pass
        yield scene
