"""Small models and folders for the tests: the real classes at sizes that take milliseconds."""
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from answering.batching import Rate, write_texts
from answering.sampling import Sampler
from common.weights import write_json
from llama import linear
from model import Libra, LibraConfig, Tokenizers
from text import IMG, Text
from tokenizer import ImageTokenizer, ImageTokenizerConfig

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8, "layer_norm_eps": 1e-5}
VQGAN = {"resolution": 32, "grid": 4, "select_layers": [1, 3], "embed_dim": 32, "codebook_size": 16,
         "num_codebooks": 2, "z_channels": 32, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
         "attn_resolutions": [4], "num_attn_heads": 2}


def config(**changes):
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 128, "vision_vocab_size": 10,
             "image_feature_resolution": 2, "contiguous_signal_size": 12, "bridge_rank": 2}
    return LibraConfig(**(sizes | changes))


def libra(seed=0, spread=0.3, **changes):
    """Weights far from zero, bridges too, so that every path matters."""
    torch.manual_seed(seed)
    model = Libra(config(**changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, spread)
    return model


def image_ids(c, n_codes=None, generator=None):
    """BOI, random codes, EOI (left out where the image is cut) with the published offset -> (l, K)"""
    whole = c.image_feature_resolution ** 2
    n_codes = whole if n_codes is None else n_codes
    codes = torch.randint(c.n_codes, (n_codes, c.vision_codebook_num), generator=generator)
    edge = torch.full((1, c.vision_codebook_num), c.n_codes)
    parts = [edge, codes] + [edge + 1] * (n_codes == whole)
    return torch.cat(parts) + c.vocab_size


def text_ids(c, n, generator=None):
    ids = torch.randint(3, c.vocab_size, (n, 1), generator=generator)
    return ids.expand(-1, c.vision_codebook_num)


def interleaved(c, images, generator=None, most=6):
    """<s>, then images with 0 to `most` text tokens around each -> (L, K)"""
    def some():
        return int(torch.randint(most + 1, (), generator=generator))
    parts = [text_ids(c, 1, generator), text_ids(c, some(), generator)]
    for _ in range(images):
        parts += [image_ids(c, generator=generator), text_ids(c, 1 + some(), generator)]
    return torch.cat(parts)


def signals(c, rows, generator=None):
    """Random E_c for the image tokens of the rows, zero at BOI and EOI -> (n_image, C)"""
    ids = torch.cat([row[:, 0] for row in rows])
    ids = ids[ids >= c.vocab_size] - c.vocab_size
    signal = torch.randn(len(ids), c.contiguous_signal_size, generator=generator)
    return signal * (ids < c.n_codes)[:, None]


def spm(folder, vocab_size=380, **options):
    """A SentencePiece model as LLaMA's: BPE, byte fallback, no normalisation"""
    words = "the a red blue green small large circle square what colour is shape of in left top USER: ASSISTANT: ."
    lines = [" ".join(words.split()[i:] + words.split()[:i]) for i in range(len(words.split()))] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(Path(folder) / "tokenizer"), vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2, **options)
    return Path(folder) / "tokenizer.model"


def image_tokenizer(seed=0, **changes):
    torch.manual_seed(seed)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(clip=dict(CLIP), **(VQGAN | changes)))
    return tokenizer.requires_grad_(False).eval()


def whole(folder, **changes):
    """A Libra with its tokenizers, as from a folder"""
    text, images = Text(spm(folder)), image_tokenizer()
    c = images.config
    sizes = {"vocab_size": text.vocab_size, "vision_vocab_size": c.codebook_size + 2,
             "image_feature_resolution": c.grid, "contiguous_signal_size": c.signal_size,
             "newline_token_id": text.newline, "max_position_embeddings": 512}
    model = libra(**(sizes | changes)).eval()
    model.tokenizers = Tokenizers(text, images)
    return model


def continued(model, prompts, pictures=(), n=8, stop=(), rows=None, graphs=True, **sampling):
    """What a model of monolithic/ writes behind prompts, in so many rows -> lists of ids"""
    pictures, texts = iter(pictures), {}
    shown = [[next(pictures) for token in prompt if token == IMG] for prompt in prompts]
    head = model.lm_head.weight[:model.text and model.text.vocab_size]
    for number, ids, _ in write_texts(
            lambda numbers, new: model.read(new, sum((shown[n] for n in numbers), [])),
            lambda ids, caches: model.hidden(ids, None, caches), lambda hidden: linear(hidden, head), prompts,
            rows or len(prompts), n, stop, Sampler(**sampling), Rate(model), graphs):
        texts[number] = ids
    return [texts[number] for number in range(len(prompts))]


CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>"]
WORDS = ["the red square", "Ünïcödé straße", "日本語のテキスト", "Привет, мир", "مرحبا", "🙂👩‍👩‍👧", "12345 67",
         "a\nb\n\nc", "\t  tabs  ", "don't we'll", "x = {1: 'a'}", " leading", "trailing ", "\r\n", "<|im_end|>",
         "नमस्ते", "한국어", "…—“”"]


def bpe(folder, template=None):
    """A folder with a small byte-level BPE in tokenizer.json, and tokenizer_config.json -> the folder"""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    words = ["user\nassistant\nsystem\n USER: ASSISTANT: \n", "user\n  the"] * 9
    made.train_from_iterator(WORDS * 20 + words, trainers.BpeTrainer(
        vocab_size=700, special_tokens=CONTROL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    made.add_tokens([tokenizers.AddedToken("<think>", special=False)])
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", settings | ({"chat_template": template} if template else {}))
    return folder
