"""A LLaVA-like model, with a vision encoder, to compare the others with: CLIP, an MLP of two layers, a LLaMA. Stage 1
trains the MLP alone, stage 2 all, CLIP too (LLaVA-1.5 keeps it as it is). The commands are those of haplovl.py.
"""
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from common.cli import run
from common.config import make_config
from llama import Linear, Llama, LlamaConfig, run_layers
from monolithic import shared, stages
from tokenizer import ClipConfig, ClipViT, prepare


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
    read_config = staticmethod(lambda path: [LlavaConfig.from_file(path)])
    from_pretrained = classmethod(shared.from_pretrained)

    def __init__(self, config):
        super().__init__(config)
        self.halves, self.text, self.checkpoint_activations = (config,), None, False
        narrow, width = config.clip["hidden_size"], config.hidden_size
        self.model["vision_tower"] = ClipViT(**config.clip)
        self.model["mm_projector"] = nn.Sequential(Linear(narrow, width, True), nn.GELU(), Linear(width, width, True))

    def hidden(self, ids, batch=None, caches=(None,)):
        """ids (B, L): those of the batch or, with prompts in the cache, one new token a row -> (B, L, D)"""
        m, clip = self.model, self.model.vision_tower
        x = m.embed_tokens(ids.clamp(max=self.config.vocab_size - 1))
        if batch is not None:                             # patches of the last layer but one
            features = clip.hidden_states(batch.tiles.to(clip.embeddings.class_embedding.dtype), -1)[-1][:, 1:]
            x = shared.insert(x, batch.image_index, m.mm_projector(features).flatten(0, 1))
        return m.norm(run_layers(x, m.layers, self.config, caches[0], None, self.checkpoint_activations))

    def save_pretrained(self, folder, tensors=None):
        shared.save_folder(folder, tensors or self.state_dict(), self.text, asdict(self.config))


def build(args, _):
    """-> stages.Stage"""
    if args.stage == 1:
        llm, text, clip, sizes = stages.new_parts(args)
        new = {"clip": sizes, "image_token_index": llm.config.vocab_size, "tie_word_embeddings": False}
        model = Llava(LlavaConfig(**asdict(llm.config) | new))
        model.load_state_dict(model.state_dict() | llm.state_dict())
        model.model.mm_projector.apply(shared.initialise)
        model.model["vision_tower"], model.text = clip, text
    else:
        model = stages.trained_before(args, "llava", Llava)
    m, clip = model.requires_grad_(args.stage == 2).model, model.model.vision_tower
    m.mm_projector.requires_grad_()
    nn.ModuleList([clip.encoder.layers[-1], clip.post_layernorm]).requires_grad_(False)      # unused
    return stages.Stage(model, [*clip.encoder.layers, *m.layers])


def main():
    stages.run_stage(stages.options(__doc__, "llava", [
        ("the MLP", "captions/*.tar", 1e-3), ("all", "chats/chat.json", 2e-5)]), build)


if __name__ == "__main__":
    run(main)
