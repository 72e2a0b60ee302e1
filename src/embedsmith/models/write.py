"""Saving: the legacy sentence-transformers layout with the backbone in the root.

sentence-transformers 2 to 6, transformers' AutoModel, text-embeddings-inference, vLLM and infinity all read it; the
schema that sentence-transformers 5.4+ writes is refused or misread by the servers.
Token heads lie beside the backbone as in BGE-M3; who does not know them sees the dense model.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file

from embedsmith.core.files import atomic_folder
from embedsmith.core.progress import quiet
from embedsmith.core.settings import to_plain
from embedsmith.models.attention import Attention
from embedsmith.models.folder import FILE, POOLER_FILE, POOLING_NAMES, POOLING_SWITCHES, Contract, read_json
from embedsmith.models.heads.dense import Projection, activation_path
from embedsmith.models.heads.tokens import head_file, save_token_head
from embedsmith.models.lora import has_adapter, is_quantized, merged, save_adapter, transplanted
from embedsmith.models.pooling import save_pooler
from embedsmith.models.tokenize import ensure_padding

if TYPE_CHECKING:
    from embedsmith.models.embedder import Embedder


# The model card written beside a saved model: what it is, its prompts, and how to load it anywhere.

_POOLED = {
    "cls": "states[:, 0]",
    "mean": "(states * mask).sum(1) / mask.sum(1)",
    "weighted_mean": "(states * mask * mask.cumsum(1)).sum(1) / (mask * mask.cumsum(1)).sum(1)",
    "last": "states[torch.arange(len(states)), tokens.attention_mask.sum(1) - 1]",
    "max": "states.masked_fill(mask == 0, float('-inf')).amax(1)",
}

_TOKEN_HEADS = {"sparse": "`sparse`: a weight a token", "multivector": "`multivector`: a vector a token"}

_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- embedsmith
---

# Text embedding model

A `{architecture}` with {pooling} pooling that maps a text of up to {max_length} tokens to {dimension} numbers\
{normalised}.{attention} Made with embedsmith.

## Prompts

{prompts}

## Use

With embedsmith:

```python
import embedsmith as es

model = es.load("path/to/this/folder")
queries = model.encode(["what is late interaction?"], role="query")
documents = model.encode(["Late interaction compares token vectors."], role="document")
print(model.similarity(queries, documents))
```

With sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder"{trust})
vectors = model.encode_query(["what is late interaction?"])
```

{alone}{token_heads}"""

_ALONE = """\
With transformers alone (put the prompt before the text yourself):

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", padding_side="right")
model = AutoModel.from_pretrained("path/to/this/folder").eval()
tokens = tokenizer(["a text"], padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    states = model(**tokens).last_hidden_state
mask = tokens.attention_mask[..., None].float()
vectors = {pooled}
{head}```
"""


def model_card(model: Embedder) -> str:
    """Markdown with the metadata block that model hubs read."""
    settings = model.settings
    normalise = "vectors = torch.nn.functional.normalize(vectors, dim=-1)\n" if settings.normalize else ""
    if len(model.projections):
        normalise = "# the layers in the folders *_Dense come next, then normalisation; see modules.json\n"
    plain = _ALONE.format(max_length=settings.max_length, pooled=_POOLED.get(settings.pooling, ""), head=normalise)
    standard = contract_of(model).standard
    return _CARD.format(
        alone=plain if standard else _ATTENDED,
        trust="" if standard else ", trust_remote_code=True",
        attention=_attention(model),
        architecture=type(model.backbone).__name__,
        pooling=settings.pooling.replace("_", " "),
        max_length=settings.max_length,
        dimension=model.dimension,
        normalised=", normalised to length 1" if settings.normalize else "",
        prompts=_prompts(model),
        token_heads=_token_heads(model),
    )


_ATTENDED = """\
This model has parts that only embedsmith (`pip install embedsmith`) knows; sentence-transformers loads it through that
package. See `embedding_config.json`.
"""


def _attention(model: Embedder) -> str:
    """What the self-test showed."""
    found = model.attention
    if found.mode == "native":
        return ""
    kind = "causal" if found.mode == "causal" else "bidirectional"
    how = {"config": "by its config", "modules": "by flags on its modules", "mask4d": "by a mask of four dimensions"}
    left = f"; layers {', '.join(map(str, found.causal_layers))} stay causal" if found.causal_layers else ""
    return f" Attention is {kind} ({how.get(found.how, found.how)}{left}), proven on the model by a self-test."


def _token_heads(model: Embedder) -> str:
    names = [name for name in model.token_heads if name in _TOKEN_HEADS]  # without what only pre-training reads
    if not names:
        return ""
    rows = "\n".join(f"- {_TOKEN_HEADS[name]} (`{head_file(name, model.token_heads[name])}`)" for name in names)
    outputs = ", ".join(f'"{name}"' for name in ("dense", *names))
    code = f'reps = model.represent(["a text"], role="document", outputs=({outputs}))'
    return f"\n## A text in other ways\n\n{rows}\n\n```python\n{code}\n```\n"


def _prompts(model: Embedder) -> str:
    settings = model.settings
    if not any(settings.prompts.values()):
        return "None: texts go in as they are."
    rows = [f"| `{name}` | `{json.dumps(text, ensure_ascii=False)}` |" for name, text in settings.prompts.items()]
    default = f"\n\nDefault: `{settings.default_prompt}`." if settings.default_prompt else ""
    left_out = "" if settings.include_prompt else "\n\nPrompt tokens are attended to but left out of the pooling."
    return "\n".join(["| for | text put before every text |", "|---|---|", *rows]) + default + left_out


EMULATED = "5.1.0"
"""The sentence-transformers version whose layout this is: the last series with the legacy schema."""

MODULE = "embedsmith.models.sentence.EmbedsmithModule"
"""What sentence-transformers loads a model through that its own modules cannot express."""


def save(model: Embedder, folder: str | Path, merge: bool = True) -> None:
    """Write `model` to `folder`, which appears whole or not at all; a folder already there is replaced.

    Errors: `CheckpointError` when the disk is full or the place cannot be written; `ModelError` when merging an
    adapter would change the vectors.
    """
    with atomic_folder(folder) as root, quiet():
        apart = has_adapter(model.backbone) and not merge
        _save_backbone(model, root, apart)
        _save_tokenizer(model, root)
        kinds = ["Transformer", "Pooling", *("Dense" for _ in model.projections)]
        kinds += ["Normalize"] if model.settings.normalize else []
        modules = [_module(index, kind) for index, kind in enumerate(kinds)]
        contract = contract_of(model, apart)
        if not contract.standard:
            contract, modules = replace(contract, modules=tuple(modules)), [{**_module(0, ""), "type": MODULE}]
        write_json(root / "modules.json", modules)
        write_contract(contract, root)
        settings = model.settings
        write_json(
            root / "sentence_bert_config.json",
            {"max_seq_length": settings.max_length, "do_lower_case": settings.lower_case},
        )
        write_json(root / "config_sentence_transformers.json", _general(model))
        write_json(root / _path(1, "Pooling") / "config.json", _pooling(model))
        if model.pooler is not None:
            save_pooler(model.pooler, root / POOLER_FILE)
        for index, projection in enumerate(model.projections, start=2):
            assert isinstance(projection, Projection)
            _save_projection(projection, root / _path(index, "Dense"))
        if settings.normalize:
            (root / _path(len(kinds) - 1, "Normalize")).mkdir()
        for name, head in model.token_heads.items():
            save_token_head(head, root / head_file(name, head))
        (root / "README.md").write_text(model_card(model), encoding="utf-8")


def _save_backbone(model: Embedder, root: Path, apart: bool) -> None:
    backbone: Any = model.backbone
    if apart:
        save_adapter(backbone, root, str((model.base or {}).get("path", "")))
        return
    if has_adapter(backbone):
        backbone = merged(backbone if not is_quantized(backbone) else transplanted(backbone, _plain_base(model)))
    backbone.save_pretrained(root)


def _plain_base(model: Embedder) -> Any:
    """The base of a quantised backbone, at full precision: an adapter is merged into that, never into 4 bits."""
    from embedsmith.models.backbone import load_backbone, locate
    from embedsmith.models.config import ModelConfig

    assert model.base is not None
    folder = locate(str(model.base["path"]), model.base["revision"])
    layers = model.base["layers"]
    config = ModelConfig(path=str(folder), layers=None if layers is None else tuple(layers))
    return load_backbone(folder, config, model.attention.mode)


def _save_tokenizer(model: Embedder, root: Path) -> None:
    """Without the truncation that tokenising leaves in the tokenizer's state, and with a pad token for everybody."""
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    ensure_padding(tokenizer)
    bound = tokenizer.model_max_length
    tokenizer.model_max_length = model.settings.max_length
    try:
        tokenizer.save_pretrained(root)
    finally:
        tokenizer.model_max_length = bound
    if model.settings.eos_id is not None:
        # a family's own class would build its processing anew and forget the end token
        path = root / "tokenizer_config.json"
        write_json(path, {**read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"})


def _path(index: int, kind: str) -> str:
    return "" if index == 0 else f"{index}_{kind}"


def _module(index: int, kind: str) -> dict[str, Any]:
    return {
        "idx": index,
        "name": str(index),
        "path": _path(index, kind),
        "type": f"sentence_transformers.models.{kind}",
    }


def _pooling(model: Embedder) -> dict[str, Any]:
    theirs = next((name for name, ours in POOLING_NAMES.items() if ours == model.settings.pooling), None)
    return {
        "word_embedding_dimension": model.pooled_width,
        **{switch: mode == theirs for switch, mode in POOLING_SWITCHES.items()},
        "include_prompt": model.settings.include_prompt,
    }


def _general(model: Embedder) -> dict[str, Any]:
    return {
        "__version__": {
            "sentence_transformers": EMULATED,
            "transformers": transformers.__version__,
            "pytorch": torch.__version__,
        },
        "prompts": dict(model.settings.prompts),
        "default_prompt_name": model.settings.default_prompt,
        "similarity_fn_name": "cosine",
    }


def _save_projection(projection: Projection, folder: Path) -> None:
    """The activation is always named: a Dense without one means Tanh."""
    config = {
        "in_features": projection.linear.in_features,
        "out_features": projection.linear.out_features,
        "bias": projection.linear.bias is not None,
        "activation_function": activation_path(projection),
    }
    write_json(folder / "config.json", config | ({"use_residual": True} if projection.use_residual else {}))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in projection.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def contract_of(model: Embedder, apart: bool = False) -> Contract:
    """What the standard files cannot say of this model. `apart`: its adapter stays apart from its base."""
    settings = model.settings
    trained = model.pooler is not None
    natural = model.attention.mode == "native"
    return Contract(
        attention=Attention() if natural else model.attention,
        pooling=settings.pooling if trained else None,
        pooler=model.pooler_config if trained else None,
        eos_id=settings.eos_id,
        templates=settings.templates,
        echo=settings.echo,
        pool_special_tokens=settings.pool_special_tokens,
        base=model.base if apart else None,
    )


def write_contract(contract: Contract, folder: Path) -> None:
    """Nothing for a model that has nothing to say. A schedule of training is over: softmask is bidirectional."""
    if contract.attention.mode == "softmask":
        contract = replace(contract, attention=replace(contract.attention, mode="bidirectional"))
    if contract == Contract():
        return
    tree = json.dumps(to_plain(contract), indent=2, ensure_ascii=False)
    (folder / FILE).write_text(tree + "\n", encoding="utf-8")
