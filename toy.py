"""A small rendered world and stand-ins for the public weights, in the public formats: everything a laptop needs.

    python toy.py --out runs/toy          # minutes: scenes, captions, chats, questions, SentencePiece, LLaMA, CLIP

The world: 56 x 56 pictures of one to three objects, each a circle, square or triangle of one of five colours and two
sizes in a cell of a 2 x 2 grid, on a dark noisy background. Nothing later knows that these are toys: the folders are a
Hugging Face LLaMA, a Hugging Face CLIP vision tower, img2dataset shards and LLaVA JSON, and questions in the formats of
the public benchmarks.
"""
import argparse
import io
import itertools
import json
import math
import shutil
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from tqdm import tqdm

from config import LibraConfig
from model import Libra
from streams import Streams
from text import IMG, SYSTEM, Text
from tokenizer import CLIP_MEAN, CLIP_STD, ClipViT, prepare
from weights import save_tensors, write_json

# ---------------------------------------------------------------- the world

SIDE, CELL = 56, 28
SIZES = {"small": 6, "large": 11}                         # radius in pixels
COLOURS = {"red": (220, 50, 40), "green": (50, 180, 70), "blue": (60, 90, 230), "yellow": (235, 210, 50),
           "purple": (165, 70, 205)}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("no", "one", "two", "three")
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


# ---------------------------------------------------------------- what is said about a scene

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
    """How a stands to b where they share a row or a column of the grid"""
    (ya, xa), (yb, xb) = divmod(a[3], 2), divmod(b[3], 2)
    if ya == yb:
        return "left of" if xa < xb else "right of"
    if xa == xb:
        return "above" if ya < yb else "below"
    return None


def questions(scene, random, brief=0.0):
    """-> {kind: list of (question, answer)}: all that can be asked about a scene without ambiguity.

    brief: in training, the share of things that are named by their shape or colour alone where that suffices. Named by
    both, the colour nearly always does, and a small model never learns to find a thing by its shape."""
    asked = {kind: [] for kind in KINDS}
    shapes, colours = [t[2] for t in scene], [t[1] for t in scene]
    pairs = {(t[1], t[2]) for t in scene}
    asked["count"].append(("How many objects are there?", NUMBERS[len(scene)]))
    for thing in scene:
        size, colour, shape, cell = thing
        called = [f"{colour} {shape}"]
        if random.random() < brief:
            alone = [shape] * (shapes.count(shape) == 1) + [f"{colour} object"] * (colours.count(colour) == 1)
            called = alone or called
        called = called[random.integers(len(called))]
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
    for cell, place in enumerate(PLACES):
        there = [thing for thing in scene if thing[3] == cell]
        if there or random.random() < 0.3:
            asked["what"].append((f"What is in the {place}?", name(there[0], False) if there else "nothing"))
    return asked


KINDS = ("colour", "shape", "size", "count", "exist", "where", "what", "relation")
SHARES = np.array([6, 1, 1, 1, 5, 2, 4, 5]) / 25          # in training: what is learned late is asked more often


def ask(scene, random, rounds):
    """-> `rounds` different (question, answer); existence half yes, half no"""
    asked, chosen = questions(scene, random, brief=0.5), []
    for answer in ("yes", "no"):
        asked[answer] = [pair for pair in asked["exist"] if pair[1] == answer]
    while len(chosen) < rounds:
        kind = KINDS[random.choice(len(KINDS), p=SHARES)]
        if kind == "exist":
            kind = ("yes", "no")[random.integers(2)]
        if asked[kind] and (pair := asked[kind][random.integers(len(asked[kind]))]) not in chosen:
            chosen.append(pair)
    return chosen


# ---------------------------------------------------------------- the stand-in LLaMA's text

PATCH = 8
SUFFIX = "\nAnswer the question using a single word or phrase."
DESCRIBE = "Describe the image."


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


def training_text(scene, random, text):
    """What the stand-in LLaMA reads: a drawn map where a picture would stand, then a caption or questions on it.
    -> ids, counted"""
    if random.random() < 0.15:
        ids, counted = text.caption(caption(scene, random))
    else:
        ids, counted = text.chat(talk(scene, random), SYSTEM if random.random() < 0.3 else "")
    words = [text.model.piece_to_id(word) for word in map_words(scene)]
    at = ids.index(IMG)
    return ids[:at] + words + ids[at + 1:], counted[:at] + [0] * len(words) + counted[at + 1:]


def talk(scene, random, rounds=6):
    """Turns of a chat over one picture: short questions, or first a description"""
    pairs = ask(scene, random, rounds)
    first = (DESCRIBE, 1, full_caption(scene)) if random.random() < 0.2 else (pairs[0][0] + SUFFIX, 1, pairs[0][1])
    return [first] + [(question, 0, answer) for question, answer in pairs[1:]]


def scenes(random, split, objects=None):
    """Endless scenes of one split, 1, 2 and 3 objects in turn unless `objects` is given"""
    for number in itertools.count():
        while split_of(scene := draw_scene(random, objects or 1 + number % 3)) != split:
            pass
        yield scene


# ---------------------------------------------------------------- files in the public formats

def jpeg(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def write_captions(folder, count, seed, per_shard=2000):
    """img2dataset shards: KEY.jpg, KEY.json, KEY.txt"""
    random, source = np.random.default_rng([seed, 1]), scenes(np.random.default_rng([seed, 2]), "train")
    for shard in range(-(-count // per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(min(per_shard, count - shard * per_shard)):
                scene, key = next(source), f"{shard:05d}{index:04d}"
                words = caption(scene, random)
                facts = {"url": "", "caption": words, "key": key, "status": "success", "error_message": None,
                         "width": SIDE, "height": SIDE, "original_width": SIDE, "original_height": SIDE, "exif": "{}"}
                for ending, content in (("jpg", jpeg(render(scene, random))), ("json", json.dumps(facts, indent=4)),
                                        ("txt", words)):
                    content = content if isinstance(content, bytes) else content.encode()
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_chats(folder, images, count, seed):
    """LLaVA's JSON and the pictures it names"""
    random, source = np.random.default_rng([seed, 3]), scenes(np.random.default_rng([seed, 4]), "train")
    entries = []
    for number in range(count):
        scene, file = next(source), f"{number:06d}.jpg"
        (images / file).write_bytes(jpeg(render(scene, random)))
        lines = []
        for question, marks, answer in talk(scene, random):
            lines += [{"from": "human", "value": "<image>\n" * marks + question}, {"from": "gpt", "value": answer}]
        entries.append({"id": f"toy-{number}", "image": file, "conversations": lines})
    write_json(folder / "chat.json", entries)


def write_evaluation(folder, count, seed):
    """Held-out scenes: questions and annotations as VQAv2's, yes/no as POPE's, captions as COCO Karpathy's. The unseen
    pairs stand apart. Question types carry the kind and the number of objects: 'colour/2'."""
    random = np.random.default_rng([seed, 5])
    (folder / "images").mkdir()
    for split, total in (("held out", count), ("unseen pair", count // 4)):
        stem = split.replace(" ", "_")
        cells = [(kind, n) for kind in KINDS for n in (1, 2, 3) if (kind, n) != ("relation", 1)]
        source = {n: scenes(random, split, n) for n in (1, 2, 3)}
        asked, answers, captions, pope = [], [], [], []
        for number in range(total):
            kind, objects = cells[number % len(cells)]
            wanted = ("yes", "no")[number // len(cells) % 2] if kind == "exist" else None
            while True:
                scene = next(source[objects])
                pairs = [pair for pair in questions(scene, random)[kind] if wanted in (None, pair[1])]
                if split == "unseen pair" and kind == "exist" and wanted == "yes":
                    pairs = [pair for pair in pairs if any(f"{c} {s}" in pair[0] for c, s in UNSEEN)]
                if pairs:
                    break
            question, answer = pairs[random.integers(len(pairs))]
            image = len(asked) + (10 ** 6 if split == "unseen pair" else 0)
            Image.fromarray(render(scene, random)).save(folder / "images" / f"{image:012d}.png")
            asked.append({"image_id": image, "question": question, "question_id": image})
            answers.append({"image_id": image, "question_id": image, "question_type": f"{kind}/{objects}",
                            "answer_type": "yes/no" if kind == "exist" else "other", "multiple_choice_answer": answer,
                            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                                        for i in range(10)]})
            captions.append({"image": f"images/{image:012d}.png", "caption": [full_caption(scene)], "image_id": image})
            if kind == "exist":
                pope.append({"question_id": len(pope) + 1, "image": f"{image:012d}.png", "text": question,
                             "label": answer})
        write_json(folder / f"{stem}_questions.json", {"questions": asked})
        write_json(folder / f"{stem}_annotations.json", {"annotations": answers})
        write_json(folder / f"{stem}_captions.json", captions)
        (folder / f"{stem}_pope.json").write_text("".join(json.dumps(line) + "\n" for line in pope))


# ---------------------------------------------------------------- the stand-ins

def train_sentencepiece(folder, seed):
    """BPE with byte fallback and LLaMA's settings; the words of the drawn maps are pieces of their own."""
    random = np.random.default_rng([seed, 6])

    def lines():
        for _, scene in zip(range(1500), scenes(random, "train")):
            yield caption(scene, random) + " "
            yield SYSTEM + " " + SUFFIX.strip() + f" USER: {DESCRIBE} ASSISTANT: "
            for question, answer in ask(scene, random, 3):
                yield f"USER: {question} ASSISTANT: {answer} "
    words = [map_word(None)] + [map_word((*thing, cell)) for thing in itertools.product(SIZES, COLOURS, SHAPES)
                                for cell in range(4)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(), model_prefix=str(folder / "tokenizer"), vocab_size=760, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=words, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()


def begin_llama(model, text):
    """Start the stand-in where small models learn fast: matrices at the scale of their width, the output words equal to
    the input words, and each word of the drawn maps the sum of what it stands for."""
    for module in model.llama():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features ** -0.5)
    words = torch.nn.init.normal_(model.model.embed_tokens.weight.data, std=0.1)
    for thing in itertools.product(SIZES, COLOURS, SHAPES, range(4)):
        said = text.model.encode(" ".join(thing[:3]) + " " + PLACES[thing[3]])
        words[text.model.piece_to_id(map_word(thing))] = words[said].sum(0)
    model.lm_head.weight.data.copy_(words)


def train_llama(folder, steps, seed, batch=16, lr=3e-3):
    """A LLaMA that has read drawn maps and the talk about them, so that it can look things up in what it is shown"""
    text = Text(folder / "tokenizer.model")
    config = LibraConfig(vocab_size=text.vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                         num_attention_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5, use_expert=False,
                         use_bridge=False)
    torch.manual_seed(seed)
    model = Libra(config)
    begin_llama(model, text)
    random = np.random.default_rng([seed, 7])
    source = scenes(random, "train")

    def loss():
        rows = [training_text(next(source), random, text) for _ in range(batch)]
        ids = [torch.tensor(ids)[:, None].expand(-1, config.vision_codebook_num) for ids, _ in rows]
        counted = [torch.tensor(counted, dtype=torch.bool) for _, counted in rows]
        return model.loss(Streams.of(ids, config, counted=counted))
    optimize("LLaMA", [p for module in model.llama() for p in module.parameters()], loss, steps, lr)
    names = {id(p) for module in model.llama() for p in module.parameters()}
    save_tensors(folder / "model.safetensors", {k: p for k, p in model.named_parameters() if id(p) in names})
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                                        **{key: getattr(config, key) for key in keys}})


def train_clip(folder, steps, seed, batch=32, lr=2e-3):
    """A CLIP vision tower that was taught what each patch shows (size, colour and shape), not contrastively: at this
    size a contrastive one does not learn shapes."""
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "image_size": SIDE, "patch_size": PATCH}
    torch.manual_seed(seed)
    clip, attributes = ClipViT(**sizes), [[None, *SIZES], [None, *COLOURS], [None, *SHAPES]]
    head = torch.nn.Linear(sizes["hidden_size"], sum(map(len, attributes)))
    random = np.random.default_rng([seed, 8])
    source = scenes(random, "train")

    def loss():
        shown, labels = [], []
        for _ in range(batch):
            scene = next(source)
            number = {map_word(thing): [names.index(word) for names, word in zip(attributes, thing)] for thing in scene}
            shown.append(prepare(Image.fromarray(render(scene, random)), SIDE))
            labels += [number.get(word, [0, 0, 0]) for word in map_words(scene)]
        state = clip.post_layernorm(clip.hidden_states(torch.stack(shown))[-1][:, 1:])
        logits = head(state).flatten(0, 1).split([len(names) for names in attributes], dim=-1)
        return sum(torch.nn.functional.cross_entropy(x, y) for x, y in zip(logits, torch.tensor(labels).T))
    optimize("CLIP", [*clip.parameters(), *head.parameters()], loss, steps, lr)
    save_tensors(folder / "model.safetensors", {"vision_model." + k: v for k, v in clip.state_dict().items()})
    write_json(folder / "config.json", {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
                                        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **sizes})
    write_json(folder / "preprocessor_config.json", {
        "crop_size": SIDE, "size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3})


def optimize(what, parameters, loss, steps, lr):
    """AdamW, 100 steps of warm-up, cosine"""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    bar = tqdm(range(steps), desc=what, mininterval=5)
    for step in bar:
        rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")


# ---------------------------------------------------------------- the script

def stage(folder, make):
    """Run `make(draft folder)` unless the folder is there already; a broken-off run leaves only a draft."""
    if folder.exists():
        print(f"{folder} is there", flush=True)
        return
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    began = time.time()
    make(draft)
    draft.rename(folder)
    print(f"{folder} made in {time.time() - began:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the world (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    parser.add_argument("--captions", type=int, default=12_000, help="pictures with captions (default: %(default)s)")
    parser.add_argument("--chats", type=int, default=12_000, help="pictures with conversations (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=2_000, help="held-out questions (default: %(default)s)")
    parser.add_argument("--llama-steps", type=int, default=2_500, help="updates of the LLaMA (default: %(default)s)")
    parser.add_argument("--clip-steps", type=int, default=800, help="updates of the CLIP (default: %(default)s)")
    args = parser.parse_args()

    def chats(folder):
        (folder / "images").mkdir()
        write_chats(folder, folder / "images", args.chats, args.seed)

    def llama(folder):
        train_sentencepiece(folder, args.seed)
        train_llama(folder, args.llama_steps, args.seed)
    stage(args.out / "captions", lambda folder: write_captions(folder, args.captions, args.seed))
    stage(args.out / "chats", chats)
    stage(args.out / "eval", lambda folder: write_evaluation(folder, args.questions, args.seed))
    stage(args.out / "clip", lambda folder: train_clip(folder, args.clip_steps, args.seed))
    stage(args.out / "llama", llama)


if __name__ == "__main__":
    main()
