"""Text (Sec. 3.1, Eq. 7): SentencePiece pieces around images, the chat template, and which tokens the loss counts.

    text = Text("llama/tokenizer.model")
    ids, loss_mask = text.chat([("What is this?", 1, "A cat.")])      # one image, then a question and its answer

A sequence is two lists: token ids, with IMG for a whole image, and `loss_mask`, 1 where the token is a target of the
loss. Both grow piece by piece, so the mask never depends on offsets in a string.
"""
from itertools import accumulate

import sentencepiece
import torch

from common.weights import UserError, check_file

IMG = -1                     # stands for one whole image (BOI, codes, EOI) in a list of token ids
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")                                          # Eq. 10


class Text:
    """The text before an image, after it, and after </s> is encoded each on its own."""

    def __init__(self, path):
        self.path = check_file(path)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, ValueError):
            raise UserError(f"{path}: not a SentencePiece model (a git-lfs pointer, or a cut download?)") from None
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()
        self.newline, self.blank = self.model.piece_to_id("<0x0A>"), self.model.piece_to_id("▁")
        self.vocab_size = self.model.vocab_size()
        if min(self.bos, self.eos) < 0 or not (self.model.is_byte(self.newline) and self.newline in self._encode("\n")):
            raise UserError(f"{path}: expected a LLaMA-style model with <s>, </s>, byte fallback and newlines as they "
                            "are (normalization_rule_name=identity, remove_extra_whitespaces=False)")

    def _encode(self, text):
        """Control tokens written in the text (<s>, </s>) stay text; lone surrogates become '?'."""
        return self.model.encode(text.encode("utf-8", "replace").decode("utf-8"))

    def _after_image(self, text):
        """The newline token that follows an EOI, and the text without a '▁' of its own"""
        ids = self._encode("\n" + text)
        return ids[1:] if ids[0] == self.blank else ids

    def plain(self, text):
        """<s> text"""
        return [self.bos] + self._encode(text)

    def caption(self, caption, end=True, image_first=True, most=None):
        """<s> [IMG] newline caption </s>, or for text to image <s> caption newline [IMG] (Sec. 3.3, 4.3), with `most`
        tokens of the caption at most. A caption that is cut has no </s>. -> ids, loss_mask"""
        words = self._after_image(caption)[1:] if image_first else self._encode(caption)
        end = [self.eos] if end and image_first and (most is None or len(words) <= most) else []
        words = words[:most] + end
        if image_first:
            return [self.bos, IMG, self.newline] + words, [0, 1, 0] + [1] * len(words)
        return [self.bos] + words + [self.newline, IMG], [0] + [1] * len(words) + [0, 1]

    def chat(self, turns, system=SYSTEM):
        """The template of Eq. 7 over turns (question, number of images, answer); an answer None is left open. Only
        answers with their </s> are counted (Eq. 8). -> ids, loss_mask"""
        ids, loss_mask = [self.bos], [0]

        def add(piece, label=0):
            ids.extend(piece)
            loss_mask.extend([label] * len(piece))

        for turn, (question, n_images, answer) in enumerate(turns):
            opening = f"{system} USER:" if turn == 0 and system else "USER:"
            if n_images:
                add(self._encode(opening) + [IMG, self.newline] * (n_images - 1) + [IMG])
                add(self._after_image(f"{question} ASSISTANT:"))
            else:
                add(self._encode(f"{opening} {question} ASSISTANT:"))
            if answer is not None:
                piece = self._encode(f"{answer} ") + [self.eos]
                n_template = int(piece[0] == self.blank)  # a '▁' that is a token of its own belongs to the template
                add(piece[:n_template])
                add(piece[n_template:], 1)
        return ids, loss_mask

    def decode(self, ids):
        """Generated ids up to </s>, without the lone '▁' before it. Padding rows of the embedding have no piece."""
        ids = ids[:ids.index(self.eos)] if self.eos in ids else ids
        return self.model.decode([i for i in ids if i != self.bos and i < self.vocab_size]).strip()


def truncate(ids, loss_mask, max_length, image_tokens):
    """Cut a sequence at its right to max_length positions, never through an image"""
    lengths = accumulate(image_tokens if token == IMG else 1 for token in ids)
    end = sum(length <= max_length for length in lengths)
    return ids[:end], loss_mask[:end]


def expand_images(ids, loss_mask, images, config):
    """Replace each IMG by the ids of its image. images: a (G*G, K) tensor of codes for each. Image ids are offset by V,
    text ids stand in all K columns, as in the published code. -> ids (L, K) long, loss_mask (L,) bool"""
    assert ids.count(IMG) == len(images)
    rows, labels, images = [], [], iter(images)
    boi = torch.full((1, config.vision_codebook_num), config.vocab_size + config.codes)       # EOI is BOI + 1
    for token, label in zip(ids, loss_mask):
        if token == IMG:
            rows.append(torch.cat([boi, next(images) + config.vocab_size, boi + 1]))
            labels += [0] + [label] * (len(rows[-1]) - 1)                                     # BOI is never a target
        else:
            rows.append(torch.full_like(boi, token))
            labels.append(label)
    return torch.cat(rows), torch.tensor(labels, dtype=torch.bool)
