"""Everything a laptop needs in place of the web: the toy world's pictures and stand-ins for the public weights.

    python -m toy.make --out runs/toy          # minutes: captions, chats, questions, SentencePiece, CLIP, LLaMA

All of it is in public formats, so that the later stages read it as they read real data: a Hugging Face LLaMA and CLIP
vision tower, img2dataset shards, LLaVA JSON, and questions in the formats of the benchmarks.
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

from common.cli import POSITIVE, SEED, TOY, Help, run
from common.weights import save_tensors, write_json
from model import Libra, LibraConfig
from streams import Streams
from text import IMG, SYSTEM, open_text
from tokenizer import CLIP_MEAN, CLIP_STD, ClipViT, prepare
from toy import world


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
                caption = world.caption(scene, random)
                facts = {"caption": caption, "key": key, "status": "success"}
                for ending, content in (("jpg", jpeg(world.render(scene, random))),
                                        ("json", json.dumps(facts).encode()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_chats(folder, count, seed):
    """LLaVA's JSON and its pictures; as many, but at most 256, of held-out scenes for --val-data"""
    random = np.random.default_rng([seed, 3])
    (folder / "images").mkdir()
    for name, split, total in (("chat", "train", count), ("held_out", "held out", min(count, 256))):
        source, entries = world.scenes(np.random.default_rng([seed, 4]), split), []
        for number in range(total):
            scene, file = next(source), f"{'held_out_' * (split == 'held out')}{number:06d}.jpg"
            (folder / "images" / file).write_bytes(jpeg(world.render(scene, random)))
            entries.append({"id": f"toy-{number}", "image": file, "conversations": [
                {"from": speaker, "value": value} for question, n_images, answer in world.chat_turns(scene, random)
                for speaker, value in (("human", "<image>\n" * n_images + question), ("gpt", answer))]})
        write_json(folder / f"{name}.json", entries)


def write_evaluation(folder, count, seed):
    """`count` questions about held-out scenes, equally many of each kind and number of objects. A quarter as many about
    scenes with unseen pairs of colour and shape, in files of their own"""
    random = np.random.default_rng([seed, 5])
    (folder / "images").mkdir()
    strata = [(kind, n) for kind in world.KINDS for n in (1, 2, 3) if (kind, n) != ("relation", 1)]
    for split, total, first_id in (("held out", count, 0), ("unseen pair", count // 4, 10 ** 6)):
        sources, entries = {n: world.scenes(random, split, n) for n in (1, 2, 3)}, []
        for number in range(total):
            kind, n_objects = strata[number % len(strata)]
            fits = []
            while not fits:
                scene = next(sources[n_objects])
                fits = world.questions(scene, random)[kind]
                if kind == "exist":                       # half yes, half no; yes must be about an unseen pair if any
                    wanted = ("yes", "no")[number // len(strata) % 2]
                    fits = [pair for pair in fits if pair[1] == wanted]
                    if (split, wanted) == ("unseen pair", "yes"):
                        fits = [pair for pair in fits if any(f"{c} {s}" in pair[0] for c, s in world.UNSEEN)]
            question, answer = fits[random.integers(len(fits))]
            image = first_id + number
            Image.fromarray(world.render(scene, random)).save(folder / "images" / f"{image:012d}.png")
            entries.append((image, kind, n_objects, question, answer, world.full_caption(scene)))
        stem = f"{folder}/{split.replace(' ', '_')}_"
        write_vqa(stem, [(image, image, f"{kind}/{n}", question, answer)
                         for image, kind, n, question, answer, _ in entries])
        write_json(f"{stem}captions.json", [{"image": f"images/{image:012d}.png", "image_id": image,
                                             "caption": [caption]} for image, *_, caption in entries])
        pope = [{"question_id": n, "image": f"{image:012d}.png", "text": question, "label": answer}
                for n, (image, _, _, question, answer, _) in enumerate((e for e in entries if e[1] == "exist"), 1)]
        Path(f"{stem}pope.json").write_text("".join(json.dumps(question) + "\n" for question in pope))


def write_vqa(stem, entries):
    """Files in VQAv2's format, stem + questions.json and annotations.json. entries: (question id, image id, kind,
    question, answer)"""
    questions = [{"image_id": image, "question": question, "question_id": number}
                 for number, image, _, question, _ in entries]
    annotations = [{"image_id": image, "question_id": number, "question_type": kind,
                    "answer_type": "yes/no" if answer in ("yes", "no") else "other", "multiple_choice_answer": answer,
                    "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]}
                   for number, image, kind, _, answer in entries]
    write_json(f"{stem}questions.json", {"questions": questions})
    write_json(f"{stem}annotations.json", {"annotations": annotations})


def train_sentencepiece(folder, seed):
    """BPE with byte fallback and LLaMA's settings; each word of the maps is one piece."""
    random, lines = np.random.default_rng([seed, 6]), []
    for _, scene in zip(range(1500), world.scenes(random, "train")):
        lines += [world.caption(scene, random) + " ",
                  f"{SYSTEM} {world.SUFFIX.strip()} USER: {world.DESCRIBE} ASSISTANT: "]
        lines += [f"USER: {question} ASSISTANT: {answer} "
                  for question, answer in world.sample_questions(scene, random, 3)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=760, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=[world.map_word(obj) for obj in (None, *world.OBJECTS)], minloglevel=2)
    (folder / "tokenizer.vocab").unlink()


def text_rows(source, shares, random, count, text):
    """What the stand-in LLaMA reads: for each scene its map in place of a picture, then a caption or questions. -> ids
    and loss masks, a list for each scene"""
    rows, masks = [], []
    for scene in (next(source) for _ in range(count)):
        if random.random() < 0.15:
            ids, loss_mask = text.caption(world.caption(scene, random))
        else:
            turns = world.chat_turns(scene, random, shares)
            ids, loss_mask = text.chat(turns, SYSTEM if random.random() < 0.3 else "")
        words = [text.model.piece_to_id(word) for word in world.map_words(scene)]
        i = ids.index(IMG)
        rows.append(ids[:i] + words + ids[i + 1:])
        masks.append(loss_mask[:i] + [0] * len(words) + loss_mask[i + 1:])
    return rows, masks


def init_llama(model, text):
    """An initialization from which small models learn to look things up. Matrices have the scale of their width. K
    equals Q and O equals V transposed: a token attends to tokens like it and copies them. The output embedding equals
    the input embedding, and each word of the maps starts as the sum of the words that it stands for."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "vision" not in name:
            torch.nn.init.normal_(module.weight, std=module.in_features ** -0.5)
    for attention in (block.self_attn for block in model.model.layers):
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.T)
    embedding = torch.nn.init.normal_(model.model.embed_tokens.weight.data, std=0.1)
    for obj in world.OBJECTS:
        pieces = text.model.encode(" ".join(obj[:3]) + " " + world.PLACES[obj[3]])
        embedding[text.model.piece_to_id(world.map_word(obj))] = embedding[pieces].sum(0)
    model.lm_head.weight.data.copy_(embedding)


def train_llama(folder, steps, seed):
    """A LLaMA that has read text maps of scenes and can look things up in them. For the first 30 % of the steps scenes
    have two objects and questions ask for what is found by its shape; without that it never learns to."""
    train_sentencepiece(folder, seed)
    text = open_text(folder)
    sizes = {"vocab_size": text.vocab_size, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
             "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    config = LibraConfig(**sizes, use_expert=False, use_bridge=False)
    torch.manual_seed(seed)
    model = Libra(config)
    init_llama(model, text)
    random = np.random.default_rng([seed, 7])
    two_objects, any_number = world.scenes(random, "train", 2), world.scenes(random, "train")

    def loss(step):
        phase = (two_objects, world.EARLY_SHARES) if step < 0.3 * steps else (any_number, world.SHARES)
        rows, masks = text_rows(*phase, random, 16, text)
        ids = [torch.tensor(row)[:, None].expand(-1, config.vision_codebook_num) for row in rows]
        return model.loss(Streams.from_ids(ids, config, loss_mask=[torch.tensor(mask).bool() for mask in masks]))
    weights = {name: p for name, p in model.named_parameters() if not name.startswith(("vision", "model.vision"))}
    optimize("LLaMA", list(weights.values()), model.model.layers, loss, steps, 3e-3)
    save_tensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes})


def train_clip(folder, steps, seed):
    """A CLIP vision tower that has learned size, colour and shape of what each patch shows. It is not trained
    contrastively: at this size it would not learn shapes."""
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "image_size": world.SIDE, "patch_size": world.PATCH}
    torch.manual_seed(seed)
    clip, attributes = ClipViT(**sizes), [[None, *world.SIZES], [None, *world.COLOURS], [None, *world.SHAPES]]
    head = torch.nn.Linear(sizes["hidden_size"], sum(map(len, attributes)))
    random = np.random.default_rng([seed, 8])
    source = world.scenes(random, "train")
    labels_of = {world.map_word(None): [0, 0, 0]} | {
        world.map_word(obj): [names.index(name) for names, name in zip(attributes, obj)] for obj in world.OBJECTS}

    def loss(_):
        pictures, labels = [], []
        for scene in (next(source) for _ in range(32)):
            pictures.append(prepare(Image.fromarray(world.render(scene, random)), world.SIDE))
            labels += [labels_of[word] for word in world.map_words(scene)]
        features = clip.post_layernorm(clip.hidden_states(torch.stack(pictures))[-1][:, 1:])
        logits = head(features).flatten(0, 1).split([len(names) for names in attributes], dim=-1)
        return sum(torch.nn.functional.cross_entropy(x, y) for x, y in zip(logits, torch.tensor(labels).T))
    optimize("CLIP", [*clip.parameters(), *head.parameters()], clip.encoder, loss, steps, 2e-3)
    save_tensors(folder / "model.safetensors", {"vision_model." + k: v for k, v in clip.state_dict().items()})
    write_json(folder / "config.json", {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
                                        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **sizes})
    write_json(folder / "preprocessor_config.json", {
        "crop_size": world.SIDE, "size": world.SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3})


def optimize(name, parameters, layers, loss, steps, lr):
    """Muon for the matrices of the layers, AdamW for everything else; 100 steps of warm-up, then cosine"""
    matrices = [p for p in layers.parameters() if p.dim() == 2]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    groups = [[p for p in matrices if p.shape == shape] for shape in dict.fromkeys(p.shape for p in matrices)]
    momenta = [torch.zeros(len(group), *group[0].shape) for group in groups]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for step in bar:
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(matrices + others, 1.0)
        schedule = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        adamw.param_groups[0]["lr"] = lr * schedule
        adamw.step()
        for group, momentum in zip(groups, momenta):
            muon(group, momentum, lr * schedule)
        for p in matrices + others:
            p.grad = None
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")


@torch.no_grad()
def muon(matrices, momentum, lr):
    """A step of Muon for matrices of one shape: the gradient with momentum, made orthogonal by five Newton-Schulz steps
    and scaled like a step of AdamW. torch.optim.Muon computes in bfloat16, which is slow on many CPUs."""
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


def fill(folder, write, *words):
    """write(folder, *words) makes a folder, unless it is there; an interruption leaves only a draft"""
    if folder.exists():
        return print(f"{folder} exists", flush=True)
    draft, start = folder.with_name(f"{folder.name}.draft"), time.time()
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft, *words)
    draft.rename(folder)
    print(f"{folder} made in {time.time() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--out", type=Path, default=TOY, help="folder of the world")
    parser.add_argument("--seed", type=SEED, default=0, help="of everything")
    parser.add_argument("--captions", type=POSITIVE, default=12_000, help="pictures with captions")
    parser.add_argument("--chats", type=POSITIVE, default=12_000, help="pictures with conversations")
    parser.add_argument("--questions", type=POSITIVE, default=2_000, help="held-out questions")
    parser.add_argument("--llama-steps", type=POSITIVE, default=1_900, help="updates of the LLaMA")
    parser.add_argument("--clip-steps", type=POSITIVE, default=600, help="updates of the CLIP")
    args = parser.parse_args()
    for name, write, size in (("captions", write_captions, args.captions), ("chats", write_chats, args.chats),
                             ("eval", write_evaluation, args.questions), ("clip", train_clip, args.clip_steps),
                             ("llama", train_llama, args.llama_steps)):
        fill(args.out / name, write, size, args.seed)


if __name__ == "__main__":
    run(main)
