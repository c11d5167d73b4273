"""Text (Sec. 3.1, Eq. 7): pieces around images, the chat template, and which tokens the loss counts.

    text = open_text("llama")                             # a folder with tokenizer.model or tokenizer.json
    ids, loss_mask = text.chat([("What is this?", 1, "A cat.")])      # one image, then a question and its answer

A sequence is two lists: token ids, with IMG for a whole image, and `loss_mask`, 1 where the token is a target of the
loss. Both grow piece by piece, so the mask never depends on offsets in a string.
"""
import re
import shutil
from itertools import accumulate
from pathlib import Path

import sentencepiece
import torch

from common.weights import UserError, check_file, read_json, replaced

IMG = -1                     # stands for one whole image (BOI, codes, EOI) in a list of token ids
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")                                          # Eq. 10
TEMPLATES = {   # what stands before the first question, before a later one, between question and answer
    "vicuna": ("{} USER: ", "USER: ", " ASSISTANT:"),
    "llama2": ("[INST] <<SYS>>\n{}\n<</SYS>>\n\n", "[INST] ", " [/INST]"),
    "llama3": ("<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
               "<|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    "chatml": ("<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n", "\n<|im_start|>user\n",
               "<|im_end|>\n<|im_start|>assistant\n"),
    "internlm2-chat": ("<|im_start|>system\n{}<|im_end|><|im_start|>user\n", "<|im_start|>user\n",     # InternVL's
                       "<|im_end|><|im_start|>assistant\n")}
ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "internlm2-chat": "<|im_end|>"}      # of an answer; else </s>
SIGNS = {"llama3": "<|start_header_id|>", "chatml": "<|im_start|>", "llama2": "<<SYS>>"}   # in a chat_template
SETTINGS = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.json"


class Text:
    """SentencePiece (LLaMA 1 and 2, Vicuna). The texts before an image, after it and after </s> are each encoded
    alone. start: the ids that begin a sequence; ends: those that end an answer, `eos` first."""
    template, begins_chat = "vicuna", True                # does `start` stand before a chat too?

    def __init__(self, path):
        self.path = check_file(path)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, ValueError):
            raise UserError(f"{path}: not a SentencePiece model (a git-lfs pointer, or a cut download?)") from None
        self.added = read_settings(self.path.parent, SETTINGS[0]).get("added_tokens_decoder")
        self.start, self.ends = [self.model.bos_id()], [self.model.eos_id()]
        self.newline, self.blank = (self._encode("\n") or [0])[-1], self.model.piece_to_id("▁")
        self.vocab_size, bytes_ = self.model.vocab_size(), self.model.is_byte(self.model.piece_to_id("<0x0A>"))
        if min(self.start + self.ends) < 0 or not bytes_ or self.model.decode([self.newline]) != "\n":
            raise UserError(f"{path}: expected a LLaMA-style model with <s>, </s>, byte fallback and newlines as they "
                            "are (normalization_rule_name=identity, remove_extra_whitespaces=False)")

    @property
    def eos(self):
        return self.ends[0]

    def use_template(self, name=None):
        """name: of TEMPLATES; "llm": the LLaMA's own, known by the files beside the tokenizer; None: what the model's
        config.json says, else vicuna. -> the name"""
        folder, jinja = self.path.parent, self.path.with_name("chat_template.jinja")
        *settings, config = (read_settings(folder, file) for file in (*SETTINGS, "config.json"))
        written = str([values.get("chat_template") for values in settings])
        written += jinja.read_text(encoding="utf-8", errors="replace") if jinja.is_file() else ""
        name = str(name or config.get("chat_template") or config.get("template") or "vicuna")
        if name == "llm":
            name = next((family for family, sign in SIGNS.items() if sign in written), None)
        if name not in TEMPLATES or name in ENDS and self.id_of(ENDS[name]) is None:
            raise UserError(f"{folder}: no chat template of a known family is there, or its tokens are not in the "
                            f"tokenizer; known: {', '.join(TEMPLATES)}. Give another --template, or none")
        self.template, self.begins_chat = name, name != "chatml" or "bos_token" in written
        if name in ENDS:
            self.ends = list(dict.fromkeys([self.id_of(ENDS[name]), *self.ends]))
        return name

    def id_of(self, token):
        """Of a control token -> id or None. tokenizer_config.json may rename a spare piece (InternLM2)."""
        for found, entry in self.added.items() if isinstance(self.added, dict) else ():
            if isinstance(entry, dict) and entry.get("content") == token and found.isdecimal():
                return int(found) if int(found) < self.vocab_size else None
        found = self.model.piece_to_id(token)
        return found if self.model.is_control(found) else None

    def _encode(self, text, control=False):
        """Control tokens written in the text (<s>, </s>) stay text, unless `control`, which templates need. Lone
        surrogates become '?'."""
        ids = []
        for part in re.split(r"(<\|\w+\|>)", text) if control else [text]:
            token = self.id_of(part) if part.startswith("<|") and control else None
            ids += self.model.encode(part.encode("utf-8", "replace").decode("utf-8")) if token is None else [token]
        return ids

    def _after_image(self, text):
        """The newline token that follows an EOI, and the text without a '▁' of its own"""
        ids = self._encode("\n" + text)
        return ids[1:] if ids[0] == self.blank else ids

    def _turn(self, opening, question, closing, n_images):
        """A turn up to its answer. The question is encoded together with the words before it: their last newline may
        form one token with the question's first. Control tokens that the question spells stay text."""
        marked = self.template in ENDS                    # the template begins and ends its turns with control tokens
        before, mark, role = opening.rpartition("|>") if marked else ("", "", opening)
        text, closing = (question, closing) if marked else (question + closing, "")
        words = self._encode(role + text) if not n_images else (
            self._encode(role.rstrip(" ")) + [IMG, self.newline] * (n_images - 1) + [IMG] + self._after_image(text))
        return self._encode(before + mark, control=True) + words + self._encode(closing, control=True)

    def _answer(self, answer):
        """-> ids that belong to the template, so are no targets (a '▁' that is its own token); ids of the answer"""
        if self.template in ENDS:
            return [], self._after_image(answer)[1:]
        ids = self._encode(f"{answer} ")
        return ([self.blank], ids[1:]) if ids[0] == self.blank else ([], ids)

    def plain(self, text):
        """<s> text"""
        return self.start + self._encode(text)

    def caption(self, caption, end=True, image_first=True, most=None):
        """<s> [IMG] newline caption </s>, or for text to image <s> caption newline [IMG] (Sec. 3.3, 4.3), with `most`
        tokens of the caption at most. A caption that is cut has no </s>. -> ids, loss_mask"""
        words = self._after_image(caption)[1:] if image_first else self._encode(caption)
        whole, no_targets = most is None or len(words) <= most, [0] * len(self.start)
        words = words[:most] + [self.eos] * bool(end and image_first and whole)
        if image_first:
            return self.start + [IMG, self.newline] + words, no_targets + [1, 0] + [1] * len(words)
        loss_mask = no_targets + [1] * len(words) + [0, 1]    # the first of all tokens is never a target
        return self.start + words + [self.newline, IMG], [0] + loss_mask[1:]

    def chat(self, turns, system=SYSTEM):
        """The template (Eq. 7) over turns (question, number of images, answer); an answer None is left open. Only
        answers with their end token are counted (Eq. 8). -> ids, loss_mask"""
        first, later, closing = TEMPLATES[self.template]
        ids = list(self.start) if self.begins_chat else []
        loss_mask = [0] * len(ids)
        for turn, (question, n_images, answer) in enumerate(turns):
            opening = later if turn else first.format(system) if system else later.lstrip("\n")   # "\n" ends an answer
            if self.template == "llama3":                 # as its own template does
                question, answer = question.strip(), answer if answer is None else answer.strip()
            prompt, target = self._turn(opening, question, closing, n_images), []
            if turn and self.template == "llama2":        # every turn begins with <s>
                prompt = self.start + prompt
            if answer is not None:
                of_template, words = self._answer(answer)
                prompt, target = prompt + of_template, words + [self.eos]
            ids += prompt + target
            loss_mask += [0] * len(prompt) + [1] * len(target)
        return ids, loss_mask

    def decode(self, ids):
        """Generated ids up to the first of `ends`, without the lone '▁' before it. Padding rows of the embedding have
        no piece."""
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return self.model.decode([i for i in ids[:end] if i not in self.start and i < self.vocab_size]).strip()

    def piece(self, token):
        """A token as it is shown"""
        return self.model.id_to_piece(token).replace("▁", " ")

    def save(self, folder):
        """Copy the files that were read into a model folder, and remove those that another tokenizer has left there."""
        check_file(self.path)                             # it may have been moved while a model was trained
        for name in ("tokenizer.model", "tokenizer.json", *SETTINGS, "chat_template.jinja"):
            old, new = self.path.with_name(name), Path(folder) / name
            if old.is_file():
                with replaced(new) as draft:
                    shutil.copyfile(old, draft)
            else:
                new.unlink(missing_ok=True)


class BytePairText(Text):
    """tokenizer.json with byte-level BPE (Llama 3, SmolLM2, Qwen 2.5), read by the package tokenizers. Behind an image
    stands the token of a newline alone; a space after it stays with the next word. Without a BOS `start` is empty. An
    answer begins with the template's space and ends without one."""

    def __init__(self, path):
        import tokenizers
        self.path = check_file(path)
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001        # the package raises nothing narrower
            raise UserError(f"{path}: cannot be read as a tokenizer ({str(error)[:99]})") from None
        self.model.no_padding()
        self.model.no_truncation()
        self.vocab_size = 1 + max(self.model.get_vocab().values(), default=-1)
        newline = self._encode("\n")
        if len(newline) != 1 or self.model.decode(newline) != "\n":
            raise UserError(f"{path}: expected byte-level BPE with a token for a newline and add_prefix_space false; a "
                            "SentencePiece model is read from its tokenizer.model")
        self.newline, self.start, self.ends = newline[0], self.special("bos")[:1], self.special("eos")
        if not self.ends:
            raise UserError(f"{path}: no end token; expected eos_token in the tokenizer_config.json beside it")

    def special(self, name):
        """Ids of the bos or eos token, by the first file that names it; for eos also those of generation_config.json"""
        files = [read_settings(self.path.parent, file) for file in SETTINGS]
        named = [settings[f"{name}_token"] for settings in files[:2] if f"{name}_token" in settings][:1]
        tokens = [token.get("content") if isinstance(token, dict) else token for token in named]
        ids = [self.id_of(str(token)) for token in tokens if token is not None]
        if name == "eos" or not named:
            more = files[2].get(f"{name}_token_id")
            ids += [i for i in (more if isinstance(more, list) else [more]) if i is not None]
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise UserError(f"{self.path.parent}: the {name} token is not in tokenizer.json: the files beside it are "
                            "another tokenizer's")
        return list(dict.fromkeys(ids))

    def id_of(self, token):
        return self.model.token_to_id(token)

    def _encode(self, text, control=False):
        self.model.encode_special_tokens = not control
        return self.model.encode(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False).ids

    def _after_image(self, text):
        return [self.newline] + self._encode(text)

    def _answer(self, answer):
        return [], self._encode(answer if self.template in ENDS else " " + answer)

    def piece(self, token):
        return self.model.decode([token], skip_special_tokens=False)


def read_settings(folder, name):
    """-> a JSON file's object, {} where there is none"""
    return read_json(path) if (path := Path(folder) / name).is_file() else {}


def open_text(folder):
    """The text of a model folder: its tokenizer.model, or its tokenizer.json. Where both are, they must agree."""
    pieces, bytes_ = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
    if not pieces.exists() and not bytes_.exists():
        raise UserError(f"{folder}: no tokenizer; expected tokenizer.model (SentencePiece) or tokenizer.json "
                        "(byte-level BPE)")
    if not pieces.exists():
        return BytePairText(bytes_)
    text = Text(pieces)
    if bytes_.exists():
        model = read_json(bytes_).get("model")
        ids = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(ids, dict) and any(ids.get(text.model.id_to_piece(i)) != i for i in range(text.vocab_size)):
            raise UserError(f"{folder}: tokenizer.model and tokenizer.json differ: remove that of another model")
    return text


def truncate(ids, loss_mask, max_length, image_tokens):
    """Cut a sequence at its right to max_length positions, never through an image"""
    lengths = accumulate(image_tokens if token == IMG else 1 for token in ids)
    n_kept = sum(length <= max_length for length in lengths)
    return ids[:n_kept], loss_mask[:n_kept]


def expand_images(ids, loss_mask, images, config):
    """Replace each IMG by the ids of its image. images: a (G*G, K) tensor of codes for each. Image ids are offset by V,
    text ids stand in all K columns, as in the published code. -> ids (L, K) long, loss_mask (L,) bool"""
    assert ids.count(IMG) == len(images)
    rows, expanded_mask, images = [], [], iter(images)
    boi = torch.full((1, config.vision_codebook_num), config.vocab_size + config.n_codes)     # EOI is BOI + 1
    for token, label in zip(ids, loss_mask):
        if token == IMG:
            rows.append(torch.cat([boi, next(images) + config.vocab_size, boi + 1]))
            expanded_mask += [0] + [label] * (len(rows[-1]) - 1)                              # BOI is never a target
        else:
            rows.append(torch.full_like(boi, token))
            expanded_mask.append(label)
    return torch.cat(rows), torch.tensor(expanded_mask, dtype=torch.bool)
