"""Rerankers: read, scored, saved, with the scores that transformers and sentence-transformers give."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import embedsmith as es
from embedsmith.core.errors import DataError, ModelError, RecipeError
from embedsmith.models import is_reranker
from embedsmith.models.pair_text import PAIR_TEMPLATES, PairTemplate
from tests.tinybert import WORDS, tiny_bert, tiny_config, tiny_tokenizer

PAIRS = [
    ("a cat", "the dog sat on the mat"),
    ("the big red tree", ""),
    ("old dog by the tree ran far " * 3, "a new cat " * 20),
    ("", "far"),
    ("a cat", "cat"),
]
QUERIES, DOCUMENTS = (list(side) for side in zip(*PAIRS))
TEMPLATE = {"pair": "red {instruction} blue\n{query} on {document} by the far mat", "yes": "cat", "no": "dog"}
ASKS = {"template": TEMPLATE, "instructions": {"default": "far"}}


def head(folder, kind="bert", labels=1):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=labels)
    shape |= dict(vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=0, initializer_range=0.5)
    model = {
        "bert": lambda: BertForSequenceClassification(
            tiny_config(len(tokenizer), num_labels=labels, initializer_range=0.5)
        ),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**shape)),
        "modernbert": lambda: ModernBertForSequenceClassification(
            ModernBertConfig(**shape, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
        ),
    }[kind]()
    model.save_pretrained(folder)
    if kind != "bert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def language_model(folder, tied=False):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    tokenizer.add_tokens([*"01234"])
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = LlamaConfig(
        **shape,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_sentence_transformers(folder, pairs=PAIRS, **options):
    library = pytest.importorskip("sentence_transformers")
    return library.CrossEncoder(str(folder), device="cpu").predict(pairs, batch_size=2, **options)


def same(scores, others):
    np.testing.assert_allclose(np.asarray(scores), np.asarray(others), rtol=0, atol=1e-5)
    assert np.std(np.asarray(scores)) > 1e-3


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_a_head_scores_as_the_others_do_before_and_after_it_is_saved(kind, tmp_path):
    """Long and empty texts, batches and pairs alone; the activation stays the folder's."""
    model = es.load_reranker(str(head(tmp_path / "given", kind)))
    scores = model.score(QUERIES, DOCUMENTS)
    same(scores, by_sentence_transformers(tmp_path / "given"))
    same(scores, [float(model.score([q], [d])[0]) for q, d in PAIRS])
    model.save(tmp_path / "saved")
    again = es.load_reranker(str(tmp_path / "saved"))
    same(scores, by_sentence_transformers(tmp_path / "saved"))
    assert torch.equal(scores, again.score(QUERIES, DOCUMENTS))
    assert again.fingerprint() == es.load_reranker(str(tmp_path / "saved")).fingerprint()
    assert is_reranker(str(tmp_path / "saved"))


@pytest.mark.parametrize("key", ["sentence_transformers", "sbert_ce_default_activation_function"])
def test_the_activation_that_a_public_folder_names_is_used(key, tmp_path):
    folder = head(tmp_path / "given")
    config = json.loads((folder / "config.json").read_text())
    name = "torch.nn.modules.linear.Identity"
    config[key] = {"activation_fn": name} if key == "sentence_transformers" else name
    (folder / "config.json").write_text(json.dumps(config))
    model = es.load_reranker(str(folder))
    scores = model.score(QUERIES, DOCUMENTS)
    same(scores, by_sentence_transformers(folder))
    assert scores.abs().max() > 1
    model.save(tmp_path / "saved")
    same(scores, by_sentence_transformers(tmp_path / "saved"))
    assert model.rank(QUERIES[0], DOCUMENTS, k=2)[0][1] == pytest.approx(
        float(model.score([QUERIES[0]] * 5, DOCUMENTS).max()), abs=1e-5
    )


def test_a_prompt_stands_before_the_query_everywhere(tmp_path):
    model = es.load_reranker(str(head(tmp_path / "given")), instructions={"default": "the red "})
    scores = model.score(QUERIES, DOCUMENTS)
    same(scores, es.load_reranker(str(tmp_path / "given")).score([f"the red {q}" for q in QUERIES], DOCUMENTS))
    model.save(tmp_path / "saved")
    same(scores, by_sentence_transformers(tmp_path / "saved"))
    same(scores, es.load_reranker(str(tmp_path / "saved")).score(QUERIES, DOCUMENTS))
    own = es.load_reranker(str(tmp_path / "given")).score(QUERIES, DOCUMENTS, instruction=["the red ", *[None] * 4])
    assert float(own[0]) == pytest.approx(float(scores[0]), abs=1e-6)


def asked(folder, template, instruction):
    """The answer of the language model to each pair, one at a time and from the logits themselves."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    answers = [tokenizer.convert_tokens_to_ids(template[name]) for name in ("yes", "no")]
    found = []
    for query, document in PAIRS:
        text = template["pair"].format(instruction=instruction, query=query, document=document)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        end = tokenizer("by the far mat", add_special_tokens=False)["input_ids"]
        ids = ids if len(ids) <= 40 else ids[: 40 - len(end)] + end
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        found.append(torch.sigmoid(logits[answers[0]] - logits[answers[1]]).item())
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_answers_as_its_logits_say(tied, tmp_path):
    """With a template of one's own; a pair that is too long loses the end of its document, not what is behind it."""
    folder = language_model(tmp_path / "given", tied)
    about = {"template": TEMPLATE, "instructions": {"default": "the old tree"}, "max_length": 40}
    model = es.load_reranker(str(folder), **about)
    scores = model.score(QUERIES, DOCUMENTS)
    same(scores, asked(folder, TEMPLATE, "the old tree"))
    same(scores, [float(model.score([q], [d])[0]) for q, d in PAIRS])
    assert model.tokenize([QUERIES[2]], [DOCUMENTS[2]]).length_N[0] == 40
    model.save(tmp_path / "saved")
    again = es.load_reranker(str(tmp_path / "saved"))
    assert torch.equal(scores, again.score(QUERIES, DOCUMENTS))
    same(scores, by_sentence_transformers(tmp_path / "saved"))
    assert is_reranker(str(tmp_path / "saved"))
    assert not is_reranker(str(folder))
    other = again.score(QUERIES[:1], DOCUMENTS[:1], instruction="a blue mat")
    same([*other, 0], [*by_sentence_transformers(tmp_path / "saved", PAIRS[:1], prompt="a blue mat"), 0])


def test_the_logit_of_yes_alone(tmp_path):
    folder = language_model(tmp_path / "given")
    template = {"pair": TEMPLATE["pair"], "yes": "cat"}
    model = es.load_reranker(str(folder), template=template, instructions={"default": "far"})
    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "1_LogitScore" / "config.json").read_text())["false_token_id"] is None
    same(model.score(QUERIES, DOCUMENTS), by_sentence_transformers(tmp_path / "saved"))


def test_a_public_language_model_with_a_chat_template_of_its_own_is_read_as_sentence_transformers_reads_it(tmp_path):
    """Its template in the tokenizer, the answers `yes` and `no` of the vocabulary; with parts in place of texts too."""
    library = pytest.importorskip("sentence_transformers.cross_encoder.modules")
    folder = language_model(tmp_path / "given")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }} is {{ m.content[0].text }} on {% endfor %}the end"
    )
    module = pytest.importorskip("sentence_transformers.base.modules").Transformer(
        str(folder), transformer_task="text-generation"
    )
    score = library.LogitScore(tiny_tokenizer().convert_tokens_to_ids("red"))
    theirs = pytest.importorskip("sentence_transformers").CrossEncoder(modules=[module, score], device="cpu")
    theirs.save(str(tmp_path / "public"))
    model = es.load_reranker(str(tmp_path / "public"))
    assert model.settings.structured
    same(model.score(QUERIES, DOCUMENTS), theirs.predict(PAIRS))
    model.save(tmp_path / "again")
    same(model.score(QUERIES, DOCUMENTS), by_sentence_transformers(tmp_path / "again"))


def test_published_templates_put_a_pair_as_their_authors_do():
    qwen = PAIR_TEMPLATES["qwen3-reranker"]
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that "
        'the answer can only be "yes" or "no".'
    )
    expected = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        '<Instruct>: Find it\n<Query>: a {b} "c"\n<Document>: d\\n 向量\n<|im_end|>\n'
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert rendered(qwen, "Find it", 'a {b} "c"', "d\\n 向量\n") == expected
    gemma = rendered(PAIR_TEMPLATES["bge-reranker-gemma"], None, "q", "p")
    assert gemma.startswith("<bos>A: q\nB: p\nGiven a query A and a passage B, determine whether")
    assert (qwen.yes, qwen.no) == ("yes", "no")


def rendered(template, instruction, query, document):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template.jinja()
    said = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    said = said if instruction is None else [{"role": "system", "content": instruction}, *said]
    return tokenizer.apply_chat_template(said, tokenize=False)


def test_a_template_is_any_text():
    """Quotes, backslashes, braces and line breaks of it are texts of the chat template too."""
    text = "{{ \"a\" }} 'b' \\ \n\t{% c %} 😀 {query}{document}\n\n"
    made = rendered(PairTemplate(text), None, "Q", "D")
    assert made == text.replace("{query}", "Q").replace("{document}", "D")


def test_a_new_head_is_random_and_everything_else_is_the_folders(tmp_path):
    bert = tiny_bert(tmp_path / "bert", dropout=0.0)
    with pytest.raises(ModelError, match="BertModel has no head that scores pairs"):
        es.load_reranker(str(bert))
    torch.manual_seed(1)
    first = es.load_reranker(str(bert), new_heads=True)
    torch.manual_seed(2)
    second = es.load_reranker(str(bert), new_heads=True)
    differing = {
        name.split(".")[1] if "bert" not in name else name.split(".")[2]
        for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert differing == {"classifier", "pooler"}


def test_the_output_is_exact_under_autocast(tmp_path):
    """bf16 has a step of 1/8 at 20; the last layer is computed in fp32."""
    for folder, options in (
        (head(tmp_path / "head"), {}),
        (language_model(tmp_path / "lm"), ASKS),
    ):
        model = es.load_reranker(str(folder), **options)
        tokens = model.tokenize(QUERIES, DOCUMENTS).pad(model.pad_id, left=model.padding_left)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            made = model(tokens)["score"].vector_ND
        assert made.dtype == torch.float32
        assert not torch.equal(made, made.bfloat16().float())


def test_an_adapter_goes_on_apart_and_is_merged_at_the_end(tmp_path):
    pytest.importorskip("peft")
    folder = language_model(tmp_path / "given")
    model = es.load_reranker(str(folder), **ASKS, lora={"r": 2})
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    scores = model.score(QUERIES, DOCUMENTS)
    assert not np.allclose(scores, es.load_reranker(str(folder), **ASKS).score(QUERIES, DOCUMENTS))
    model.save(tmp_path / "apart", merge=False)
    assert not (tmp_path / "apart" / "model.safetensors").exists()
    goes_on = es.load_reranker(str(tmp_path / "apart"), lora={"r": 2})
    same(scores, goes_on.score(QUERIES, DOCUMENTS))
    model.save(tmp_path / "merged")
    same(scores, es.load_reranker(str(tmp_path / "apart")).score(QUERIES, DOCUMENTS))
    same(scores, es.load_reranker(str(tmp_path / "merged")).score(QUERIES, DOCUMENTS))
    same(scores, by_sentence_transformers(tmp_path / "merged"))


def written(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_what_is_no_reranker_or_asks_for_what_it_has_not_is_refused(tmp_path):
    bert, lm = head(tmp_path / "bert"), language_model(tmp_path / "lm")
    es.load_reranker(str(lm), **ASKS).save(tmp_path / "asked")

    def refused(words, folder, kind=ModelError, **options):
        with pytest.raises(kind, match=words) as caught:
            es.load_reranker(str(folder), **options)
        return str(caught.value)

    assert "num_labels 1" in refused("gives 5 scores a pair", head(tmp_path / "five", labels=5))
    refused("no such model folder", tmp_path / "nowhere")
    refused("model.pooling of a reranker", bert, pooling="mean")
    refused("model.heads of a reranker", bert, heads=["sparse"])
    refused("model.template of a reranker with a head", bert, template="plain")
    refused("unknown key", bert, RecipeError, templat="plain")
    refused(r"unknown template 'qwen-reranker'.*did you mean 'qwen3-reranker'", lm, template="qwen-reranker")
    refused("the template of a reranker is", lm, template={"pair": "only {query}"})
    refused("'query' in the template", lm, template={"query": "a"})
    refused("the answer 'cat dog' is 2 tokens", lm, template={**TEMPLATE, "yes": "cat dog"})
    refused("an instruction for 'sts'", bert, instructions={"sts": "a"})
    refused("alone have", lm, template={**TEMPLATE, "pair": "a " * 70 + "{query} {document}"}, max_length=64)
    refused("model.lora of a reranker with a head", bert, lora={"r": 2})
    refused(
        "the activation of this reranker",
        written(head(tmp_path / "act"), "config.json", sentence_transformers={"activation_fn": "my.module.Sigmoid"}),
    )
    modules = tmp_path / "asked" / "modules.json"
    kept = modules.read_text()
    modules.write_text(kept.replace("1_LogitScore", "../lm"))
    refused("leaves the folder", tmp_path / "asked")
    modules.write_text(kept.replace("logit_score.LogitScore", "dense.Dense"))
    refused("a CrossEncoder of the modules Transformer, Dense", tmp_path / "asked")
    with pytest.raises(ModelError, match="no embedder") as caught:
        es.load(str(bert))
    assert "load_reranker" in str(caught.value)
    model = es.load_reranker(str(bert))
    with pytest.raises(ModelError, match="1 queries for 2 documents"):
        model.score(["a"], ["b", "c"])
    with pytest.raises(DataError, match="broken Unicode in pair 1"):
        model.score(["a", "b"], ["c", "\ud800"])
    assert model.score([], []).shape == (0,)


def test_weights_that_are_missing_are_never_random(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = head(tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing and would be random: classifier\.weight"):
        es.load_reranker(str(folder))
    assert WORDS
