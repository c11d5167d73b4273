"""A batch as two streams: all text tokens in one tensor, all image tokens in another, no padding in either.

The paper's picture taken literally (Fig. 1): text goes through the LLaMA, image tokens through the visual expert, as
plain matrix products over contiguous rows; they meet in sequence order only for attention. Everything that needs to
look at the ids is worked out here, once per batch, on the CPU: where each token goes, which stretches of a row are of
one modality, and which tokens have a target that counts.

Letters: B rows, L positions of the longest row, K codebooks, V text vocabulary.
"""
from dataclasses import dataclass, fields, replace

import torch

from weights import UserError

TEXT, IMAGE = 0, 1                                        # modalities; also the places of the two streams in a pair


@dataclass
class Streams:
    lengths: list               # B ints: tokens of each row; a token's position is the number of tokens before it
    length: int                 # L
    text_ids: torch.Tensor      # (n_text,)
    image_ids: torch.Tensor     # (n_image, K), BOI = N, EOI = N + 1
    text_at: torch.Tensor       # (n_text,) place of each text token in the (B * L) grid of rows, right-padded
    image_at: torch.Tensor      # (n_image,)
    is_image: torch.Tensor      # (B, L) bool
    asking: tuple               # modalities of the queries
    groups: list                # (rows (b,) or None for all, [(modality, start, end), ...]): rows cut alike
    text_rows: torch.Tensor     # (m_text,) text tokens that predict a counted target: the next row of text_ids
    image_rows: torch.Tensor    # (m_image,) image tokens that do: their target is the next row of image_ids

    def __post_init__(self):
        """What every layer asks. whole: no padding. only_text: nor images. spans: for each modality its stretches where
        all rows have the same (those of images in all of pretraining), else None. usual: all rows are text, an image,
        text, cut alike; then seen (text positions, L) bool: the keys that their queries see, for compiled layers."""
        rows, cuts = self.groups[0]
        self.whole = sum(self.lengths) == len(self.lengths) * self.length
        self.only_text = self.whole and IMAGE not in self.asking
        self.spans = [[(start, end) for kind, start, end in cuts if kind == modality] if alike else None
                      for modality, alike in ((TEXT, rows is None and self.whole), (IMAGE, rows is None))]
        self.usual = rows is None and [kind for kind, _, _ in cuts] == [TEXT, IMAGE, TEXT]
        if self.usual:
            at = torch.arange(self.length, device=self.is_image.device)
            self.seen = at <= torch.cat([at[start:end] for kind, start, end in cuts if kind == TEXT])[:, None]

    @classmethod
    def of(cls, ids, config, mask=None, counted=None):
        """ids: a list of (l, K) tensors, or one padded (B, L, K) with mask (B, L), 1 = real, padded on any side.
        Image ids are offset by V, text ids stand in all K columns. counted: bool, shaped as ids without K: the tokens
        that are targets of the loss. Raises UserError on an id out of range, a row too long, or an impossible target.
        """
        if mask is not None:
            counted = None if counted is None else [row[keep] for row, keep in zip(counted, mask.bool())]
            ids = [row[keep] for row, keep in zip(ids, mask.bool())]
        lengths = [len(row) for row in ids]
        length = max(lengths)
        if length > config.max_position_embeddings:
            raise UserError(f"a sequence of {length} tokens is longer than max_position_embeddings "
                            f"({config.max_position_embeddings}): shorten its text or show fewer images")
        at = torch.cat([torch.arange(n) + b * length for b, n in enumerate(lengths)])         # (n,)
        flat = torch.cat(list(ids))                                                           # (n, K)
        image = flat[:, 0] >= config.vocab_size                                               # (n,)
        text_ids, image_ids = flat[~image, 0], flat[image] - config.vocab_size
        if (flat[~image] != flat[~image, :1]).any() or (text_ids < 0).any():
            raise UserError(f"text ids must stand in all codebooks alike, from 0 to {config.vocab_size - 1}")
        if (image_ids < 0).any() or (image_ids >= config.vision_vocab_size).any():
            raise UserError(f"image ids run from {image_ids.min()} to {image_ids.max()}, expected 0 to "
                            f"{config.vision_vocab_size - 1} (codes, BOI, EOI)")
        is_image = torch.zeros(len(lengths) * length, dtype=torch.bool)
        is_image[at[image]] = True
        is_image = is_image.view(len(lengths), length)
        rows = [flat.new_empty(0)] * 2 if counted is None else predictors(torch.cat(list(counted)), image, lengths)
        groups = group(is_image)
        asking = tuple(sorted({modality for _, cuts in groups for modality, _, _ in cuts}))
        return cls(lengths, length, text_ids, image_ids, at[~image], at[image], is_image, asking, groups, *rows)

    def join(self, streams):
        """[(n_text, W), (n_image, W)] -> (B, L, W) in sequence order, zero at padding"""
        text, image = streams
        if self.only_text and image is None:
            return text.view(len(self.lengths), self.length, -1)
        return Join.apply(text, image, *self.is_image.shape, self.places())

    def split(self, x, like):
        """(B, L, W) -> [(n_text, W), (n_image, W)]; None where `like` is"""
        if self.only_text and like[IMAGE] is None:
            return [x.flatten(0, 1), None]
        return list(Split.apply(x, self.places(), *(y is not None for y in like)))

    def places(self):
        """Where the streams' tokens stand in (B, L): for each modality its spans, else an index. A compiled layer knows
        the usual cut and, for all others, the index: each new list of spans would be a new graph."""
        known = self.usual or not torch.compiler.is_compiling()
        return self.whole and known, list(zip(self.spans if known else (None, None), (self.text_at, self.image_at)))

    def with_images(self, codes):
        """Fill in the ids of whole images, (n_images, G*G, K), on the device they were computed on."""
        per_image = codes.shape[1] + 2
        ids = self.image_ids.view(-1, per_image, codes.shape[2])
        return replace(self, image_ids=torch.cat([ids[:, :1], codes, ids[:, -1:]], dim=1).flatten(0, 1))

    def to(self, device):
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)
                 if isinstance(getattr(self, f.name), torch.Tensor)}
        groups = [(None if rows is None else rows.to(device, non_blocking=True), cuts) for rows, cuts in self.groups]
        return replace(self, groups=groups, **moved)


def put_together(streams, rows, length, places):
    """[(n_text, W), (n_image, W)] or None for one -> (B, L, W), zero where nothing stands"""
    whole, at = places
    some = [x for x in streams if x is not None]
    for x in some:
        if len(x) == rows * length:
            return x.view(rows, length, -1)               # all of one modality: nothing to put together
    both = (some[0].new_empty if whole and len(some) == 2 else some[0].new_zeros)(rows, length, some[0].shape[1])
    for x, (spans, index) in zip(streams, at):
        if x is not None and spans is None:
            both.view(rows * length, -1).index_copy_(0, index, x)
        elif x is not None and spans:
            widths = [end - start for start, end in spans]
            for (start, end), part in zip(spans, x.view(rows, sum(widths), -1).split(widths, dim=1)):
                both[:, start:end] = part
    return both


def take_apart(x, places, wanted):
    """The way back: (B, L, W) -> for each modality (n, W), None where it is not wanted"""
    parts = []
    for want, (spans, index) in zip(wanted, places[1]):
        if not want:
            parts.append(None)
        elif spans is None:
            parts.append(x.flatten(0, 1).index_select(0, index))
        else:
            pieces = [x[:, start:end] for start, end in spans] or [x[:, :0]]
            parts.append((pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).flatten(0, 1))
    return tuple(parts)


class Join(torch.autograd.Function):
    """The gradient of putting together is taking apart and the other way round: copies, where the backward of an index
    would add up what nothing is added to."""

    @staticmethod
    def forward(ctx, text, image, rows, length, places):
        ctx.places, ctx.has = places, (text is not None, image is not None)
        return put_together((text, image), rows, length, places)

    @staticmethod
    def backward(ctx, gradient):
        return *take_apart(gradient, ctx.places, ctx.has), None, None, None


class Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, places, *wanted):
        ctx.places, ctx.shape = places, x.shape[:2]
        return take_apart(x, places, wanted)

    @staticmethod
    def backward(ctx, *gradients):
        return put_together(gradients, *ctx.shape, ctx.places), None, None, None


def predictors(counted, image, lengths):
    """counted (n,), image (n,) bool over all tokens -> the rows of the text and of the image stream whose next token is
    a counted target. A target's modality must be that of the token before it: the head is chosen by that token."""
    target = counted.nonzero()[:, 0]
    first = torch.tensor([0] + lengths[:-1]).cumsum(0)
    if torch.isin(target, first).any() or (image[target] != image[target - 1]).any():
        raise UserError("a counted target stands first, or just where text and image meet: BOI, <s> and the newline "
                        "between text and image have no label")
    place = torch.where(image, image.cumsum(0), (~image).cumsum(0)) - 1                       # row in its own stream
    return place[target[~image[target]]] - 1, place[target[image[target]]] - 1


def group(is_image):
    """(B, L) -> rows with their images at the same places share one list of (modality, start, end); padding is text."""
    patterns = {}
    for b, row in enumerate(is_image):
        edges = (row[1:] != row[:-1]).nonzero()[:, 0].add(1).tolist()
        cuts = [0] + edges + [len(row)]
        kinds = row[cuts[:-1]].long().tolist()
        patterns.setdefault(tuple(zip(kinds, cuts[:-1], cuts[1:])), []).append(b)
    if len(patterns) == 1:
        return [(None, list(next(iter(patterns))))]
    return [(torch.tensor(rows), list(cuts)) for cuts, rows in patterns.items()]
