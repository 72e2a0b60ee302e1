"""Masked auto-encoding: against a loop over texts and positions, replayed, saved; its random masks."""

import pytest
import torch
import torch.nn.functional as F

from embedsmith.core.errors import ModelError
from embedsmith.models import load
from embedsmith.models.heads import splade
from embedsmith.pretrain import retromae
from embedsmith.pretrain.losses import RetroMAE
from embedsmith.pretrain.retromae import RetroMaeHead, random_words
from embedsmith.train.step import Memory, run_step
from tests.models import lm
from tests.train.tiny import gradients, retrieval_part

TEXTS = ["the cat sat on the mat zz", "a dog", "the big old tree by the new red mat ran far"]


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(2)
    return load(str(lm.folder(tmp_path / "lm")), pooling="cls", heads=("retromae",), new_heads=True, device="cpu")


def every_third(word_NT, group_NT, share):
    """In place of chance."""
    column_T = torch.arange(word_NT.shape[1])
    return word_NT & ((column_T % 3 == 1) if share == retromae.ENCODER_SHARE else (column_T % 2 == 0))


@pytest.fixture
def no_chance(monkeypatch):
    monkeypatch.setattr(retromae, "random_words", every_third)
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: torch.zeros(*shape) if len(shape) > 1 else torch.zeros(shape[0])
    )


def naive(model, text):
    """Sums and counts of one text, from its definition."""
    head, backbone = model.token_heads["retromae"], model.backbone
    ids = torch.from_numpy(model.tokenize([text]).id_S)
    length, special = len(ids), set(model.tokenizer.all_special_ids)
    word = [int(i) not in special for i in ids]
    hidden = [t for t in range(length) if word[t] and t % 3 == 1]
    shown = ids.clone()
    shown[hidden] = model.tokenizer.mask_token_id
    words = backbone.get_input_embeddings().weight
    logits = lambda state: head.lm.transform(state) @ words.T + head.lm.bias_V
    state = backbone(shown[None], torch.ones(1, length)).last_hidden_state[0]
    masked = sum(F.cross_entropy(logits(state[t])[None], ids[t][None]) for t in hidden)
    c = state[0]
    query = backbone.embeddings(inputs_embeds=c.expand(1, length, -1))[0]
    memory = torch.cat([c[None], backbone.embeddings(input_ids=ids[None])[0, 1:]])
    decoder, width = head.decoder, len(c) // head.decoder.heads
    decoded = 0.0
    for t in range(1, length - 1):
        seen = [0] + [u for u in range(1, length) if u != t and not (word[u] and u % 2 == 0)]
        parts = []
        for part in range(decoder.heads):
            own = slice(part * width, (part + 1) * width)
            q, k, v = (
                decoder.query(query[t])[own],
                decoder.key(memory[seen])[:, own],
                decoder.value(memory[seen])[:, own],
            )
            parts.append(torch.softmax(k @ q / width**0.5, 0) @ v)
        made = decoder.norms[0](query[t] + decoder.out(torch.cat(parts)))
        made = decoder.norms[1](made + decoder.narrow(F.gelu(decoder.wide(made))))
        decoded = decoded + F.cross_entropy(logits(made)[None], ids[t][None])
    return [float(masked.detach()), len(hidden), float(decoded.detach()), length - 2]


def test_equals_the_definition_in_a_padded_batch(model, no_chance, monkeypatch):
    monkeypatch.setattr(splade, "_NUMBERS", 1)  # token by token
    expected = torch.tensor([naive(model, text) for text in TEXTS])
    found = model(model.tokenize(TEXTS).pad(model.pad_id), ("retromae",))["retromae"].vector_ND
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found[:, 0].sum().backward(retain_graph=True)
    assert float(model.token_heads["retromae"].decoder.out.weight.grad.abs().sum()) == 0
    found[:, 2].sum().backward()
    assert float(model.token_heads["retromae"].decoder.out.weight.grad.abs().sum()) > 0


def test_whole_words_up_to_their_share():
    torch.manual_seed(0)
    word_NT = torch.ones(400, 20, dtype=torch.bool)
    word_NT[:, [0, 19]] = False
    group_NT = (torch.arange(20) // 2).expand(400, 20) + 1  # pairs of tokens
    hidden_NT = random_words(word_NT, group_NT, 0.3)
    assert not hidden_NT[:, [0, 19]].any()
    inside = hidden_NT[:, 2:18].view(400, 8, 2)
    assert torch.equal(inside[..., 0], inside[..., 1])
    count_N = hidden_NT.sum(1)
    assert count_N.max() <= 5  # 30 % of 18 tokens
    assert count_N.min() >= 1
    assert 4 < count_N.float().mean() <= 5
    share_T = hidden_NT.float().mean(0)[1:19]
    assert share_T.min() > 0.15
    assert random_words(torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4).long(), 0.3).sum() == 0


def test_visible_sets(model):
    """Never itself, always c, no padding, half of the words, and not the same for all positions."""
    padded = model.tokenize(TEXTS).pad(model.pad_id)
    torch.manual_seed(0)
    see_NTU = model.token_heads["retromae"]._visible(padded)
    length = see_NTU.shape[1]
    assert see_NTU[:, :, 0].all()
    assert not see_NTU[:, torch.arange(1, length), torch.arange(1, length)].any()
    assert not see_NTU[1, :, 4:].any()
    rows = see_NTU[2, 1:-1, 1:-1].float()
    assert 0.3 < rows.mean() < 0.6
    assert len({tuple(row) for row in rows.tolist()}) > 3


def test_replayed_chunks_draw_the_same_masks(tmp_path):
    """The gradient with every chunk replayed is that with all graphs kept."""
    found = []
    for kept in (None, 1):
        torch.manual_seed(0)
        folder = lm.folder(tmp_path / f"lm{kept}")
        model = load(str(folder), pooling="cls", heads=("retromae",), new_heads=True, device="cpu").train()

        def encode(tokens, heads, rows, model=model):
            return model(tokens.pad(model.pad_id, rows=rows), heads)

        torch.manual_seed(5)
        output = run_step(encode, *retrieval_part(RetroMAE("both")), Memory(24, kept))
        found.append((output.value, gradients(model), output.replayed_chunks))
    (value, kept_all, none), (again, replayed, some) = found
    assert none == 0
    assert some > 3
    torch.testing.assert_close(value, again)
    for one, other in zip(kept_all, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_saved_with_its_decoder_and_left_out_by_name(tmp_path, model):
    model.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    load(str(tmp_path / "saved"), heads=("dense",), device="cpu").save(tmp_path / "dense")
    assert not (tmp_path / "dense" / RetroMaeHead.file).exists()


def test_families_without_positions_are_refused(tmp_path):
    with pytest.raises(ModelError, match="retromae of LlamaModel"):
        load(str(lm.folder(tmp_path, "llama")), pooling="last", heads=("retromae",), new_heads=True)
