"""Whether a model may train on the tokens of a cache: it must make the same tokens of the same texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from embedsmith.core.encoder import Role
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.data.record import Text
from embedsmith.data.source import RecordSet, TokenizerFacts
from embedsmith.models import Embedder
from embedsmith.models.tokenize import added_tokens


def tokenizer_facts(model: Embedder, name: str) -> TokenizerFacts:
    """Hash of everything in the tokenizer that ids depend on; truncation and padding are set anew for every use."""
    tree = json.loads(model.tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in tree.items() if key not in ("truncation", "padding")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    ends = added_tokens(model.tokenizer)[1]
    return TokenizerFacts(name, digest, model.max_length, ends[-1] if ends else None)


def probes(model: Embedder, task: str, document_role: Role) -> dict[str, list[int]]:
    """The ids of one text in every way a cache tokenizes: they differ if prompts, templates or end tokens do."""
    text = ["Which ids does 1 text have?"]
    return {
        "query": model.tokenize(text, "query", task).id_S.tolist(),
        "instructed": model.tokenize(text, "query", task, ["Compare: "]).id_S.tolist(),
        "document": model.tokenize(text, document_role, task).id_S.tolist(),
    }


def check_tokens(records: RecordSet[Text], model: Embedder, *, in_pairs: bool, needs_text: Sequence[str] = ()) -> None:
    """Whether a model may train on a token cache. Nothing to check for records of texts.

    Errors: `DataError` for another tokenizer (both hashes named), other prompts, longer texts than the model takes, or
    documents tokenized in another role than the loss reads them in; `RecipeError` for options that need texts.
    """
    if records.tokens is None:
        return
    tokenizer, facts = records.tokens
    tokenizer.refuse_other(tokenizer_facts(model, "this one"), records.name)
    if tokenizer.max_length > model.max_length:
        raise DataError(
            f"its texts have up to {tokenizer.max_length} tokens, the model takes {model.max_length}",
            where=records.name,
            fix=f"tokenize again with --max-length {model.max_length}",
        )
    role: Role = "query" if in_pairs else "document"
    if facts.probes and facts.document_role != role:
        raise DataError(
            f"its documents were tokenized as {facts.document_role}, the loss reads them as {role}",
            where=records.name,
            fix="use a loss of the task it was tokenized for, or train on the texts",
        )
    if facts.probes and facts.probes != (now := probes(model, records.task, facts.document_role)):
        changed = ", ".join(name for name in facts.probes if facts.probes[name] != now.get(name))
        raise DataError(
            f"it was tokenized with other prompts than the model's ({changed}); its own: {facts.prompts}",
            where=records.name,
            fix="tokenize again, or set model.prompts to its own",
        )
    if needs_text:
        raise RecipeError(f"{needs_text[0]} needs texts, and this source has only tokens", where=records.name)
