"""The model against its equations: loops in float64, gradients, masks, the frozen LLaMA, sizes at full scale."""
import math

import pytest
import tiny
import torch

from common.weights import UserError
from llama import Llama, RMSNorm, apply_rope, rope_tables
from model import Libra, LibraBlock, LibraConfig, cross_entropy
from streams import IMAGE, TEXT, Streams
from tokenizer import ClipViT


def rms(x, layer):
    return x / torch.sqrt((x * x).mean() + layer.eps) * layer.weight


def rope(x, position, theta):
    """One head's vector (d,), turned pair by pair"""
    d, out = len(x), []
    frequency = theta ** (-torch.arange(0, d, 2).float() / d)
    angle = (position * frequency).double()
    for i in range(d // 2):
        out.append(x[i] * angle[i].cos() - x[i + d // 2] * angle[i].sin())
    for i in range(d // 2):
        out.append(x[i + d // 2] * angle[i].cos() + x[i] * angle[i].sin())
    return torch.stack(out)


def own(module, name, image):
    return getattr(module, "vision_" + name if image and hasattr(module, "vision_" + name) else name)


def loop_row(model, ids, signal):
    """Eq. 1-5 and 9 for one sequence without padding, token by token, query by query, key by key. -> (L, D)"""
    c, m = model.config, model.model
    image = [int(i) >= c.vocab_size for i in ids[:, 0]]
    x, signal = [], iter(signal)
    for token, is_image in zip(ids, image):
        if is_image:
            e_d = torch.cat([bank.weight[token[k] - c.vocab_size] for k, bank in enumerate(m.vision_embed_tokens)])
            hybrid = rms(torch.cat([e_d, next(signal)]), m.vision_signal_norm)
            x.append(m.vision_contiguous_signal_processor(hybrid))
        else:
            x.append(m.embed_tokens.weight[token[0]])
    for block in m.layers:
        a, per = block.self_attn, c.num_attention_heads // c.num_key_value_heads
        h = [rms(y, own(block, "input_layernorm", i)) for y, i in zip(x, image)]

        def project(name, j, turn, h=h, a=a):             # -> heads of q, k or v of token j, plain and over the bridge
            plain = own(a, f"{name}_proj", image[j])(h[j])
            bridge = getattr(a, f"vision_{name}_bridge_on_{'vision' if image[j] else 'language'}", None)
            both = [plain, plain if bridge is None else plain + bridge(h[j])]                 # Eq. 3
            return [[rope(head, j, c.rope_theta) if turn else head for head in y.view(-1, c.head_dim)] for y in both]
        q, k, v = ([project(name, j, name != "v") for j in range(len(x))] for name in "qkv")
        attended = []
        for i in range(len(x)):
            heads, cross = [], [image[i] != image[j] for j in range(i + 1)]
            for head in range(c.num_attention_heads):
                scores = torch.stack([q[i][0][head] @ k[j][cross[j]][head // per] for j in range(i + 1)])     # Eq. 4
                weights = (scores / math.sqrt(c.head_dim)).softmax(0)
                heads.append(sum(w * v[j][cross[j]][head // per] for j, w in enumerate(weights)))             # Eq. 5
            attended.append(x[i] + own(a, "o_proj", image[i])(torch.cat(heads)))
        x = []
        for y, i in zip(attended, image):
            f, h = block.mlp, rms(y, own(block, "post_attention_layernorm", i))
            inner = torch.nn.functional.silu(own(f, "gate_proj", i)(h)) * own(f, "up_proj", i)(h)
            x.append(y + own(f, "down_proj", i)(inner))
    return torch.stack([rms(y, own(m, "norm", i)) for y, i in zip(x, image)])


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
KINDS = [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}, {"use_bridge": False},
         {"use_expert": False, "use_bridge": False}, {"rope_theta": 1e6, "vision_codebook_num": 4}]


@pytest.mark.parametrize("case", range(100))
def test_interleavings_equal_the_loops(case):
    g = torch.Generator().manual_seed(case)
    model = tiny.libra(case, **(SMALL | KINDS[case % len(KINDS)])).double()
    rows = [tiny.interleaved(model.config, n, g, most=3) for n in torch.randint(4, (2,), generator=g).tolist()]
    if case % 2:                                          # images at the same places in all rows: the fast attention
        rows = [rows[0], rows[0][:-1] if rows[0][-1, 0] < model.config.vocab_size else rows[0]]
    signal = tiny.signals(model.config, rows, g).double()
    streams = Streams.from_ids(rows, model.config)
    out = streams.merge(*model.hidden(streams, signal))
    for b, row in enumerate(rows):
        n = [int((r[:, 0] >= model.config.vocab_size).sum()) for r in rows]
        expected = loop_row(model, row, signal.split(n)[b])
        assert (out[b, :len(row)] - expected).abs().max() < 1e-9


def test_gradients_equal_the_loops():
    model = tiny.libra(5, **SMALL, num_key_value_heads=1).double()
    g = torch.Generator().manual_seed(5)
    rows = [tiny.interleaved(model.config, images, g, most=3) for images in (1, 2)]
    signal = tiny.signals(model.config, rows, g).double()
    streams = Streams.from_ids(rows, model.config)
    n = [int((r[:, 0] >= model.config.vocab_size).sum()) for r in rows]
    slow = [loop_row(model, row, part) for row, part in zip(rows, signal.split(n))]
    weight = [torch.randn(y.shape, generator=g, dtype=y.dtype) for y in slow]
    names, p = zip(*[(name, p) for name, p in model.named_parameters() if "lm_head" not in name])
    expected = torch.autograd.grad(sum((y * w).sum() for y, w in zip(slow, weight)), p)
    out = streams.merge(*model.hidden(streams, signal))
    ours = torch.autograd.grad(sum((out[b, :len(w)] * w).sum() for b, w in enumerate(weight)), p)
    for name, a, b in zip(names, ours, expected):
        assert (a - b).abs().max() < 1e-9 * max(1, b.abs().max()), name


@pytest.mark.parametrize("kind", [{}, {"num_key_value_heads": 1}, {"use_bridge": False}])
def test_gradcheck(kind):
    c = tiny.config(hidden_size=8, intermediate_size=8, num_attention_heads=2, **kind)
    g = torch.Generator().manual_seed(0)
    rows = [tiny.interleaved(c, images, g, most=2) for images in (1, 0)]
    streams = Streams.from_ids(rows, c)
    torch.manual_seed(0)
    block = LibraBlock(c)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    block = block.double()
    rope = rope_tables(c, torch.arange(streams.length), torch.float64)
    x = [torch.randn(len(ids), 8, dtype=torch.float64, requires_grad=True)
         for ids in (streams.text_ids, streams.image_ids)]
    assert torch.autograd.gradcheck(lambda *x: block(x, rope, streams=streams), x)


def test_fast_attention_is_the_plain_one():
    """Images at the same places in all rows, then at different ones"""
    model = tiny.libra(max_position_embeddings=256)
    c = model.config
    for starts in ((3, 3), (3, 5)):
        rows = [torch.cat([tiny.text_ids(c, start), tiny.image_ids(c), tiny.text_ids(c, n), tiny.image_ids(c)])
                for start, n in zip(starts, (60, 60))]
        streams, signal = Streams.from_ids(rows, c), tiny.signals(c, rows)
        assert (streams.text_positions is None) == (starts[0] != starts[1])
        with torch.no_grad():
            fast = streams.merge(*model.hidden(streams, signal))
            for block in model.model.layers:
                block.self_attn.recorded_maps = []
            plain = streams.merge(*model.hidden(streams, signal))
        for b, row in enumerate(rows):
            assert (fast - plain)[b, :len(row)].abs().max() < 1e-4
        for block in model.model.layers:
            block.self_attn.recorded_maps = None


def test_no_token_sees_a_later_one():
    model, g = tiny.libra().double(), torch.Generator().manual_seed(1)
    c = model.config
    row = tiny.interleaved(c, 2, g)
    signal = tiny.signals(c, [row], g).double()
    with torch.no_grad():
        before = model.hidden(Streams.from_ids([row], c), signal)
        streams = Streams.from_ids([row], c)
        for cut in (3, 9, len(row) - 2):
            other = row.clone()
            other[cut:] = torch.where(row[cut:] < c.vocab_size, (row[cut:] + 1) % c.vocab_size, row[cut:])
            changed = Streams.from_ids([other], c)
            after = streams.merge(*model.hidden(changed, signal))[0]
            assert torch.equal(after[:cut], streams.merge(*before)[0, :cut])


def test_a_bridge_at_zero_is_the_plain_expert():
    g = torch.Generator().manual_seed(2)
    torch.manual_seed(0)
    bridged = Libra(tiny.config())
    plain = Libra(tiny.config(use_bridge=False))
    plain.load_state_dict({k: v for k, v in bridged.state_dict().items() if "bridge" not in k})
    rows = [tiny.interleaved(bridged.config, 2, g)]
    streams, signal = Streams.from_ids(rows, bridged.config), tiny.signals(bridged.config, rows, g)
    with torch.no_grad():
        for a, b in zip(bridged.hidden(streams, signal), plain.hidden(streams, signal)):
            assert (a - b).abs().max() < 1e-5


def test_text_only_is_the_llama_bit_for_bit():
    libra = tiny.libra()
    llama = Llama(libra.config)
    llama.load_state_dict({k: v for k, v in libra.state_dict().items() if k in llama.state_dict()})
    streams = Streams.from_ids([tiny.text_ids(libra.config, n) for n in (17, 9)], libra.config)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = torch.cat([row[:n] for row, n in zip(llama(streams.padded_text()), streams.lengths)])
            assert torch.equal(libra.logits(streams)[0], expected)


def test_pretraining_leaves_the_llama_untouched():
    model, g = tiny.libra(), torch.Generator().manual_seed(3)
    c = model.config
    for p in model.llama_parameters():
        p.requires_grad_(False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    text = Streams.from_ids([tiny.text_ids(c, 12, g)], c)
    logits = model.logits(text)[0].detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        rows = [torch.cat([tiny.text_ids(c, 5, g), tiny.image_ids(c, generator=g), tiny.text_ids(c, n, g)])
                for n in (6, 3)]
        streams = Streams.from_ids(rows, c, loss_mask=[torch.arange(len(r)) > 11 for r in rows])
        loss = model.loss(streams, tiny.signals(c, rows, g))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]) == (name in frozen), name
        assert ("vision" in name) != (name in frozen)
    assert torch.equal(model.logits(text)[0], logits)


def test_loss_is_one_mean_over_counted_tokens():
    model, g = tiny.libra(), torch.Generator().manual_seed(4)
    c = model.config
    rows = [torch.cat([tiny.text_ids(c, 1), tiny.image_ids(c, generator=g), tiny.text_ids(c, n, g)]) for n in (7, 2)]
    loss_mask = [torch.tensor([0, 0, 1, 1, 1, 1, 1, 0] + [1] * (len(r) - 8)).bool() for r in rows]
    streams, signal = Streams.from_ids(rows, c, loss_mask=loss_mask), tiny.signals(c, rows, g)
    text, image = model.logits(streams, signal)
    losses, t, i = [], 0, 0
    for row, count in zip(rows, loss_mask):                 # by hand, one position at a time
        for here, there, label in zip(row[:-1], row[1:], count[1:]):
            if here[0] < c.vocab_size:
                p, t = text[t].log_softmax(-1), t + 1
                losses += [-p[there[0]]] if label else []
            else:
                p, i = image[i].log_softmax(-1), i + 1
                losses += [-(p[0, there[0] - c.vocab_size] + p[1, there[1] - c.vocab_size]) / 2] if label else []
        t, i = (t + 1, i) if row[-1, 0] < c.vocab_size else (t, i + 1)
    assert len(losses) == 5 * 2 + 6 + 1
    assert (model.loss(streams, signal) - torch.stack(losses).mean()).abs() < 1e-5


def test_text_alone_under_contiguous_targets():
    """Table 3 (b) has nothing to regress there; the regression's gradient is zero, not none"""
    model = tiny.libra(contiguous_targets=True)
    streams = Streams.from_ids([tiny.text_ids(model.config, 9)], model.config, loss_mask=[torch.arange(9) > 0])
    loss = model.loss(streams)
    loss.backward()
    assert 0 < loss < torch.inf and (model.vision_regression.weight.grad == 0).all()


def test_discrete_only_ignores_the_signal():
    model, g = tiny.libra(discrete_only=True), torch.Generator().manual_seed(6)
    rows = [tiny.interleaved(model.config, 1, g)]
    streams = Streams.from_ids(rows, model.config)
    with torch.no_grad():
        with_signal = model.hidden(streams, tiny.signals(model.config, rows, g))
        without = model.hidden(streams)
    assert torch.equal(with_signal[IMAGE], without[IMAGE]) and torch.equal(with_signal[TEXT], without[TEXT])


def test_codes_filled_in_on_the_device():
    c = tiny.config()
    rows = [tiny.interleaved(c, 2), tiny.interleaved(c, 1)]
    streams = Streams.from_ids(rows, c)
    codes = torch.randint(c.n_codes, (3, 4, 2))
    ids = streams.with_image_codes(codes).image_ids.view(3, 6, 2)
    assert torch.equal(ids[:, 1:-1], codes) and (ids[:, 0] == 8).all() and (ids[:, -1] == 9).all()


@pytest.mark.parametrize("change, message", [
    (lambda ids: ids.index_fill(0, torch.tensor([0]), 200), "expected 0 to 9"),
    (lambda ids: ids.index_fill(0, torch.tensor([0]), -1), "text ids must be equal"),
    (lambda ids: ids + torch.tensor([0, 1]) * (ids < 60), "text ids must be equal"),
    (lambda ids: torch.cat([ids] * 20), "longer than max_position_embeddings")])
def test_bad_ids_are_named(change, message):
    ids = tiny.interleaved(tiny.config(), 1)
    with pytest.raises(UserError, match=message):
        Streams.from_ids([change(ids)], tiny.config())


def test_labels_where_no_head_can_answer_are_refused():
    c = tiny.config()
    row = torch.cat([tiny.text_ids(c, 3), tiny.image_ids(c), tiny.text_ids(c, 3)])
    for bad in (0, 3, 9):                                 # <s>, BOI, the newline behind EOI
        with pytest.raises(UserError, match="no label"):
            Streams.from_ids([row], c, loss_mask=[torch.arange(len(row)) == bad])
    with pytest.raises(UserError, match="signal for 4 image tokens"):
        tiny.libra().hidden(Streams.from_ids([row], c), torch.zeros(4, c.contiguous_signal_size))


def test_full_scale_counts_and_names():
    """11.3 B, part by part (Sec. 4.1), and exactly the published state-dict keys"""
    with torch.device("meta"):
        model = Libra(LibraConfig())
    llama = sum(p.numel() for p in model.llama_parameters())
    parts = {"bridge": 0, "factors": 0, "norms": 0, "input": 0, "embeddings": 0, "heads": 0}
    llama_ids = {id(p) for p in model.llama_parameters()}
    for name, p in model.named_parameters():
        if id(p) not in llama_ids:
            part = ("bridge" if "bridge" in name else "norms" if p.dim() == 1 else "input" if "processor" in name else
                    "embeddings" if "embed" in name else "heads" if "head" in name else "factors")
            parts[part] += p.numel()
    assert llama == 6_738_415_616
    assert parts["factors"] == 4_228_907_008 and parts["bridge"] == 8_388_608 and parts["input"] == 33_554_432
    assert parts["heads"] == 514 * 2 * 4096 and parts["embeddings"] == 514 * 4096 and abs(parts["norms"] - 0.27e6) < 1e4
    with torch.device("meta"):
        clip = ClipViT(1024, 4096, 24, 16, 336, 14)
    total = llama + sum(parts.values()) + sum(p.numel() for p in clip.parameters())
    assert round(total / 1e9, 3) == 11.319
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.vision_norm.weight",
             "model.vision_signal_norm.weight", "model.vision_contiguous_signal_processor.weight"}
    names |= {f"model.vision_embed_tokens.{k}.weight" for k in range(2)}
    names |= {f"vision_lm_head.heads.{k}.weight" for k in range(2)}
    for i in range(32):
        layer = f"model.layers.{i}."
        names |= {f"{layer}{v}{n}_layernorm.weight" for v in ("", "vision_") for n in ("input", "post_attention")}
        for n in "qkvo":
            names |= {f"{layer}self_attn.{n}_proj.weight", f"{layer}self_attn.vision_{n}_proj.weight_A",
                      f"{layer}self_attn.vision_{n}_proj.weight_B"}
        for n in ("gate", "up", "down"):
            names |= {f"{layer}mlp.{n}_proj.weight"} | {f"{layer}mlp.vision_{n}_proj.weight_{f}" for f in "AB"}
        names |= {f"{layer}self_attn.vision_{n}_bridge_on_{side}.weight_{f}" for n in "kv"
                  for side in ("language", "vision") for f in "AB"}
    assert set(model.state_dict()) == names
    assert model.get_parameter("model.layers.0.mlp.vision_down_proj.weight_A").shape == (1024, 11008)
    assert model.get_parameter("model.layers.0.mlp.vision_gate_proj.weight_B").shape == (11008, 2752)
    assert model.get_parameter("model.vision_contiguous_signal_processor.weight").shape == (4096, 8192)


@pytest.mark.slow
def test_one_layer_at_full_width():
    """D 4096 forward and backward: 578 image tokens and a caption through one layer of the 11.3 B model"""
    torch.manual_seed(0)
    c = LibraConfig(num_hidden_layers=1, vocab_size=64)
    model = Libra(c)
    for p in model.llama_parameters():
        p.requires_grad_(False)
    row = torch.cat([tiny.text_ids(c, 1), tiny.image_ids(c), tiny.text_ids(c, 20)])
    loss_mask = (torch.arange(len(row)) > 1) & (torch.arange(len(row)) != 579)
    loss = model.loss(Streams.from_ids([row], c, loss_mask=[loss_mask]), torch.randn(1, 576, 4096))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None and torch.isfinite(p.grad).all()
                                        for p in model.parameters() if p.requires_grad)


def test_rope_rotates_pairs_of_dimensions():
    c = tiny.config(hidden_size=16, num_attention_heads=2)
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    expected = torch.stack([torch.stack([rope(x[0, head, position], position, c.rope_theta) for position in range(5)])
                            for head in range(2)])
    assert (apply_rope(x, rope_tables(c, torch.arange(5), x.dtype))[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_in_16_bits(dtype):
    """The mean square is of float32, and the output has the type of the input."""
    x, weight = (torch.randn(40, 64).to(dtype) * 100), torch.randn(64)
    expected = x.double() / (x.double().square().mean(-1, True) + 1e-5).sqrt() * weight
    norm = RMSNorm(64, 1e-5)
    norm.weight.data = weight
    y = norm(x)
    assert y.dtype == dtype and (y - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_norm_keeps_float64():
    x = torch.randn(3, 8, dtype=torch.float64)
    assert RMSNorm(8, 1e-6).double()(x).dtype == torch.float64


def test_contiguous_supervision_as_a_loop():
    """Table 3 (b): every counted code's normalised E_c is regressed by the token before it; EOI has none"""
    generator = torch.Generator().manual_seed(3)
    model = tiny.libra(contiguous_targets=True).double()
    c = model.config
    rows = [tiny.interleaved(c, n, generator) for n in (1, 2)]
    loss_mask = [(row[:, 0] >= c.vocab_size) & (row[:, 0] != c.vocab_size + c.n_codes) for row in rows]
    signal = tiny.signals(c, rows, generator).double()
    streams = Streams.from_ids(rows, c, loss_mask=loss_mask)
    image = model.hidden(streams, signal)[1]
    expected, number = 0.0, 0
    for i, ids in enumerate(streams.image_ids[1:].tolist()):
        if ids[0] < c.n_codes:                              # a code; the token before it is BOI or a code of the image
            target = signal[i + 1] - signal[i + 1].mean()
            target = target / (target.square().mean() + 1e-5).sqrt()
            expected, number = expected + (model.vision_regression(image[i]) - target).square().mean(), number + 1
    loss = model(streams, signal)[1]
    assert number == 3 * (c.image_tokens - 2)
    assert torch.allclose(loss, expected.expand(c.vision_codebook_num), rtol=1e-5)


def test_the_loss_of_words_alone_needs_no_gradient():
    model, c = tiny.libra(), tiny.config()
    rows = [tiny.text_ids(c, 9, torch.Generator().manual_seed(1))]
    streams = Streams.from_ids(rows, c, loss_mask=[torch.arange(9) > 2])
    with torch.no_grad():
        quiet = model(streams)
    assert all(torch.allclose(a, b) for a, b in zip(quiet, model(streams))) and quiet[1].sum() == 0


def test_the_loss_in_pieces_is_the_loss():
    """Logits of a few rows at a time: the same sum and gradients, and never all logits at once"""
    head, targets, found = torch.nn.Linear(8, 500, dtype=torch.float64), torch.randint(500, (50,)), []
    for rows_at_once in (50, 16):
        hidden, largest = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).double(), []
        hook = head.register_forward_hook(lambda module, x, y, largest=largest: largest.append(len(y)))
        hidden.requires_grad_()
        loss = cross_entropy(head, hidden, targets, rows_at_once)
        loss.backward()
        found.append((loss.detach(), hidden.grad, head.weight.grad))
        head.weight.grad = None
        hook.remove()
        assert max(largest) == rows_at_once
    torch.testing.assert_close(*found)
