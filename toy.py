"""Everything a laptop needs in place of the web: the toy world's pictures and stand-ins for the public weights.

    python toy.py --out runs/toy          # minutes: captions, chats, questions, SentencePiece, CLIP, LLaMA

Nothing later knows that these are toys: the folders are a Hugging Face LLaMA, a Hugging Face CLIP vision tower,
img2dataset shards and LLaVA JSON, and questions in the formats of the public benchmarks.
"""
import argparse
import io
import json
import math
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from tqdm import tqdm

import world
from command import POSITIVE, SEED, Help, run
from config import LibraConfig
from generation import generate
from model import Libra
from streams import Streams
from text import IMG, SYSTEM, Text
from tokenizer import CLIP_MEAN, CLIP_STD, ClipViT, prepare
from weights import save_tensors, write_json

# ---------------------------------------------------------------- the stand-in LLaMA's text

def training_text(scene, random, text, shares=world.SHARES):
    """What the stand-in LLaMA reads: a drawn map where a picture would stand, then a caption or questions on it.
    -> ids, counted"""
    if random.random() < 0.15:
        ids, counted = text.caption(world.caption(scene, random))
    else:
        ids, counted = text.chat(world.talk(scene, random, shares=shares), SYSTEM if random.random() < 0.3 else "")
    return show_map(ids, counted, scene, text)


def show_map(ids, counted, scene, text):
    """The drawn map in place of the picture"""
    words = [text.model.piece_to_id(word) for word in world.map_words(scene)]
    at = ids.index(IMG)
    return ids[:at] + words + ids[at + 1:], counted[:at] + [0] * len(words) + counted[at + 1:]


# ---------------------------------------------------------------- files in the public formats

def jpeg(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def write_captions(folder, count, seed, per_shard=2000):
    """img2dataset shards: KEY.jpg, KEY.json, KEY.txt"""
    random, source = np.random.default_rng([seed, 1]), world.scenes(np.random.default_rng([seed, 2]), "train")
    for shard in range(-(-count // per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(min(per_shard, count - shard * per_shard)):
                scene, key = next(source), f"{shard:05d}{index:04d}"
                words = world.caption(scene, random)
                facts = {"url": "", "caption": words, "key": key, "status": "success", "error_message": None,
                         "exif": "{}", "width": world.SIDE, "height": world.SIDE,
                         "original_width": world.SIDE, "original_height": world.SIDE}
                picture = jpeg(world.render(scene, random))
                for ending, content in (("jpg", picture), ("json", json.dumps(facts, indent=4)), ("txt", words)):
                    content = content if isinstance(content, bytes) else content.encode()
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_chats(folder, images, count, seed):
    """LLaVA's JSON and the pictures it names"""
    random, source = np.random.default_rng([seed, 3]), world.scenes(np.random.default_rng([seed, 4]), "train")
    entries = []
    for number in range(count):
        scene, file = next(source), f"{number:06d}.jpg"
        (images / file).write_bytes(jpeg(world.render(scene, random)))
        lines = []
        for question, marks, answer in world.talk(scene, random):
            lines += [{"from": "human", "value": "<image>\n" * marks + question}, {"from": "gpt", "value": answer}]
        entries.append({"id": f"toy-{number}", "image": file, "conversations": lines})
    write_json(folder / "chat.json", entries)


def write_evaluation(folder, count, seed):
    """Held-out scenes: questions and annotations as VQAv2's, yes/no as POPE's, captions as COCO Karpathy's; the
    questions also as GQA's and, with four choices, as SEED-Bench's. The unseen pairs stand apart. Question types carry
    the kind and the number of objects: 'colour/2'."""
    random = np.random.default_rng([seed, 5])
    (folder / "images").mkdir()
    for split, total in (("held out", count), ("unseen pair", count // 4)):
        stem = split.replace(" ", "_")
        cells = [(kind, n) for kind in world.KINDS for n in (1, 2, 3) if (kind, n) != ("relation", 1)]
        source = {n: world.scenes(random, split, n) for n in (1, 2, 3)}
        asked, answers, captions, pope = [], [], [], []
        for number in range(total):
            kind, objects = cells[number % len(cells)]
            wanted = ("yes", "no")[number // len(cells) % 2] if kind == "exist" else None
            unseen = split == "unseen pair" and wanted == "yes"
            scene, question, answer = draw_question(source[objects], random, kind, wanted, unseen)
            image = len(asked) + (10 ** 6 if split == "unseen pair" else 0)
            Image.fromarray(world.render(scene, random)).save(folder / "images" / f"{image:012d}.png")
            asked.append({"image_id": image, "question": question, "question_id": image})
            answers.append({"image_id": image, "question_id": image, "question_type": f"{kind}/{objects}",
                            "answer_type": "yes/no" if kind == "exist" else "other", "multiple_choice_answer": answer,
                            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                                        for i in range(10)]})
            captions.append({"image": f"images/{image:012d}.png", "image_id": image,
                             "caption": [world.full_caption(scene)]})
            if kind == "exist":
                pope.append({"question_id": len(pope) + 1, "image": f"{image:012d}.png", "text": question,
                             "label": answer})
        write_json(folder / f"{stem}_questions.json", {"questions": asked})
        write_json(folder / f"{stem}_annotations.json", {"annotations": answers})
        write_json(folder / f"{stem}_captions.json", captions)
        (folder / f"{stem}_pope.json").write_text("".join(json.dumps(line) + "\n" for line in pope))
        write_json(folder / f"{stem}_gqa.json", {str(q["question_id"]): {
            "question": q["question"], "imageId": f"{q['image_id']:012d}", "answer": a["multiple_choice_answer"],
            "types": dict(zip(("structural", "semantic"), a["question_type"].split("/")))}
            for q, a in zip(asked, answers)})
        write_json(folder / f"{stem}_seed.json", {"questions": choices(seed, asked, answers),
                                                  "question_type": {kind: n for n, kind in enumerate(world.KINDS)}})


def draw_question(source, random, kind, wanted=None, unseen=False):
    """-> the next scene about which a question of this kind can be asked, one such question, its answer. wanted: the
    only answer that will do; unseen: it must be about one of the unseen pairs"""
    for scene in source:
        pairs = [pair for pair in world.questions(scene, random)[kind] if wanted in (None, pair[1])]
        if unseen:
            pairs = [pair for pair in pairs if any(f"{c} {s}" in pair[0] for c, s in world.UNSEEN)]
        if pairs:
            return scene, *pairs[random.integers(len(pairs))]


def choices(seed, asked, answers):
    """The questions that have four answers to choose from, as SEED-Bench's"""
    random, said, chosen = np.random.default_rng([seed, 9]), {}, []
    for answer in answers:
        said.setdefault(answer["question_type"].split("/")[0], set()).add(answer["multiple_choice_answer"])
    for question, answer in zip(asked, answers):
        kind, right = answer["question_type"].split("/")[0], answer["multiple_choice_answer"]
        if len(others := sorted(said[kind] - {right})) >= 3:
            shown = [others[i] for i in random.choice(len(others), 3, replace=False)]
            shown.insert(at := int(random.integers(4)), right)
            chosen.append({"question_id": question["question_id"], "question_type_id": world.KINDS.index(kind),
                           "data_type": "image", "data_id": f"{question['image_id']:012d}", "answer": "ABCD"[at],
                           "question": question["question"], **{f"choice_{c}": w for c, w in zip("abcd", shown)}})
    return chosen


# ---------------------------------------------------------------- the stand-ins

def train_sentencepiece(folder, seed):
    """BPE with byte fallback and LLaMA's settings; the words of the drawn maps are pieces of their own."""
    random = np.random.default_rng([seed, 6])

    def lines():
        for _, scene in zip(range(1500), world.scenes(random, "train")):
            yield world.caption(scene, random) + " "
            yield SYSTEM + " " + world.SUFFIX.strip() + f" USER: {world.DESCRIBE} ASSISTANT: "
            for question, answer in world.ask(scene, random, 3):
                yield f"USER: {question} ASSISTANT: {answer} "
    words = [world.map_word(None)] + [world.map_word(thing) for thing in world.THINGS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(), model_prefix=str(folder / "tokenizer"), vocab_size=760, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=words, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()


def begin_llama(model, text):
    """Start the stand-in where small models learn to look things up: matrices at the scale of their width; keys made as
    queries are, and outputs as values, so that a token attends to what is like it and copies it; the output words equal
    to the input words; and each word of the drawn maps the sum of what it stands for."""
    for module in model.llama():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features ** -0.5)
    for block in model.model.layers:
        attention = block.self_attn
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.T)
    words = torch.nn.init.normal_(model.model.embed_tokens.weight.data, std=0.1)
    for thing in world.THINGS:
        said = text.model.encode(" ".join(thing[:3]) + " " + world.PLACES[thing[3]])
        words[text.model.piece_to_id(world.map_word(thing))] = words[said].sum(0)
    model.lm_head.weight.data.copy_(words)


def train_llama(folder, steps, seed, batch=16, lr=3e-3, first=0.3):
    """A LLaMA that has read drawn maps and the talk about them, so that it can look things up in what it is shown. In
    its first part it reads of two things at a time and is asked for what it finds by shape: else it never learns to."""
    text = Text(folder / "tokenizer.model")
    config = LibraConfig(vocab_size=text.vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                         num_attention_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5, use_expert=False,
                         use_bridge=False)
    torch.manual_seed(seed)
    model = Libra(config)
    begin_llama(model, text)
    random = np.random.default_rng([seed, 7])
    two, all_sorts = world.scenes(random, "train", 2), world.scenes(random, "train")

    def loss(step):
        source, shares = (two, world.FIRST) if step < first * steps else (all_sorts, world.SHARES)
        rows = [training_text(next(source), random, text, shares) for _ in range(batch)]
        ids = [torch.tensor(ids)[:, None].expand(-1, config.vision_codebook_num) for ids, _ in rows]
        counted = [torch.tensor(counted, dtype=torch.bool) for _, counted in rows]
        return model.loss(Streams.of(ids, config, counted=counted))
    llama = {name: p for name, p in model.named_parameters() if not name.startswith(("vision", "model.vision"))}
    optimize("LLaMA", list(llama.values()), model.model.layers, loss, steps, lr)
    found = right_on_maps(model.eval(), text, seed)
    print("right on held-out maps:", ", ".join(f"{kind} {share:.2f}" for kind, share in found.items()), flush=True)
    save_tensors(folder / "model.safetensors", llama)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                                        **{key: getattr(config, key) for key in keys}})


@torch.no_grad()
def right_on_maps(model, text, seed, each=40):
    """{kind: share of held-out questions about two and three things that the stand-in answers right}: what it cannot
    look up in a map, a Libra of it will hardly find in a picture"""
    random, right = np.random.default_rng([seed, 10]), {}
    for kind in world.KINDS:
        prompts, truths, sources = [], [], [world.scenes(random, "held out", n) for n in (2, 3)]
        for number in range(each):
            wanted = ("yes", "no")[number // 2 % 2] if kind == "exist" else None
            scene, question, answer = draw_question(sources[number % 2], random, kind, wanted)
            ids, _ = show_map(*text.chat([(question + world.SUFFIX, 1, None)]), scene, text)
            prompts.append(torch.tensor(ids)[:, None].expand(-1, model.config.vision_codebook_num))
            truths.append(answer)
        rows = torch.stack([tokens[:, 0] for tokens in generate(model, prompts, None, 12, text.eos)], dim=1).tolist()
        right[kind] = sum(text.decode(row) == truth for row, truth in zip(rows, truths)) / each
    return right


def train_clip(folder, steps, seed, batch=32, lr=2e-3):
    """A CLIP vision tower that was taught what each patch shows (size, colour and shape), not contrastively: at this
    size a contrastive one does not learn shapes."""
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "image_size": world.SIDE, "patch_size": world.PATCH}
    torch.manual_seed(seed)
    clip, attributes = ClipViT(**sizes), [[None, *world.SIZES], [None, *world.COLOURS], [None, *world.SHAPES]]
    head = torch.nn.Linear(sizes["hidden_size"], sum(map(len, attributes)))
    random = np.random.default_rng([seed, 8])
    source = world.scenes(random, "train")

    def loss(_):
        shown, labels = [], []
        for _ in range(batch):
            scene = next(source)
            number = {world.map_word(thing): [names.index(word) for names, word in zip(attributes, thing)]
                      for thing in scene}
            shown.append(prepare(Image.fromarray(world.render(scene, random)), world.SIDE))
            labels += [number.get(word, [0, 0, 0]) for word in world.map_words(scene)]
        state = clip.post_layernorm(clip.hidden_states(torch.stack(shown))[-1][:, 1:])
        logits = head(state).flatten(0, 1).split([len(names) for names in attributes], dim=-1)
        return sum(torch.nn.functional.cross_entropy(x, y) for x, y in zip(logits, torch.tensor(labels).T))
    optimize("CLIP", [*clip.parameters(), *head.parameters()], clip.encoder, loss, steps, lr)
    save_tensors(folder / "model.safetensors", {"vision_model." + k: v for k, v in clip.state_dict().items()})
    write_json(folder / "config.json", {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
                                        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **sizes})
    write_json(folder / "preprocessor_config.json", {
        "crop_size": world.SIDE, "size": world.SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3})


def optimize(what, parameters, layers, loss, steps, lr):
    """Muon for the matrices of the layers, AdamW for all else; 100 steps of warm-up, cosine"""
    matrices = [p for p in layers.parameters() if p.dim() == 2]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    alike = [[p for p in matrices if p.shape == shape] for shape in dict.fromkeys(p.shape for p in matrices)]
    momenta = [torch.zeros(len(group), *group[0].shape) for group in alike]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    bar = tqdm(range(steps), desc=what, mininterval=5)
    for step in bar:
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(matrices + others, 1.0)
        rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        adamw.param_groups[0]["lr"] = min(lr, 3e-3) * rate
        adamw.step()
        for group, momentum in zip(alike, momenta):
            muon(group, momentum, lr * rate)
        for p in matrices + others:
            p.grad = None
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")


@torch.no_grad()
def muon(matrices, momentum, lr):
    """A step of Muon for matrices of one shape: along their gradients with momentum, made orthogonal by five steps of
    Newton and Schulz, as long as AdamW's usually are. torch.optim.Muon computes it in bfloat16, which many CPUs lack:
    two thirds of the CLIP's time there."""
    gradient = torch.stack([p.grad for p in matrices])                                        # (matrices, out, in)
    momentum.lerp_(gradient, 0.05)
    x = gradient.lerp(momentum, 0.95)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    for p, update in zip(matrices, x.mT if tall else x):
        p.sub_(update, alpha=0.2 * max(p.shape) ** 0.5 * lr)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the world")
    parser.add_argument("--seed", type=SEED, default=0, help="of everything")
    parser.add_argument("--captions", type=POSITIVE, default=12_000,
                        help="pictures with captions")
    parser.add_argument("--chats", type=POSITIVE, default=12_000,
                        help="pictures with conversations")
    parser.add_argument("--questions", type=POSITIVE, default=2_000, help="held-out questions")
    parser.add_argument("--llama-steps", type=POSITIVE, default=1_900,
                        help="updates of the LLaMA")
    parser.add_argument("--clip-steps", type=POSITIVE, default=600, help="updates of the CLIP")
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
    run(main)
