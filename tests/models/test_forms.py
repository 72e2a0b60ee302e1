"""Public folders of every kind: tiny random ones, made and saved by sentence-transformers, give the same scores here,
and again after they were saved here."""

import json
import string

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SparseStaticEmbedding, SpladePooling
from sentence_transformers.util import select_max_active_dims

from embedsmith.core.errors import ModelError
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models import load
from embedsmith.models.heads.static import StaticHead
from tests.models import lm

QUERIES = ["the red cat", "a big old tree", "far", ""]
ROLES = ("query", "document")
DOCUMENTS = ["the cat sat on the mat", "a dog ran by the tree .", "", "new new red mat !", "the big , old tree"]


def more(*values):
    """A case that the slow tests add."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return lm.folder(tmp_path_factory.mktemp("base") / "lm")


def scores(model, head=None):
    head = head or model.main_head
    queries, documents = (
        model.represent(texts, role=role, outputs=(head,))[head]
        for texts, role in ((QUERIES, "query"), (DOCUMENTS, "document"))
    )
    return queries.scores(documents)[0].numpy()


def theirs(peer):
    queries, documents = peer.encode_query(QUERIES), peer.encode_document(DOCUMENTS)
    return np.asarray(peer.similarity(queries, documents))


def same_in_both_directions(peer, kind, folder, **options):
    """Read what they saved, save it, read that here and there."""
    peer.eval()
    peer.save(str(folder / "theirs"))
    expected = theirs(peer)
    model = load(str(folder / "theirs"), device="cpu", **options)
    np.testing.assert_allclose(scores(model), expected, atol=1e-5, rtol=1e-5)
    assert np.ptp(expected) > 1e-3
    model.save(folder / "ours")
    np.testing.assert_allclose(theirs(kind(str(folder / "ours"), device="cpu")), expected, atol=1e-5, rtol=1e-5)
    again = load(str(folder / "ours"), device="cpu")
    np.testing.assert_allclose(scores(again), expected, atol=1e-5, rtol=1e-5)
    assert again.fingerprint() == model.fingerprint()
    assert again.settings == model.settings
    return model


def shaken(*modules):
    for module in modules:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return modules


@pytest.mark.parametrize(
    "modes",
    [
        ("mean", "max"),
        ("cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
        more("mean_sqrt_len_tokens"),
    ],
)
def test_poolings_alone_and_side_by_side(base, tmp_path, modes):
    peer = SentenceTransformer(modules=[Transformer(str(base)), Pooling(16, pooling_mode=modes)], device="cpu")
    model = same_in_both_directions(peer, SentenceTransformer, tmp_path)
    count = 1 if isinstance(modes, str) else len(modes)
    assert model.dimension == 16 * count
    np.testing.assert_allclose(model.encode(QUERIES), peer.encode(QUERIES), atol=1e-5)


def test_layers_between_pooling_and_the_end(base, tmp_path):
    torch.manual_seed(0)
    layers = shaken(LayerNorm(16), Dense(16, 8), LayerNorm(8))
    modules = [Pooling(16), Normalize(), layers[0], Dropout(0.5), *layers[1:], Normalize()]
    peer = SentenceTransformer(modules=[Transformer(str(base)), *modules], device="cpu")
    model = same_in_both_directions(peer, SentenceTransformer, tmp_path)
    assert model.dimension == 8
    model.train()
    padded = model.tokenize(QUERIES).pad(model.pad_id)
    assert not torch.equal(*(model(padded)["dense"].vector_ND for _ in range(2))), "Dropout is on in training"


@pytest.mark.parametrize(
    ("similarity", "cut"), [("cosine", 5), ("dot", 5), more("manhattan", None), more("euclidean", 5), more("dot", None)]
)
def test_scores_follow_the_folder(base, tmp_path, similarity, cut):
    transformer = Transformer(str(base), query_length=4, document_length=6)
    modules = [transformer, Pooling(16), *([Normalize()] if cut else [])]
    peer = SentenceTransformer(modules=modules, device="cpu", similarity_fn_name=similarity, truncate_dim=cut)
    model = same_in_both_directions(peer, SentenceTransformer, tmp_path)
    assert (model.settings.similarity, model.settings.truncate_dim) == (similarity, cut)
    vectors = model.encode_query(QUERIES), model.encode_document(DOCUMENTS)
    np.testing.assert_allclose(model.similarity(*vectors), theirs(peer), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "pooling", "most"),
    [
        ("bert", {"pooling_strategy": "sum", "activation_function": "log1p_relu"}, None),
        ("electra", {}, None),
        more("bert", {}, 4),
        more("bert", {"pooling_strategy": "sum"}, 4),
        more("bert", {"activation_function": "log1p_relu"}, None),
    ],
)
def test_splade(tmp_path, family, pooling, most):
    base = lm.folder(tmp_path / "base", family)
    modules = [Transformer(str(base), transformer_task="fill-mask"), SpladePooling(**pooling)]
    peer = SparseEncoder(modules=modules, device="cpu", max_active_dims=most)
    model = same_in_both_directions(peer, SparseEncoder, tmp_path)
    assert model.outputs == ("sparse",)
    with pytest.raises(ModelError, match=r"no output 'dense'(.|\n)*one of sparse(.|\n)*name what it has, sparse"):
        model.encode(["a"])


def test_who_asks_for_more_than_a_form_holds_gets_a_model_of_ours(base, tmp_path):
    modules = [Transformer(str(base), transformer_task="fill-mask"), SpladePooling()]
    SparseEncoder(modules=modules, device="cpu").save(str(tmp_path / "theirs"))
    assert load(str(tmp_path / "theirs"), device="cpu").settings.form == "splade"
    assert load(str(tmp_path / "theirs"), device="cpu", pooling="mean").settings.form == "dense"


def test_the_gradient_of_summed_words_is_that_of_the_whole_matrix(base, tmp_path):
    modules = [Transformer(str(base), transformer_task="fill-mask"), SpladePooling("sum")]
    SparseEncoder(modules=modules, device="cpu").save(str(tmp_path / "theirs"))
    model = load(str(tmp_path / "theirs"), device="cpu")
    head = model.token_heads["sparse"]
    padded = model.tokenize(DOCUMENTS).pad(model.pad_id)
    found = []
    for whole in (False, True):
        model.zero_grad()
        if whole:
            state = head.lm.states(model.states(padded).last_hidden_state)
            weight = torch.log1p(torch.relu(state @ head.lm.output_VH.T + head.lm.bias_V)) * padded.mask_NT[..., None]
            total = weight.sum(1).square().sum()
        else:
            total = model(padded, ("sparse",))["sparse"].weight_NT.square().sum()
        total.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-3, rtol=1e-4)


def test_inference_free_splade(base, tmp_path):
    """The weights of tokens may be below 0: sentence-transformers trains them from 0 on."""
    torch.manual_seed(1)
    encoder = Transformer(str(base), transformer_task="fill-mask")
    table = SparseStaticEmbedding(encoder.tokenizer, weight=torch.randn(len(encoder.tokenizer)))
    router = Router.for_query_document([table], [encoder, SpladePooling()])
    peer = SparseEncoder(modules=[router], device="cpu", similarity_fn_name="dot")
    model = same_in_both_directions(peer, SparseEncoder, tmp_path)
    assert model.query_side is not None
    assert not (tmp_path / "ours" / "model.safetensors").exists(), "each route has its weights, and the root has none"
    mixed = model.tokenize([*QUERIES, *DOCUMENTS], ["query"] * len(QUERIES) + ["document"] * len(DOCUMENTS))
    both = model(mixed.pad(model.pad_id), ("sparse",))["sparse"]
    queries, documents = both.rows(slice(0, len(QUERIES))), both.rows(slice(len(QUERIES), None))
    np.testing.assert_allclose(queries.scores(documents)[0].detach().numpy(), scores(model), atol=1e-5)


def test_a_bounded_table_keeps_the_weights_that_theirs_keeps():
    torch.manual_seed(0)
    id_NT, weight_V = torch.tensor([[5, 3, 5, 2, 9, 0, 0], [7, 7, 0, 0, 0, 0, 0]]), torch.randn(10)
    padded = PaddedTokens(id_NT, id_NT != 0, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    found = StaticHead(2)(weight_V[id_NT][..., None], padded, padded.mask_NT).over(torch.arange(10))
    whole_NV = torch.zeros(2, 10).scatter(1, id_NT, weight_V[id_NT] * padded.mask_NT)
    torch.testing.assert_close(found, select_max_active_dims(whole_NV, 2))


def test_a_table_of_weights_that_are_zero_learns(base, tmp_path):
    encoder = Transformer(str(base), transformer_task="fill-mask")
    table = SparseStaticEmbedding(encoder.tokenizer)
    router = Router.for_query_document([table], [encoder, SpladePooling()])
    SparseEncoder(modules=[router], device="cpu").save(str(tmp_path / "theirs"))
    model = load(str(tmp_path / "theirs"), device="cpu")
    queries, documents = (
        model(model.tokenize(["the red cat"], r).pad(model.pad_id), ("sparse",))["sparse"] for r in ROLES
    )
    queries.scores(documents).sum().backward()
    gradient_V = model.query_side.backbone.embedding.weight.grad[:, 0]
    words = torch.tensor(sorted(encoder.tokenizer.convert_tokens_to_ids(["the", "red", "cat"])))
    wanted_V = torch.zeros_like(gradient_V).index_copy(0, words, documents.over(words)[0])
    torch.testing.assert_close(gradient_V, wanted_V)
    assert wanted_V.any()


def test_csr(base, tmp_path):
    torch.manual_seed(0)
    (code,) = shaken(SparseAutoEncoder(16, hidden_dim=40, k=6, k_aux=8, normalize=True))
    peer = SparseEncoder(modules=[Transformer(str(base)), Pooling(16), code], device="cpu")
    model = same_in_both_directions(peer, SparseEncoder, tmp_path)
    assert model.outputs == ("dense", "middle", "sparse")


@pytest.mark.parametrize("normalised", [True, more(False)])
def test_static(base, tmp_path, normalised):
    torch.manual_seed(0)
    tokenizer = lm.tiny_tokenizer()
    if normalised:
        tokenizer.backend_tokenizer.enable_truncation(9)  # which cuts texts there, too
    table = StaticEmbedding(tokenizer, embedding_weights=torch.randn(len(tokenizer), 12))
    peer = SentenceTransformer(modules=[table, *([Normalize()] if normalised else [])], device="cpu")
    model = same_in_both_directions(peer, SentenceTransformer, tmp_path)
    long = "red cat " * 300
    np.testing.assert_allclose(model.encode([long, ""]), peer.encode([long, ""]), atol=1e-5)


def test_model2vec(tmp_path):
    """Rows that tokens share, and weights of tokens."""
    torch.manual_seed(0)
    tokenizer = lm.tiny_tokenizer()
    count = len(tokenizer)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tensors = {"embeddings": torch.randn(9, 6), "mapping": torch.arange(count) % 9, "weights": torch.rand(count)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "model2vec", "architectures": ["StaticModel"]}')
    modules = [("StaticEmbedding", "."), ("Normalize", "1_Normalize")]
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(modules)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Normalize").mkdir()
    np.testing.assert_allclose(
        load(str(tmp_path), device="cpu").encode(DOCUMENTS),
        SentenceTransformer(str(tmp_path), device="cpu").encode(DOCUMENTS),
        atol=1e-5,
    )


def test_two_dense_models_behind_a_router(base, tmp_path):
    torch.manual_seed(0)
    (dense,) = shaken(Dense(12, 16))
    tokenizer = lm.tiny_tokenizer()
    table = StaticEmbedding(tokenizer, embedding_weights=torch.randn(len(tokenizer), 12))
    router = Router.for_query_document([table, dense], [Transformer(str(base)), Pooling(16)])
    peer = SentenceTransformer(modules=[router, Normalize()], device="cpu", prompts={"query": "far: ", "document": ""})
    model = same_in_both_directions(peer, SentenceTransformer, tmp_path)
    np.testing.assert_allclose(model.encode_query(QUERIES), peer.encode_query(QUERIES), atol=1e-5)


def late_modules(base, *, expansion=None, skiplist=(), tasks=None, layers=1, **transformer):
    torch.manual_seed(0)
    names = {"module_input_name": "token_embeddings"}
    dense = [Dense(16, 16, use_residual=True, **names) for _ in range(layers - 1)]
    dense.append(Dense(16, 6, bias=False, activation_function=torch.nn.Identity(), **names))
    mask = MultiVectorMask(skiplist_words=list(skiplist), skiplist_tasks=tasks)
    encoder = Transformer(str(base), query_expansion=expansion, **transformer)
    return [encoder, *shaken(*dense), mask, Normalize("token_embeddings")]


@pytest.mark.parametrize(
    ("similarity", "options"),
    [
        ("maxsim", {"expansion": {"strategy": "fixed", "attend": False, "length": 12}, "skiplist": string.punctuation}),
        ("meanmaxsim", {"skiplist": ["cat"], "tasks": ["query", "document"], "layers": 2, "document_length": 5}),
        more("maxsim", {"expansion": {"strategy": "fixed", "attend": True, "length": 5, "token": "[UNK]"}}),
        more("meanmaxsim", {"expansion": {"strategy": "min", "attend": False, "length": 5}}),
        more("maxsim", {"query_length": 4}),
    ],
)
def test_multi_vector_encoder(base, tmp_path, options, similarity):
    peer = MultiVectorEncoder(
        modules=late_modules(base, **options), device="cpu", similarity_fn_name=similarity, prompts={"query": "far: "}
    )
    model = same_in_both_directions(peer, MultiVectorEncoder, tmp_path)
    assert model.outputs == ("multivector",)


def pylate_folder(base, folder, **said):
    """A folder as PyLate saves it: [Q] and [D] are tokens, two Dense modules, settings beside the prompts."""
    peer = SentenceTransformer(modules=[Transformer(str(base))], device="cpu")
    peer.tokenizer.add_tokens(["[Q] ", "[D] "])
    peer[0].model.resize_token_embeddings(len(peer.tokenizer))
    peer.save(str(folder))
    torch.manual_seed(0)
    types = ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense", "pylate.models.Dense.Dense"]
    for place, (width, bias) in enumerate(((20, True), (6, False)), start=1):
        path = folder / f"{place}_Dense"
        path.mkdir()
        before = 16 if place == 1 else 20
        config = {"in_features": before, "out_features": width, "bias": bias, "use_residual": place == 1}
        config["activation_function"] = "torch.nn.modules.linear.Identity"
        (path / "config.json").write_text(json.dumps(config))
        tensors = {"linear.weight": torch.randn(width, before)} | ({"linear.bias": torch.randn(width)} if bias else {})
        save_file(
            tensors | ({"residual.weight": torch.randn(20, 16)} if place == 1 else {}), path / "model.safetensors"
        )
    listed = [
        {"idx": n, "name": str(n), "path": f"{n}_Dense" if n else "", "type": kind} for n, kind in enumerate(types)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    path = folder / "config_sentence_transformers.json"
    general = {**json.loads(path.read_text()), "model_type": "ColBERT", "similarity_fn_name": "MaxSim", "prompts": {}}
    general |= {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 9, "document_length": 7, **said}
    path.write_text(json.dumps(general))
    return folder


@pytest.mark.parametrize(
    "said",
    [
        {},
        more({"attend_to_expansion_tokens": True, "skiplist_words": ["cat"]}),
        more({"do_query_expansion": False, "query_length": 4, "prompts": {"query": "old "}}),
        more({"query_prefix": "", "document_prefix": ""}),
    ],
)
def test_pylate(base, tmp_path, said):
    folder = pylate_folder(base, tmp_path / "pylate", **said)
    peer = MultiVectorEncoder(str(folder), device="cpu")
    expected = theirs(peer)
    path = folder / "config_sentence_transformers.json"  # PyLate 1.6 names no type
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "model_type"}))
    model = load(str(folder), device="cpu")
    np.testing.assert_allclose(scores(model), expected, atol=1e-5, rtol=1e-5)
    model.save(tmp_path / "ours")
    types = [entry["type"] for entry in json.loads((tmp_path / "ours" / "modules.json").read_text())]
    assert types == ["sentence_transformers.models.Transformer", *["pylate.models.Dense.Dense"] * 2]
    again = load(str(tmp_path / "ours"), device="cpu")
    assert again.settings == model.settings
    np.testing.assert_allclose(scores(again), expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(theirs(MultiVectorEncoder(str(tmp_path / "ours"), device="cpu")), expected, atol=1e-5)


@pytest.mark.parametrize("said", [more(None), {"query_maxlen": 8, "doc_maxlen": 6, "mask_punctuation": False}])
def test_stanford(tmp_path, said):
    folder = lm.folder(tmp_path / "colbert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    torch.manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    save_file({**tensors, "linear.weight": torch.randn(6, 16)}, folder / "model.safetensors", {"format": "pt"})
    if said is not None:
        marks = {"query_token_id": "red", "doc_token_id": "blue", "attend_to_mask_tokens": True, "similarity": "cosine"}
        (folder / "artifact.metadata").write_text(json.dumps({**marks, **said}))
    expected = theirs(MultiVectorEncoder(str(folder), device="cpu"))
    model = load(str(folder), device="cpu")
    np.testing.assert_allclose(scores(model), expected, atol=1e-5, rtol=1e-5)
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(scores(load(str(tmp_path / "ours"), device="cpu")), expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(theirs(MultiVectorEncoder(str(tmp_path / "ours"), device="cpu")), expected, atol=1e-5)
