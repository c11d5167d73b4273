"""The toy world: pictures, captions, questions, and a detector that finds the objects in a picture. No learning here.

A picture has 56 x 56 pixels and shows one to three objects on a dark noisy background, each in a cell of a 2 x 2 grid.
A scene is a tuple of objects, an object is (size, colour, shape, cell). Held-out scenes have compositions that training
never shows; two pairs of colour and shape occur in no training scene. The caller's generator gives all random numbers.
"""
import itertools
import zlib

import numpy as np

SIDE, CELL, PATCH = 56, 28, 8                             # pixels: picture, cell of the grid, patch of the CLIP
WINDOWS = [np.s_[y:y + CELL, x:x + CELL] for y in (0, CELL) for x in (0, CELL)]               # pixels of each cell
SIZES = {"small": 6, "large": 11}                         # radius in pixels
COLOURS = {"red": (220, 50, 40), "green": (50, 180, 70), "blue": (60, 90, 230), "yellow": (235, 210, 50),
           "purple": (165, 70, 205)}
SHAPES = ("circle", "square", "triangle")
OBJECTS = tuple(itertools.product(SIZES, COLOURS, SHAPES, range(4)))
UNSEEN = {("green", "triangle"), ("purple", "square")}    # pairs that no training scene shows
CLEAN, UNCLEAR = (None,) * 3, ("unclear",) * 3            # what the detector says of a cell without an object
PLACES = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = {(0, -1): "left of", (0, 1): "right of", (-1, 0): "above", (1, 0): "below"}       # row and column differ by
NUMBERS = ("no", "one", "two", "three")
SUFFIX = "\nAnswer the question using a single word or phrase."
DESCRIBE = "Describe the image."
KINDS = ("colour", "shape", "size", "count", "exist", "where", "what", "relation")
SHARES = np.array([2, 1, 2, 1, 5, 4, 5, 6]) / 26          # of the kinds in training: more of what is learned late
EARLY_SHARES = np.array([8, 1, 4, 1, 2, 5, 2, 0]) / 23    # early in training: find objects by shape, no relations


def shape_mask(shape, radius):
    """Coverage of a cell by a shape at its centre, (28, 28) in [0, 1], from 4 x 4 samples a pixel"""
    y, x = (np.mgrid[:CELL * 4, :CELL * 4] + 0.5) / 4 - CELL / 2
    inside = {"circle": x ** 2 + y ** 2 <= radius ** 2,
              "square": np.maximum(abs(x), abs(y)) <= radius * 0.89,
              "triangle": (y <= radius * 0.87) & (y >= 2 * abs(x) - radius)}[shape]
    return inside.reshape(CELL, 4, CELL, 4).mean((1, 3))


MASKS = {(size, shape): shape_mask(shape, radius) for size, radius in SIZES.items() for shape in SHAPES}
SHIFTED_MASKS = {(*key, shift): np.roll(mask, shift, (0, 1)) for key, mask in MASKS.items()
                 for shift in itertools.product(range(-2, 3), repeat=2)}


def split_of(scene):
    """-> 'train', 'held out' (12 % of the compositions, regardless of the cells) or 'unseen pair'"""
    if any(obj[1:3] in UNSEEN for obj in scene):
        return "unseen pair"
    composition = "".join(sorted("".join(obj[:3]) for obj in scene))
    return "held out" if zlib.crc32(f"7{composition}".encode()) % 100 < 12 else "train"


def scenes(random, split, n_objects=None):
    """Endless scenes of one split, with 1, 2 and 3 objects in turn unless n_objects is given. Objects are in the order
    of their cells and differ in colour or shape."""
    pairs, sizes = list(itertools.product(COLOURS, SHAPES)), list(SIZES)
    for number in itertools.count():
        scene, n = None, n_objects or 1 + number % 3
        while scene is None or split_of(scene) != split:
            chosen = random.choice(len(pairs), n, replace=False)
            cells = sorted(random.choice(4, n, replace=False).tolist())
            scene = tuple((sizes[random.integers(2)], *pairs[i], cell) for i, cell in zip(chosen, cells))
        yield scene


def render(scene, random):
    """-> (56, 56, 3) uint8"""
    picture = random.integers(8, 33) + random.normal(0, 5, (SIDE, SIDE, 1)) + random.normal(0, 2, (SIDE, SIDE, 3))
    for size, colour, shape, cell in scene:
        mask = np.roll(MASKS[size, shape], random.integers(-1, 2, 2), (0, 1))[..., None]
        part = picture[WINDOWS[cell]]
        part[:] = part * (1 - mask) + mask * (np.array(COLOURS[colour]) + random.normal(0, 3, 3))
    return picture.clip(0, 255).round().astype(np.uint8)


def detect(picture):
    """(56, 56, 3) uint8 -> for each cell (size, colour, shape), CLEAN for mere background, or UNCLEAR"""
    found, palette = [], np.array(list(COLOURS.values()), dtype=float)
    for window in WINDOWS:
        part = picture[window].astype(float)
        brightness = part.max(-1)
        bright = brightness > 90
        if bright.sum() < 12:
            found.append(CLEAN)
            continue
        mean = part[bright].mean(0)
        cosine = palette @ mean / np.linalg.norm(palette, axis=1) / np.linalg.norm(mean)      # the hue decides
        weight = np.clip(brightness / max(np.percentile(brightness[bright], 60), 1), 0, 1) * bright
        overlaps = {key: np.minimum(weight, mask).sum() / np.maximum(weight, mask).sum()
                    for key, mask in SHIFTED_MASKS.items()}
        (size, shape, _), overlap = max(overlaps.items(), key=lambda item: item[1])
        clear = overlap > 0.6 and cosine.max() > 0.93
        found.append((size, list(COLOURS)[cosine.argmax()], shape) if clear else UNCLEAR)
    return found


def map_word(obj):
    """The word for an object and its cell in the text maps that the stand-in LLaMA reads; None: background"""
    return f"<{obj[0][0]}{obj[1][0]}{obj[2][0]}{obj[3]}>" if obj else "<.>"


def map_words(scene):
    """The scene as a list of 7 x 7 words, each for what covers most of a patch"""
    coverage = np.zeros((1 + len(scene), SIDE, SIDE))
    coverage[0] = 0.2                                     # the background
    for layer, (size, _, shape, cell) in zip(coverage[1:], scene):
        layer[WINDOWS[cell]] = MASKS[size, shape]
    grid = SIDE // PATCH
    largest = coverage.reshape(-1, grid, PATCH, grid, PATCH).mean((2, 4)).argmax(0).flatten()
    return [map_word((None, *scene)[number]) for number in largest]


def caption(scene, random):
    """All objects with their places; or, for one scene in five, how two of them stand to each other"""
    if len(scene) > 1 and random.random() < 0.2:
        for a, b in random.permutation(list(itertools.permutations(range(len(scene)), 2))):
            if relation := relation_of(scene[a], scene[b]):
                return f"a {' '.join(scene[a][:3])} {relation} a {' '.join(scene[b][:3])}"
    return full_caption(scene)


def full_caption(scene):
    return " and ".join(f"a {size} {colour} {shape} in the {PLACES[cell]}" for size, colour, shape, cell in scene)


def relation_of(a, b):
    """How object a stands to object b if they share a row or a column of the grid, else None"""
    (row_a, column_a), (row_b, column_b) = divmod(a[3], 2), divmod(b[3], 2)
    return RELATIONS.get((row_a - row_b, column_a - column_b))


def questions(scene, random, short_names=0.0):
    """-> {kind: list of (question, answer)}: all that can be asked about a scene without ambiguity.

    short_names: share of the objects that are named by shape alone or by colour alone where that is unambiguous; as
    often existence is asked of one word, too. If every name had both, a small model would never learn to find by shape.
    """
    asked = {kind: [] for kind in KINDS}
    colours, shapes = [obj[1] for obj in scene], [obj[2] for obj in scene]
    asked["count"].append(("How many objects are there?", NUMBERS[len(scene)]))
    for obj in scene:
        size, colour, shape, cell = obj
        name, is_short = f"{colour} {shape}", random.random() < short_names
        if colours.count(colour) == 1:
            asked["shape"].append((f"What shape is the {colour} object?", shape))
            name = f"{colour} object" if is_short else name
        if shapes.count(shape) == 1:
            asked["colour"].append((f"What colour is the {shape}?", colour))
            name = shape if is_short else name
        asked["size"].append((f"How large is the {name}?", size))
        asked["where"].append((f"Where is the {name}?", PLACES[cell]))
        for side in RELATIONS.values():
            answers = [f"a {other[1]} {other[2]}" for other in scene if relation_of(other, obj) == side]
            if answers or random.random() < 0.15:
                asked["relation"].append((f"What is {side} the {name}?", (answers or ["nothing"])[0]))
        absent = [(other, shape) for other in COLOURS] + [(colour, other) for other in SHAPES]
        if random.random() < 0.2:                         # else only one attribute differs
            absent = list(itertools.product(COLOURS, SHAPES))
        absent = [pair for pair in absent if pair not in {*zip(colours, shapes)} | UNSEEN]   # never a "no" about UNSEEN
        other_colour, other_shape = absent[random.integers(len(absent))]
        asked["exist"] += [(f"Is there a {colour} {shape}?", "yes"),
                           (f"Is there a {other_colour} {other_shape}?", "no")]
        if random.random() < short_names:
            word = [*(f"{word} object" for word in COLOURS), *SHAPES][random.integers(len(COLOURS) + len(SHAPES))]
            answer = "yes" if word.removesuffix(" object") in colours + shapes else "no"
            asked["exist"].append((f"Is there a {word}?", answer))
    for cell, place in enumerate(PLACES):
        answers = [f"a {colour} {shape}" for _, colour, shape, cell_of_object in scene if cell_of_object == cell]
        if answers or random.random() < 0.3:
            asked["what"].append((f"What is in the {place}?", (answers or ["nothing"])[0]))
    return asked


def sample_questions(scene, random, count, shares=SHARES):
    """-> `count` different pairs (question, answer); of those about existence, half are answered yes and half no"""
    asked, chosen = questions(scene, random, short_names=0.5), []
    for answer in ("yes", "no"):
        asked[answer] = [pair for pair in asked["exist"] if pair[1] == answer]
    while len(chosen) < count:
        kind = KINDS[random.choice(len(KINDS), p=shares)]
        if kind == "exist":
            kind = ("yes", "no")[random.integers(2)]
        if asked[kind] and (pair := asked[kind][random.integers(len(asked[kind]))]) not in chosen:
            chosen.append(pair)
    return chosen


def chat_turns(scene, random, shares=SHARES):
    """-> six turns (question, number of images, answer) about one picture; some chats begin with a description"""
    (question, answer), *others = sample_questions(scene, random, 6, shares)
    first = (DESCRIBE, 1, full_caption(scene)) if random.random() < 0.3 else (question + SUFFIX, 1, answer)
    return [first] + [(question, 0, answer) for question, answer in others]
