"""Decoders as embedders, from folder to vectors and back, in our own hands and in sentence-transformers'."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import AutoModel, PreTrainedTokenizerFast

from embedsmith.core.errors import ModelError
from embedsmith.models import load
from tests.models.families import tiny

TEXTS = ["a cat", "the dog ran far and the cat ran by the old tree", "", "猫 🙂 sat", "dog"]
MERGES = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("d", "o"), ("do", "g"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]


def byte_tokenizer(bos: bool = False, eos: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """Bytes with a few merges, one of which swallows the space in front of a word, as in real decoders."""
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    native = Tokenizer(token_models.BPE({piece: place for place, piece in enumerate(pieces)}, MERGES))
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    native.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        native.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {}) | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=native, **named)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by family and tokenizer, written once."""
    root, made = tmp_path_factory.mktemp("decoders"), {}

    def folder(family="qwen3", **tokens):
        name = "-".join([family, *sorted(f"{k}{v}" for k, v in tokens.items())])
        if name not in made:
            tiny(family, vocab_size=280).save_pretrained(root / name)
            byte_tokenizer(**tokens).save_pretrained(root / name)
            made[name] = str(root / name)
        return made[name]

    return folder


def embed(path, **options):
    return load(path, device="cpu", **{"max_length": 48, **options})


def worst(left, right):
    return float(np.abs(left - right).max())


def in_one_batch(model):
    """The vectors of TEXTS padded together: `encode` may put every length in a chunk of its own, unpadded."""
    padded = model.tokenize(TEXTS).pad(model.pad_id, left=model.padding_left)
    assert not padded.mask_NT.all()
    with torch.no_grad():
        return model(padded)["dense"].vector_ND.numpy()


POOLINGS = ["last", "mean", "weighted_mean", "max", "attention", "latent"]


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bos", [False, True])
def test_a_vector_is_the_texts_alone(folders, tmp_path, pooling, attention, bos):
    """Alone, in a padded batch, padded on either side, saved and loaded, and through sentence-transformers."""
    torch.manual_seed(0)
    model = embed(
        folders(bos=bos), pooling=pooling, attention=attention, pooler={"latents": 4} if pooling == "latent" else None
    )
    together = model.encode(TEXTS)
    assert worst(together[0], together[1]) > 1e-3
    assert worst(in_one_batch(model), together) < 1e-5
    for place, text in enumerate(TEXTS):
        assert worst(model.encode(text), together[place]) < 1e-5
    model.save(tmp_path / "saved")
    again = embed(str(tmp_path / "saved"), max_length=None)
    assert (again.settings, again.attention) == (model.settings, model.attention)
    np.testing.assert_array_equal(again.encode(TEXTS), together)
    left = embed(str(tmp_path / "saved"), max_length=None, padding_side="left")
    assert left.padding_left
    assert worst(in_one_batch(left), together) < 1e-5
    assert worst(left.encode(TEXTS), together) < 1e-5
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    words = [place for place, text in enumerate(TEXTS) if text]  # sentence-transformers pools nothing of nothing
    assert worst(peer.encode([TEXTS[w] for w in words], batch_size=3), together[words]) < 1e-5
    standard = pooling not in ("attention", "latent") and (pooling == "last" or not bos)
    kinds = [entry["type"] for entry in json.loads((tmp_path / "saved/modules.json").read_text())]
    assert kinds[0].startswith("sentence_transformers.") == standard


@pytest.mark.parametrize("family", ["opt", "falcon", "gpt2"])
def test_padding_at_the_left_is_masked_and_not_counted(folders, family):
    """With explicit positions most families take padding for a packed text and leave it out even without a mask; opt
    and falcon do not, and gpt2 learns its positions: it sees where counting begins."""
    model = embed(folders(family), pooling="mean", attention="causal", padding_side="left")
    together = in_one_batch(model)
    for place, text in enumerate(TEXTS):
        assert worst(model.encode(text), together[place]) < 1e-5


@pytest.mark.parametrize("pooling", ["attention", "latent"])
def test_poolings_with_weights_start_near_the_mean(folders, pooling):
    torch.manual_seed(0)
    options = {"attention": "bidirectional", "pooler": {"latents": 8}}
    mean = embed(folders(), **(options | {"pooler": None}), pooling="mean").encode(TEXTS)
    made = embed(folders(), **options, pooling=pooling).encode(TEXTS)
    assert float((mean * made).sum(1).min()) > 0.9


def test_attention_pooling_equals_a_loop(folders):
    from embedsmith.models.pooling import AttentionPooling, PoolerConfig

    torch.manual_seed(1)
    pooler = AttentionPooling(6, PoolerConfig(heads=2, width=4)).double()
    hidden_NTH, pool_NT = torch.randn(2, 5, 6).double(), torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()
    query_D = pooler.query.weight @ pooler.seed_D
    for row in range(2):
        tokens = hidden_NTH[row][pool_NT[row]]
        seen = []
        for head in (slice(0, 2), slice(2, 4)):
            score_T = torch.stack([(query_D[head] @ (pooler.key.weight @ t)[head]) / 2**0.5 for t in tokens])
            seen.append(sum(a * (pooler.value.weight @ t)[head] for a, t in zip(score_T.softmax(0), tokens)))
        state_D = pooler.norm_in(query_D + torch.cat(seen))
        expected_D = pooler.norm_out(state_D + torch.relu(pooler.out.weight @ state_D))
        torch.testing.assert_close(pooler(hidden_NTH, pool_NT, pool_NT)[row], expected_D)


def test_eos_stands_exactly_once_at_the_end(folders):
    for tokens in ({"pad": True}, {"pad": False}):  # without a pad token the end token pads
        model = embed(folders(**tokens), pooling="last", max_length=8, padding_side="right")
        rows = model.tokenize([*TEXTS, "far " * 40])
        for start, end in zip(rows.offset_P, rows.offset_P[1:]):
            row = rows.id_S[start:end].tolist()
            assert row[-1] == 2
            assert row.count(2) == 1
            assert len(row) <= 8
        assert worst(model.encode(TEXTS)[4], model.encode("dog")) < 1e-5


def test_a_tokenizer_without_end_token_is_asked_about(folders):
    with pytest.raises(ModelError, match="has no end token") as caught:
        embed(folders(eos=False, pad=False), pooling="last")
    assert "eos_token=" in str(caught.value)
    model = embed(folders(eos=False, pad=False), pooling="last", eos_token="</s>")
    assert model.tokenize(["dog"]).id_S.tolist()[-1] == 2
    assert embed(folders(eos=False, pad=False), pooling="mean").encode(TEXTS).shape == (5, 16)
    with pytest.raises(ModelError, match="does not know '<end>'"):
        embed(folders(), pooling="last", eos_token="<end>")


def test_an_inserted_cls_token(folders, tmp_path):
    with pytest.raises(ModelError, match="sees nothing but itself"):
        embed(folders(), pooling="cls", cls_token="[CLS]")
    model = embed(folders(), pooling="cls", cls_token="[CLS]", attention="bidirectional")
    rows = model.tokenize(TEXTS)
    assert (rows.id_S[rows.offset_P[:-1]] == 280).all() or (rows.id_S[rows.offset_P[:-1]] == rows.id_S[0]).all()
    table = model.backbone.get_input_embeddings().weight
    assert rows.id_S[0] < len(table)
    model.save(tmp_path / "saved")
    np.testing.assert_array_equal(embed(str(tmp_path / "saved")).encode(TEXTS), model.encode(TEXTS))
    assert worst(SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), model.encode(TEXTS)) < 1e-5


def test_bos_is_left_out_of_averages(folders):
    model = embed(folders(bos=True), pooling="mean", normalize=False)
    padded = model.tokenize(["a cat"]).pad(0)
    states_TH = model.states(padded, False).last_hidden_state[0]
    torch.testing.assert_close(torch.from_numpy(model.encode("a cat")), states_TH[1:].mean(0).detach())
    kept = embed(folders(bos=True), pooling="mean", normalize=False, pool_special_tokens=True)
    torch.testing.assert_close(torch.from_numpy(kept.encode("a cat")), states_TH.mean(0).detach())


def test_echo_pools_the_second_time(folders, tmp_path):
    model = embed(folders(), pooling="mean", echo="{text} {text}", normalize=False, prompts={"document": "do: "})
    rows = model.tokenize(["a cat", "far " * 60])
    assert rows.length_N[1] <= 48
    text = model.tokenizer.decode(rows.id_S[: rows.offset_P[1]])
    assert text == "do: a cat a cat"
    assert model.tokenizer.decode(rows.id_S[rows.body_N[0] : rows.offset_P[1]]).strip() == "a cat"
    whole = embed(folders(), pooling="mean", normalize=False)
    states_TH = whole.states(whole.tokenize(["do: a cat a cat"]).pad(0), False).last_hidden_state[0]
    expected_H = states_TH[int(rows.body_N[0]) :].mean(0)
    torch.testing.assert_close(torch.from_numpy(model.encode("a cat")), expected_H.detach())
    model.save(tmp_path / "saved")
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert worst(peer.encode_document(TEXTS), model.encode(TEXTS)) < 1e-5


def test_the_instruction_is_skipped_by_characters(folders):
    """The space behind the prompt belongs to the first word's token; counting prompt tokens would lose it."""
    model = embed(folders(), pooling="mean", include_prompt=False, prompts={"query": "do: ", "document": ""})
    rows = model.tokenize(["cat", "猫", "🙂", "far " * 60], role="query")
    firsts = [model.tokenizer.decode([int(rows.id_S[o + b])]) for o, b in zip(rows.offset_P, rows.body_N)]
    assert firsts[0] == " cat"
    assert all(body < length for body, length in zip(rows.body_N, rows.length_N))


@pytest.mark.parametrize(
    "head", [{"out": 8}, {"out": 8, "type": "mlp", "hidden": 24, "activation": "GELU", "bias": True}]
)
def test_heads(folders, tmp_path, head):
    model = embed(folders(), pooling="last", head=head)
    model.save(tmp_path / "saved")
    assert model.encode(TEXTS).shape == (5, 8)
    np.testing.assert_array_equal(embed(str(tmp_path / "saved")).encode(TEXTS), model.encode(TEXTS))
    assert worst(SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), model.encode(TEXTS)) < 1e-5


def test_templates(folders, tmp_path):
    model = embed(
        folders(),
        pooling="last",
        template="qwen3",
        instructions={"default": "Find", "sts": r"Same\nYes"},
        max_length=60,
    )
    prompts = {"query": "Instruct: Find\nQuery:", "document": ""}
    sts = "Instruct: Same\nYes\nQuery:"
    assert model.settings.prompts == {**prompts, "sts-query": sts, "sts-document": sts}
    model.save(tmp_path / "saved")
    again = embed(str(tmp_path / "saved"), max_length=None)
    mine = again.tokenizer.decode(again.tokenize(["cat"], "query", instruction="Look").id_S)
    assert mine == "Instruct: Look\nQuery:cat</s>"
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert worst(peer.encode_query(TEXTS), model.encode(TEXTS, role="query")) < 1e-5
    with pytest.raises(ModelError, match="did you mean 'qwen3'"):
        embed(folders(), pooling="last", template="qwen")
    with pytest.raises(ModelError, match="no text would fit behind it"):
        embed(folders(), pooling="last", template="qwen3", max_length=16)


def test_layers_are_dropped(folders, tmp_path):
    model = embed(folders(), pooling="last", layers=1)
    model.save(tmp_path / "saved")
    again = embed(str(tmp_path / "saved"))
    assert again.backbone.config.num_hidden_layers == 1
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    with pytest.raises(ModelError, match="of a model with 2 layers"):
        embed(folders(), pooling="last", layers=3)


@pytest.mark.parametrize("family", ["stablelm", "llama4_text"])
def test_attention_that_config_cannot_say_survives(folders, tmp_path, family):
    model = embed(folders(family), pooling="mean", attention="bidirectional")
    model.save(tmp_path / "saved")
    again = embed(str(tmp_path / "saved"))
    assert again.attention == model.attention
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert worst(peer.encode(TEXTS), model.encode(TEXTS)) < 1e-5


def test_a_folder_whose_flag_was_removed_is_made_bidirectional_again(folders, tmp_path):
    model = embed(folders(), pooling="mean", attention="bidirectional")
    model.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config.pop("is_causal") is False
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    assert worst(embed(str(tmp_path / "saved")).encode(TEXTS), model.encode(TEXTS)) < 1e-6


def test_flash_attention_without_a_gpu_is_refused(folders):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ModelError, match="needs a GPU"):
        embed(folders(), pooling="last", attn_implementation="flash_attention_2")


def test_softmask_training_moves_with_the_run_and_inference_is_bidirectional(folders, tmp_path):
    model = embed(folders(), pooling="mean", attention="softmask")
    full = embed(folders(), pooling="mean", attention="bidirectional").encode(TEXTS)
    assert worst(model.encode(TEXTS), full) < 1e-5
    causal = embed(folders(), pooling="mean", attention="causal").encode(TEXTS)
    padded = model.tokenize(TEXTS).pad(0)
    model.train()
    for progress, expected in ((0.0, causal), (1.0, full)):
        model.progress = progress
        assert worst(model(padded)["dense"].vector_ND.detach().numpy(), expected) < 1e-5
    model.save(tmp_path / "saved")
    assert embed(str(tmp_path / "saved")).attention.mode == "bidirectional"


def test_plain_transformers_sees_a_bidirectional_model(folders, tmp_path):
    model = embed(folders(), pooling="mean", attention="bidirectional", normalize=False)
    model.save(tmp_path / "saved")
    tokens = model.tokenize(["a cat"]).pad(0)
    with torch.no_grad():
        states_NTH = AutoModel.from_pretrained(tmp_path / "saved").eval()(input_ids=tokens.id_NT).last_hidden_state
    assert worst(states_NTH.mean(1)[0].numpy(), model.encode("a cat")) < 1e-5
