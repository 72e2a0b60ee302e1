"""A weight a token and a vector a token: by hand, alone and in a batch, to a file and back."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.reps import each_head
from embedsmith.models import ModelConfig, load
from embedsmith.models.heads.token_states import special_ids
from tests.models import tiny

BOTH = ("sparse", "multivector")
PAD, UNK, CLS, SEP = range(4)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(3)
    return tiny.embedder(tmp_path / "base", heads=BOTH, multivector_dim=6)


def weights(sparse, size=120):
    """weight_NV, repeated tokens with their largest."""
    made = torch.zeros(len(sparse), size)
    return made.scatter_reduce(1, sparse.coordinate_NT, sparse.weight_NT, reduce="amax")


def vectors(multi):
    """A list of [T, D], without what is masked."""
    return [vector_TD[mask_T] for vector_TD, mask_T in zip(multi.vector_NTD, multi.mask_NT, strict=True)]


def states(model, text, role="document"):
    """Ids and last states of one text without padding."""
    ids = torch.from_numpy(model.tokenize([text], role).id_S)
    with torch.no_grad():
        return ids, model.backbone(ids[None], torch.ones_like(ids)[None]).last_hidden_state[0].double()


def bias_at_the_median(model):
    """So that half of the words have a weight; returns how many words (of a text each) there are."""
    linear = model.token_heads["sparse"].linear
    linear.bias.data.fill_(100.0)
    weight_NV = weights(model.represent(tiny.TEXTS, role="document", outputs=BOTH)["sparse"])
    linear.bias.data.sub_(weight_NV[weight_NV > 0].median())
    return int((weight_NV > 0).sum())


@pytest.mark.parametrize("left", [False, True])
def test_both_heads_against_a_loop(model, left):
    """float64, token by token. [CLS] is dropped, [SEP] has a vector and no weight, an unknown word the same."""
    model.padding_left = left
    raw = bias_at_the_median(model)
    reps = model.represent(tiny.TEXTS, role="document", outputs=BOTH, token_budget=10**6)
    found = weights(reps["sparse"]), vectors(reps["multivector"])
    scale_H, bias = (p.detach().double() for p in model.token_heads["sparse"].linear.parameters())
    matrix_DH, shift_D = (p.detach().double() for p in model.token_heads["multivector"].linear.parameters())
    for row, text in enumerate(tiny.TEXTS):
        ids, hidden_TH = states(model, text)
        expected_V = torch.zeros(120)
        for token, hidden_H in zip(ids.tolist(), hidden_TH, strict=True):
            if token not in (PAD, UNK, CLS, SEP):
                weight = max(0.0, float(hidden_H @ scale_H[0] + bias))
                expected_V[token] = max(float(expected_V[token]), weight)
        torch.testing.assert_close(found[0][row], expected_V, atol=1e-5, rtol=0)
        made_TD = hidden_TH[1:] @ matrix_DH.T + shift_D
        expected_TD = (made_TD / made_TD.norm(dim=1, keepdim=True)).float()
        torch.testing.assert_close(found[1][row], expected_TD, atol=1e-5, rtol=0)
    assert (found[0] > 0).any(1).sum() >= 4, "weights that are all zero prove nothing"
    assert (found[0] > 0).sum() < raw, "and weights that are all positive prove nothing about relu"
    assert UNK in model.tokenize(tiny.TEXTS).id_S


def test_heads_do_not_depend_on_the_batch_or_the_padding_side(model):
    alone = [model.represent([text], role="query", outputs=BOTH) for text in tiny.TEXTS]
    for budget, left in ((1, False), (40, False), (10**6, False), (10**6, True)):
        model.padding_left = left
        reps = model.represent(tiny.TEXTS, role="query", outputs=BOTH, token_budget=budget)
        found_NV, found = weights(reps["sparse"]), vectors(reps["multivector"])
        for row, one in enumerate(alone):
            torch.testing.assert_close(found_NV[row], weights(one["sparse"])[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(found[row], vectors(one["multivector"])[0], atol=1e-5, rtol=0)


def test_what_is_masked_is_zero(model):
    padded = model.tokenize(tiny.TEXTS).pad(model.pad_id)
    reps = model(padded, BOTH)
    special_NT = torch.isin(padded.id_NT, torch.tensor([PAD, UNK, CLS, SEP]))
    assert (reps["sparse"].weight_NT[special_NT] == 0).all()
    assert (reps["sparse"].weight_NT[~special_NT] > 0).any()
    multi = reps["multivector"]
    assert (multi.vector_NTD[~multi.mask_NT] == 0).all()
    torch.testing.assert_close(multi.mask_NT.sum(1), padded.mask_NT.sum(1) - 1)
    assert not multi.mask_NT[:, 0].any()


def test_a_pad_token_inside_a_text_is_masked_by_length_alone(model):
    """As with models whose end token is their pad token: it has no weight, and has a vector."""
    model.token_heads["sparse"].linear.bias.data.fill_(9.0)
    tokens = model.tokenize(["fox dog"])
    tokens.id_S[-1] = PAD
    reps = model(tokens.pad(model.pad_id), BOTH)
    assert (reps["sparse"].weight_NT > 0).tolist() == [[False, True, True, False]]
    assert reps["multivector"].mask_NT.tolist() == [[False, True, True, True]]


def test_a_text_keeps_at_least_one_vector(model):
    tokens = model.tokenize(["fox"])
    only_cls = type(tokens).from_rows([[CLS], [CLS, 8, SEP]], [0, 0], True)
    multi = model(only_cls.pad(PAD), ("multivector",))["multivector"]
    assert multi.mask_NT.tolist() == [[True, False, False], [False, True, True]]
    empty = model.represent([""], role="query", outputs=BOTH)
    assert empty["multivector"].mask_NT.tolist() == [[False, True]]  # the end token
    assert (empty["sparse"].weight_NT == 0).all()


def test_a_tokenizer_without_special_tokens_loses_no_word(tmp_path):
    tiny.folder(tmp_path, special=False)
    model = load(str(tmp_path), pooling="mean", heads=BOTH, new_heads=True, device="cpu")
    assert model.represent(["fox dog"], role="query", outputs=BOTH)["multivector"].mask_NT.all()


def test_a_zero_vector_has_a_finite_gradient(model):
    for parameter in model.token_heads["multivector"].parameters():
        parameter.data.zero_()
    multi = model(model.tokenize(tiny.TEXTS).pad(model.pad_id), ("multivector",))["multivector"]
    multi.paired(multi).sum().backward()
    assert (multi.vector_NTD == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_gradient_reaches_both_heads_and_the_backbone(model):
    padded = model.tokenize(tiny.TEXTS).pad(model.pad_id)
    for name in BOTH:
        model.zero_grad(set_to_none=True)
        model.token_heads["sparse"].linear.bias.data.fill_(1.0)
        reps = model(padded, (name,))
        reps[name].scores(each_head(reps, lambda rep: rep.rows(torch.arange(6, -1, -1)))[name]).sum().backward()
        assert list(reps) == [name]
        for parameter in (*model.token_heads[name].parameters(), model.backbone.embeddings.word_embeddings.weight):
            assert parameter.grad.abs().sum() > 0
        other = next(head for head in BOTH if head != name)
        assert all(parameter.grad is None for parameter in model.token_heads[other].parameters())


def test_heads_are_fp32_whatever_the_backbone_is(tmp_path, model):
    rough = tiny.embedder(tmp_path / "rough", heads=BOTH, dtype="bfloat16")
    reps = rough.represent(tiny.TEXTS, role="query", outputs=BOTH)
    assert (reps["sparse"].weight_NT.dtype, reps["multivector"].vector_NTD.dtype) == (torch.float32,) * 2
    seen = []
    model.token_heads["sparse"].linear.register_forward_hook(lambda _, given, made: seen.append(made.dtype))
    model.represent(tiny.TEXTS, role="query", outputs=BOTH, dtype="bfloat16")
    assert set(seen) == {torch.float32}


def test_a_prompt_that_is_left_out_of_the_pooling_is_left_out_here(tmp_path, model):
    model.settings = type(model.settings)("mean", 40, {"query": "query: "}, include_prompt=False)
    reps = model.represent(["fox dog"], role="query", outputs=BOTH)
    ids = model.tokenize(["fox dog"], "query").id_S.tolist()
    assert len(ids) == 6  # [CLS] query : fox dog [SEP]
    assert reps["multivector"].mask_NT.tolist() == [[False, False, False, True, True, True]]
    assert (weights(reps["sparse"])[0, ids[1:3]] == 0).all()


def test_a_prompt_is_left_out_by_default_though_it_is_pooled(tmp_path, model):
    """E5's prompts take part in the dense vector; in heads of tokens they would match in every text."""
    prompts = {"query": "query: ", "document": "passage: "}
    model.settings = type(model.settings)("mean", 40, prompts)
    before = model.fingerprint()
    ids = model.tokenize(["fox dog"], "query").id_S.tolist()
    reps = model.represent(["fox dog"], role="query", outputs=("dense", *BOTH))
    assert reps["multivector"].mask_NT.tolist() == [[False, False, False, True, True, True]]
    assert (weights(reps["sparse"])[0, ids[1:3]] == 0).all()
    model.settings = dataclasses.replace(model.settings, heads_include_prompt=True)
    whole = model.represent(["fox dog"], role="query", outputs=("dense", *BOTH))
    assert whole["multivector"].mask_NT.tolist() == [[False, True, True, True, True, True]]
    assert torch.equal(whole["dense"].vector_ND, reps["dense"].vector_ND)
    assert model.fingerprint() != before
    model.save(tmp_path / "saved")
    assert load(str(tmp_path / "saved"), device="cpu").settings.heads_include_prompt is True
    assert load(str(tmp_path / "saved"), device="cpu", heads_include_prompt=False).fingerprint() == before


@pytest.mark.parametrize("heads", [("sparse",), ("multivector",), BOTH])
def test_saved_heads_come_back_exactly(tmp_path, heads):
    model = tiny.embedder(tmp_path / "base", heads=("dense", *heads), dimension=8)
    model.save(tmp_path / "saved")
    there = {path.name for path in (tmp_path / "saved").glob("*.pt")}
    names = {"sparse": "sparse_linear.pt", "multivector": "colbert_linear.pt"}
    assert there == {names[name] for name in heads}
    again = load(str(tmp_path / "saved"), device="cpu")
    assert again.outputs == ("dense", "middle", *heads)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert {name for name in model.state_dict() if name.startswith("token_heads")} == {
        f"token_heads.{head}.linear.{part}" for head in heads for part in ("weight", "bias")
    }
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    old, new = (one.represent(tiny.TEXTS, role="query", outputs=one.outputs) for one in (model, again))
    for name in again.outputs:
        assert all(torch.equal(a, b) for a, b in zip(old[name].tensors(), new[name].tensors(), strict=True))
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")  # sees the dense model
    np.testing.assert_allclose(peer.encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-5)
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert all(f"(`{names[name]}`)" in card for name in heads)


def test_files_are_those_of_bge_m3(tmp_path, model):
    """States of linear layers as torch.save writes them, in half precision too, and so they are written."""
    folder = tiny.folder(tmp_path / "m3")
    sparse, colbert = torch.nn.Linear(16, 1).half(), torch.nn.Linear(16, 16).half()
    torch.save(sparse.state_dict(), folder / "sparse_linear.pt")
    torch.save(colbert.state_dict(), folder / "colbert_linear.pt")
    loaded = load(str(folder), pooling="cls", device="cpu")
    torch.testing.assert_close(loaded.token_heads["sparse"].linear.weight, sparse.weight.float(), atol=0, rtol=0)
    torch.testing.assert_close(loaded.token_heads["multivector"].linear.weight, colbert.weight.float(), atol=0, rtol=0)
    model.save(tmp_path / "saved")
    for name, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", 6)):
        state = torch.load(tmp_path / "saved" / name, weights_only=True)
        torch.nn.Linear(16, width).load_state_dict(state)
        assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in state.values())


def test_heads_are_chosen_one_by_one(tmp_path, model):
    assert model.outputs == ("dense", "middle", "sparse", "multivector")
    model.save(tmp_path / "saved")
    for heads, outputs in (((), ()), (("dense",), ()), (("multivector",), ("multivector",)), (None, BOTH)):
        assert load(str(tmp_path / "saved"), heads=heads, device="cpu").outputs == ("dense", "middle", *outputs)
    order = load(str(tmp_path / "saved"), heads=("multivector", "sparse"), device="cpu")
    assert list(order.token_heads) == list(BOTH), "the order of parameters must not depend on the recipe's"
    assert torch.equal(order.token_heads["sparse"].linear.weight, model.token_heads["sparse"].linear.weight)


def test_a_missing_head_lists_those_there_are(tmp_path):
    model = tiny.embedder(tmp_path, heads=("sparse",))
    known, fix = "dense, middle, sparse", r"model\.heads=\[dense,multivector\].*new_heads=True"
    with pytest.raises(ModelError, match=rf"no output 'multivector'(.|\n)*{known}(.|\n)*{fix}"):
        model.represent(["a"], role="query", outputs=("multivector",))
    with pytest.raises(ModelError, match=r"no output 'colour'(.|\n)*dense, middle, sparse$"):
        model.represent(["a"], role="query", outputs=("colour",))


def test_impossible_heads(tmp_path, model):
    path = str(tmp_path / "base")
    with pytest.raises(RecipeError, match=r"heads.*unknown head 'spares' \(did you mean 'sparse'\?\)"):
        load(path, heads=("spares",), new_heads=True, pooling="mean")
    with pytest.raises(RecipeError, match="unknown head 'spares'"):
        load(ModelConfig(path, pooling="mean", heads=("spares",)))
    with pytest.raises(ModelError, match=r"multivector_dim=8(.|\n)*add multivector to model.heads"):
        load(path, multivector_dim=8, pooling="mean")
    with pytest.raises(RecipeError, match="multivector_dim"):
        load(path, multivector_dim=0, heads=("multivector",), new_heads=True, pooling="mean")
    model.save(tmp_path / "saved")
    with pytest.raises(ModelError, match=r"colbert_linear\.pt: weight \(6, 16\)(.|\n)*weight \(8, 16\)"):
        load(str(tmp_path / "saved"), multivector_dim=8)


def broken_files(whole):
    """What copies and other programs leave under the name."""
    yield whole[: len(whole) // 2], "cannot read"
    yield whole[:1], "cannot read"
    yield b"", "cannot read"
    yield b"version https://git-lfs.github.com/spec/v1\n", "cannot read"
    yield pickle.dumps({"weight": print}, protocol=2), "cannot read"
    yield pickle.dumps(["a"], protocol=2), "cannot read|not a linear layer"


@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt"])
def test_a_broken_file_is_named(tmp_path, model, name):
    model.save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    for content, message in broken_files(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message) as caught:
            load(str(tmp_path / "saved"), device="cpu")
        assert str(path) in str(caught.value)
    one = torch.ones(1)
    states = [{"weight": torch.ones(6, 8), "bias": torch.ones(6)}, {"weight": torch.ones(6, 16), "bias": one}]
    for state in (*states, {"weight": torch.ones(6, 16), "bias": torch.tensor(1.0)}, {"weight": one}, [one]):
        torch.save(state, path)
        with pytest.raises(ModelError, match=r"not a linear layer|expected: weight") as caught:
            load(str(tmp_path / "saved"), device="cpu")
        assert str(path) in str(caught.value)
    load(str(tmp_path / "saved"), heads=tuple({"sparse", "multivector"} - {owner(name)}), device="cpu")


def owner(name):
    return "sparse" if name.startswith("sparse") else "multivector"


def test_special_ids_of_a_tokenizer_with_few():
    tokenizer = tiny.tokenizer()
    assert special_ids(tokenizer) == {PAD, UNK, CLS, SEP}
    tokenizer.sep_token = tokenizer.unk_token = None
    assert special_ids(tokenizer) == {PAD, CLS}


def test_a_checkpoint_keeps_its_heads(tmp_path, model):
    model.save(tmp_path / "saved")
    config = ModelConfig(str(tmp_path / "base"), pooling="mean", heads=("sparse",), multivector_dim=4)
    resumed = load(config.continued(str(tmp_path / "saved")), device="cpu")
    assert resumed.outputs == model.outputs
    assert torch.equal(resumed.token_heads["multivector"].linear.weight, model.token_heads["multivector"].linear.weight)


@pytest.mark.parametrize("seed", range(4))
def test_a_new_sparse_head_is_alive(tmp_path, seed):
    folder = str(tiny.folder(tmp_path))
    torch.manual_seed(seed)
    model = load(folder, pooling="mean", heads=("sparse",), new_heads=True, device="cpu")
    tokens = model.tokenize(tiny.TEXTS).pad(model.pad_id)
    words_NT = tokens.mask_NT & ~torch.isin(tokens.id_NT, torch.tensor([PAD, UNK, CLS, SEP]))
    weight_NT = model(tokens, ("sparse",))["sparse"].weight_NT
    assert (weight_NT[words_NT] > 0).float().mean() > 0.6
