"""A LLaVA-like model, with a vision encoder, to compare the others with: CLIP, an MLP of two layers, a LLaMA.

    python -m monolithic.llava --stage 1 --llm vicuna-7b-v1.5 --clip clip-vit-large-patch14-336 --out runs/llava-1
    python -m monolithic.llava --stage 2 --model runs/llava-1 --data llava_v1_5_mix665k.json --images DIR

Stage 1 trains the MLP alone, stage 2 all, CLIP too (LLaVA-1.5 keeps it as it is).
"""
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.cli import run
from common.config import make_config
from common.weights import assign, read_folder, read_json, shapes_only
from llama import Linear, Llama, LlamaConfig
from monolithic import shared, stages
from tokenizer import ClipConfig, ClipViT, prepare
from training.checkpoints import fingerprint


@dataclass
class LlavaConfig(LlamaConfig):
    model_type: str = "llava_llama"
    image_token_index: int = 32000                        # of <image>, which has no row in the LLaMA's table
    clip: dict = field(default_factory=dict)              # the fields of ClipConfig
    edges = [], []                                        # nothing stands around image tokens

    def __post_init__(self):
        super().__post_init__()
        c = make_config(ClipConfig, self.clip, "clip")
        self.clip, self.default_image_size, self.grid = asdict(c), c.image_size, c.image_size // c.patch_size

    def prepare(self, image, _):
        return prepare(image, self.default_image_size)[None], torch.arange(self.grid ** 2)


class Llava(Llama):
    read, forward, row_lengths = shared.read, shared.next_token_loss, shared.row_lengths

    def __init__(self, config):
        super().__init__(config)
        self.halves, self.text, self.checkpoint_activations = (config,), None, False
        narrow, width = config.clip["hidden_size"], config.hidden_size
        self.model["vision_tower"] = ClipViT(**config.clip)
        self.model["mm_projector"] = nn.Sequential(Linear(narrow, width, True), nn.GELU(), Linear(width, width, True))

    def hidden(self, ids, batch=None, caches=(None,)):
        """ids (B, L), with the batch that they are of or, behind a cache, one new token a row -> (B, L, D)"""
        m, clip = self.model, self.model.vision_tower
        x = m.embed_tokens(ids.clamp(max=self.config.vocab_size - 1))
        if batch is not None:                             # patches of the last layer but one
            features = clip.hidden_states(batch.tiles.to(clip.embeddings.class_embedding.dtype), -1)[-1][:, 1:]
            x = shared.insert(x, batch.image_index, m.mm_projector(features).flatten(0, 1))
        return m.norm(shared.run_layers(x, m.layers, self.config, caches[0], None, self.checkpoint_activations))

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        with shapes_only():
            model = cls(make_config(LlavaConfig, read_json(path := Path(folder) / "config.json"), path))
        return shared.load(model, read_folder(folder, dtype), folder, device)

    def save_pretrained(self, folder, tensors=None):
        shared.save_folder(folder, tensors or self.state_dict(), self.text, asdict(self.config))


def new_model(args):
    llm, text, clip, sizes = stages.new_parts(args)
    new = {"clip": sizes, "image_token_index": llm.config.vocab_size, "tie_word_embeddings": False}
    with shapes_only():
        model = Llava(LlavaConfig(**asdict(llm.config) | new))
    model.model.mm_projector.to_empty(device="cpu").apply(shared.initialise)
    model.model["vision_tower"], model.text = clip, text
    assign(model, model.state_dict() | {name: x.clone() for name, x in llm.state_dict().items()}, args.llm)
    return model


def main():
    parser = stages.options(__doc__, "llava", [("the MLP", "captions/*.tar", 1e-3), ("all", "chats/chat.json", 2e-5)])
    args, dist = stages.start(parser)
    model = new_model(args) if args.stage == 1 else stages.trained_before(args, "llava", Llava)
    m, clip = model.requires_grad_(args.stage == 2).model, model.model.vision_tower
    m.mm_projector.requires_grad_()
    nn.ModuleList([clip.encoder.layers[-1], clip.post_layernorm]).requires_grad_(False)      # unused
    args.frozen = fingerprint(model)
    stages.fit(args, dist, model, [*clip.encoder.layers, *m.layers])


if __name__ == "__main__":
    run(main)
