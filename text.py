"""Text (Sec. 3.1, Eq. 7): SentencePiece pieces around images, the chat template, and which labels count.

    text = Text("llama/tokenizer.model")
    ids, counted = text.chat([("What is this?", 1, "A cat.")])      # one image, then a question and its answer

A sequence is two lists: token ids, with IMG for a whole image, and `counted`, 1 where the token is a target of the
loss. It is built piece by piece, so no label mask is ever guessed from offsets in a string.
"""
from pathlib import Path

import sentencepiece
import torch

from weights import UserError

IMG = -1                     # stands for one whole image (BOI, codes, EOI) in a list of token ids
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")                                          # Eq. 10


class Text:
    """SentencePiece around images: the text before an image, after it and after </s> is encoded each on its own."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file. A LLaMA's folder and a Libra's hold their SentencePiece model under"
                            " this name; a run's checkpoints become a model folder with --resume --export")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a SentencePiece model (is it a git-lfs pointer or a cut download?)") from None
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()
        self.newline, self.blank = self.model.piece_to_id("<0x0A>"), self.model.piece_to_id("▁")
        self.vocab_size = self.model.vocab_size()
        if min(self.bos, self.eos) < 0 or not self.model.is_byte(self.newline):
            raise UserError(f"{path}: has no <s>, </s> or byte <0x0A>; expected a LLaMA-style model with byte fallback")
        if self._encode("\n")[-1:] != [self.newline]:
            raise UserError(f"{path}: its normaliser drops newlines; train it with normalization_rule_name=identity "
                            "and remove_extra_whitespaces=False")

    def _encode(self, text):
        """Control tokens spelled out in the text (<s>, </s>) stay text; lone surrogates become '?'."""
        return self.model.encode(text.encode("utf-8", "replace").decode("utf-8"))

    def _after_image(self, text):
        """What follows an EOI: one newline token and the text without a '▁' of its own."""
        ids = self._encode("\n" + text)
        return ids[1:] if ids[0] == self.blank else ids

    def plain(self, text):
        """<s> text"""
        return [self.bos] + self._encode(text)

    def caption(self, caption, end=True, image_first=True, most=None):
        """<s> [IMG] newline caption </s>, or for text to image <s> caption newline [IMG]  (Sec. 3.3, 4.3).

        most: tokens of the caption that are kept; a caption that was cut has no </s>. -> ids, counted
        """
        words = self._after_image(caption)[1:] if image_first else self._encode(caption)
        end = [self.eos] if end and image_first and (most is None or len(words) <= most) else []
        words = words[:most] + end
        if image_first:
            return [self.bos, IMG, self.newline] + words, [0, 1, 0] + [1] * len(words)
        return [self.bos] + words + [self.newline, IMG], [0] + [1] * len(words) + [0, 1]

    def chat(self, turns, system=SYSTEM):
        """The template of Eq. 7 over turns (question, number of images, answer); answer None leaves it open.

        Only answers with their </s> are counted (Eq. 8). -> ids, counted
        """
        ids, counted = [self.bos], [0]

        def add(piece, label=0):
            ids.extend(piece)
            counted.extend([label] * len(piece))

        for turn, (question, images, answer) in enumerate(turns):
            opening = f"{system} USER:" if turn == 0 and system else "USER:"
            if images:
                add(self._encode(opening))
                add([IMG, self.newline] * (images - 1) + [IMG])
                add(self._after_image(f"{question} ASSISTANT:"))
            else:
                add(self._encode(f"{opening} {question} ASSISTANT:"))
            if answer is not None:
                piece = self._encode(f"{answer} ") + [self.eos]
                lone = int(piece[0] == self.blank)        # a '▁' that is a token of its own belongs to the template
                add(piece[:lone])
                add(piece[lone:], 1)
        return ids, counted

    def decode(self, ids):
        """Text of generated ids: the lone '▁' before </s> and what follows </s> are dropped."""
        ids = ids[:ids.index(self.eos)] if self.eos in ids else ids
        return self.model.decode([i for i in ids if i not in (self.bos, self.eos)]).strip()


def cut(ids, counted, max_length, image_tokens, name="sample"):
    """Cut a sequence at its right to max_length positions, never through an image.

    Raises UserError naming the sample where no counted label is left (a loader skips it and counts it as no_label).
    """
    length = kept = 0
    for token in ids:
        length += image_tokens if token == IMG else 1
        if length > max_length:
            break
        kept += 1
    if not any(counted[:kept]):
        raise UserError(f"{name}: no label counts within {max_length} tokens "
                        f"({'the answer begins later' if any(counted) else 'it has no answer'})")
    return ids[:kept], counted[:kept]


def spell_out(ids, counted, images, config):
    """Put the ids of the images in the place of their marks.

    ids, counted: lists as Text makes them; images: a (G*G, K) tensor of codes for each mark; config: a LibraConfig.
    Image ids are offset by V, text ids stand in all K columns, as in the published code.
    -> ids (L, K) long, counted (L,) bool
    """
    books, boi = config.vision_codebook_num, config.vocab_size + config.codes
    if (marks := ids.count(IMG)) != len(images):
        raise UserError(f"the text has places for {marks} images, {len(images)} were given")
    rows, labels, images = [], [], iter(images)
    for token, label in zip(ids, counted):
        if token == IMG:
            edge = torch.full((1, books), boi)
            block = torch.cat([edge, next(images) + config.vocab_size, edge + 1])
            rows.append(block)
            labels += [0] + [label] * (len(block) - 1)                                        # BOI is never a target
        else:
            rows.append(torch.full((1, books), token))
            labels.append(label)
    return torch.cat(rows), torch.tensor(labels, dtype=torch.bool)
