"""A step on a card that is played: nothing of it lies on the wrong side, and nobody waits before its end."""

import pytest
import torch

from embedsmith.core.batch import Progress
from embedsmith.losses import CoSENT, InfoNCE, M3SelfDistillation
from embedsmith.models import load
from embedsmith.models.packing import Packing
from embedsmith.models.varlen import VARLEN
from embedsmith.train.step import Memory, evaluate_parts, run_step
from tests.models.families import tiny as tiny_decoder
from tests.models.test_decoders import byte_tokenizer
from tests.played_card import CARD, PlayedCard, as_on_a_card
from tests.train.tiny import pair_part, retrieval_part


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bert):
    qwen = tmp_path_factory.mktemp("qwen")
    tiny_decoder("qwen3", vocab_size=280, num_key_value_heads=1).save_pretrained(qwen)
    byte_tokenizer().save_pretrained(qwen)
    return {"bert": str(bert), "qwen3": str(qwen)}


def encoder(path, packing, dtype=torch.bfloat16, **options):
    """A model on the card, in 16 bits, as a kernel of torch is given them."""
    options |= {"attn_implementation": VARLEN} if packing else {}
    model = load(path, device="cpu", pooling="mean", packing=packing, max_length=20, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if packing:
        model.packs = Packing(True, "played", "torch")
    model.to(dtype).to(CARD).train()
    return lambda tokens, heads, rows: model(tokens.pad(model.pad_id, CARD, model.padding_left, rows), heads)


CASES = [("bert", {}), ("qwen3", {"attention": "causal"}), ("qwen3", {"attention": "bidirectional"})]


@pytest.mark.parametrize(("family", "options"), CASES)
@pytest.mark.parametrize("memory", [Memory(10**6, packed=True), Memory(60, 60, packed=True)], ids=["one", "replayed"])
def test_a_packed_step_waits_for_nothing(folders, monkeypatch, family, options, memory):
    encode = encoder(folders[family], True, **options)
    monkeypatch.setattr("embedsmith.models.varlen.attend_apart", lambda *given: pytest.fail("padded"))
    as_on_a_card(monkeypatch)
    for part in (retrieval_part(InfoNCE(0.1)), pair_part(CoSENT())):
        with PlayedCard() as card:
            output = run_step(encode, *part, memory, deferred=True)
        assert (card.waits, card.mixes) == ([], [])
        assert output.value.device == CARD
        with PlayedCard() as card:
            evaluate_parts(encode, *part, memory, {}, Progress())
        assert (card.waits, card.mixes) == ([], [])


def test_all_heads_wait_for_the_number_of_words_alone(folders, monkeypatch):
    heads = {"heads": ["dense", "sparse", "multivector"], "multivector_dim": 8, "new_heads": True}
    encode = encoder(folders["bert"], True, **heads)
    as_on_a_card(monkeypatch)
    with PlayedCard() as card:
        run_step(encode, *retrieval_part(M3SelfDistillation(0.1)), Memory(10**6, packed=True), deferred=True)
    assert (set(card.waits), card.mixes) == ({"_unique2"}, [])


def test_attention_apart_waits_for_nothing_either(folders, monkeypatch):
    encode = encoder(folders["bert"], True, dtype=torch.float32)
    as_on_a_card(monkeypatch)
    with PlayedCard() as card:
        run_step(encode, *retrieval_part(InfoNCE(0.1)), Memory(10**6, packed=True), deferred=True)
    assert (card.waits, card.mixes) == ([], [])


def launched(path, layers, texts, options):
    """Operations on the card in a forward and backward pass over one chunk."""
    encode = encoder(path, True, layers=layers, **options)
    with PlayedCard() as card:
        run_step(encode, *retrieval_part(InfoNCE(0.1), queries=texts), Memory(10**6, packed=True), deferred=True)
    return card.operations


@pytest.mark.parametrize(
    ("family", "options", "a_layer", "around"),
    [("bert", {}, 48, 165), ("qwen3", {"attention": "causal"}, 170, 190)],
)
def test_how_many_operations_a_step_launches(folders, monkeypatch, family, options, a_layer, around):
    """As many for many texts as for few. Counted when this was written: 44 a layer and 153 around them; of a decoder
    without fused norms and rotations 159 and 178."""
    as_on_a_card(monkeypatch)
    one, two, many = (launched(folders[family], *sizes, options) for sizes in ((1, 8), (2, 8), (1, 24)))
    assert many == one
    assert two - one <= a_layer
    assert one - (two - one) <= around
