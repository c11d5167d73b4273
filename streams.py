"""A batch as two streams: all text tokens in one tensor, all image tokens in another, no padding in either (Fig. 1).

Text goes through the LLaMA and image tokens through the visual expert, as plain matrix products; the streams are merged
in sequence order only for attention. What depends on the ids is worked out here, once a batch, on the CPU.

Letters: B rows, L positions of the longest row, K codebooks, V text vocabulary, G side of the grid of codes, C width of
the contiguous signal E_c, W any width.
"""
import torch
import torch.nn.functional as F

from common.weights import UserError

TEXT, IMAGE = 0, 1                                        # the two modalities


class Streams:
    """Attributes
    lengths: list of B ints, the tokens of each row; a token's position is the number of tokens before it
    text_ids (n_text,), image_ids (n_image, K) without the offset V: codes from 0, BOI = N and EOI = N + 1
    text_index (n_text,), image_index (n_image,): place of each token in the (B * L) grid of right-padded rows
    is_image (B, L): bool
    text_rows, image_rows: indices into text_ids and image_ids of the tokens whose next token is a counted target
    text_positions, text_mask: where all rows have their images at the same places, the positions (L_text,) of text, and
        (L_text, L) which keys each of them sees; else None
    image_end: one past the last image token of all rows; 0 without images
    """
    def __init__(self, **attributes):
        self.__dict__.update(attributes)
        self.query_modalities = [TEXT] * (len(self.text_ids) > 0) + [IMAGE] * (len(self.image_ids) > 0)

    @property
    def length(self):
        return self.is_image.shape[1]                     # L

    @classmethod
    def from_ids(cls, ids, config, loss_mask=None):
        """ids: a list of (l, K) tensors; image ids are offset by V, text ids are repeated in all K columns. loss_mask:
        a list of (l,) bools, True at targets. UserError: an id out of range, a row too long, a target without a head"""
        lengths = [len(row) for row in ids]
        length = max(lengths)
        if length > config.max_position_embeddings:
            raise UserError(f"a sequence of {length} tokens is longer than max_position_embeddings "
                            f"({config.max_position_embeddings}): shorten its text or show fewer images")
        flat = torch.cat(ids)                                                                 # (n, K)
        index = torch.cat([torch.arange(n) + b * length for b, n in enumerate(lengths)])      # (n,)
        image = flat[:, 0] >= config.vocab_size                                               # (n,)
        text_ids, image_ids = flat[~image, 0], flat[image] - config.vocab_size
        if (flat[~image] != flat[~image, :1]).any() or (text_ids < 0).any():
            raise UserError(f"text ids must be equal in all codebooks and from 0 to {config.vocab_size - 1}")
        if (image_ids < 0).any() or (image_ids >= config.vision_vocab_size).any():
            raise UserError(f"image ids run from {image_ids.min()} to {image_ids.max()}, expected 0 to "
                            f"{config.vision_vocab_size - 1} (codes, BOI, EOI)")
        is_image = torch.zeros(len(lengths), length, dtype=torch.bool)
        is_image.view(-1)[index[image]] = True
        text_rows, image_rows = target_rows(loss_mask, image, lengths)
        text_positions = text_mask = None
        image_end = int(is_image.any(0).nonzero()[-1]) + 1 if len(image_ids) else 0
        if image_end and (is_image == is_image[0]).all():
            text_positions = (~is_image[0]).nonzero()[:, 0]
            text_mask = torch.arange(length) <= text_positions[:, None]
        return cls(lengths=lengths, text_ids=text_ids, image_ids=image_ids, text_index=index[~image],
                   image_index=index[image], is_image=is_image, text_rows=text_rows, image_rows=image_rows,
                   text_positions=text_positions, text_mask=text_mask, image_end=image_end)

    def merge(self, text, image):
        """(n_text, W), (n_image, W) -> (B, L, W) in sequence order, zero at padding"""
        x = text.new_zeros(self.is_image.numel(), text.shape[1])
        x.index_copy_(0, torch.cat((self.text_index, self.image_index)), torch.cat((text, image)))
        return x.unflatten(0, self.is_image.shape)

    def split(self, x):
        """(B, L, W) -> (n_text, W), (n_image, W)"""
        x = x.flatten(0, 1)
        return x.index_select(0, self.text_index), x.index_select(0, self.image_index)

    def padded_text(self):
        """The ids of a batch without images -> (B, L), zero at padding"""
        ids = self.text_ids.new_zeros(self.is_image.numel()).index_copy(0, self.text_index, self.text_ids)
        return ids.view(self.is_image.shape)

    def with_image_codes(self, codes):
        """Fill in the ids of whole images, (n_images, G*G, K), on the device where they were computed."""
        ids = self.image_ids.view(len(codes), -1, codes.shape[2])                             # (n_images, G*G + 2, K)
        ids = torch.cat([ids[:, :1], codes, ids[:, -1:]], dim=1).flatten(0, 1)
        return Streams(**(vars(self) | {"image_ids": ids}))

    def signal_by_token(self, signal):
        """E_c of whole images (n_images, G*G, C), or (n_image, C) already -> (n_image, C), zero at BOI and EOI"""
        if signal.dim() == 3:
            signal = F.pad(signal, (0, 0, 1, 1)).flatten(0, 1)
        if len(signal) != len(self.image_ids):
            raise UserError(f"contiguous signal for {len(signal)} image tokens, the batch has {len(self.image_ids)}")
        return signal

    def to(self, device):
        return Streams(**{name: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x
                          for name, x in vars(self).items()})


def target_rows(loss_mask, image, lengths):
    """loss_mask: list of (l,) or None; image (n,) bool over all tokens -> rows of the text and of the image stream
    whose next token is a counted target. Both must be of one modality: it chooses the head."""
    if loss_mask is None:
        return torch.zeros(2, 0, dtype=torch.long)
    target = torch.cat(loss_mask).nonzero()[:, 0]
    first = torch.tensor([0] + lengths[:-1]).cumsum(0)
    if torch.isin(target, first).any() or (image[target] != image[target - 1]).any():
        raise UserError("a counted target stands first, or just where text and image meet: BOI, <s> and the newline "
                        "between text and image have no label")
    row = torch.where(image, image.cumsum(0), (~image).cumsum(0)) - 1                         # row in its own stream
    return row[target[~image[target]]] - 1, row[target[image[target]]] - 1
