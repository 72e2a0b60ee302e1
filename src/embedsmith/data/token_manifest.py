"""The manifest of a token cache: which tokenizer made it, and what each of its datasets is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from embedsmith.core.encoder import Role
from embedsmith.core.errors import CheckpointError, DataError
from embedsmith.core.files import atomic_file

MANIFEST = "manifest.json"
CacheLayout = Literal["corpus", "inline"]


@dataclass(frozen=True)
class TokenizerFacts:
    """What makes ids what they are: the tokenizer, by name and hash, the length at which it cuts a text, and the token
    that it puts behind every text, if any."""

    name: str
    sha256: str
    max_length: int
    end_id: int | None = None

    def refuse_other(self, wanted: TokenizerFacts, where: object) -> None:
        """Errors: `DataError` naming both hashes, unless they are the same tokenizer."""
        if self.sha256 != wanted.sha256:
            raise DataError(
                f"these tokens were made by the tokenizer {self.name} (sha256 {self.sha256})",
                where=where,
                expected=f"that of the model {wanted.name} (sha256 {wanted.sha256})",
                fix="tokenize the texts again for this model: embedsmith tokenize",
            )


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset of a cache. `document_role`: of its documents (in sts both sides are queries); `prompts`: by role,
    as put before texts that have no instruction of their own; `probes`: the ids of one text by role, by which a
    model that tokenizes in another way is recognised; `ids`: whether `doc_id` is our text id or a name; `labels`: the
    names of its classes; `fingerprint`: that of the records it was made from."""

    name: str
    task: str
    layout: CacheLayout
    rows: int
    documents: int
    prompts: dict[str, str]
    document_role: Role
    ids: Literal["text", "name"] = "text"
    labels: tuple[str, ...] = ()
    fingerprint: str = ""
    probes: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What stands in the `manifest.json` of a token cache; all of its datasets are of one tokenizer."""

    tokenizer: TokenizerFacts
    datasets: dict[str, DatasetFacts] = field(default_factory=dict)
    version: int = 1

    def save(self, out: Path) -> None:
        with atomic_file(out / MANIFEST) as file:
            json.dump(asdict(self), file, indent=2, ensure_ascii=False)

    @staticmethod
    def load(out: Path) -> Manifest:
        """Errors: `DataError` for a manifest that is damaged or not of a token cache."""
        try:
            tree = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
            sets = {
                name: DatasetFacts(**facts | {"labels": tuple(facts["labels"])})
                for name, facts in tree["datasets"].items()
            }
            return Manifest(TokenizerFacts(**tree["tokenizer"]), sets, tree["version"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"not a readable manifest of a token cache ({error})",
                where=out / MANIFEST,
                fix="tokenize again, or for a cache of another tool: embedsmith tokenize --adopt",
            ) from error

    @staticmethod
    def to_write(out: Path, tokenizer: TokenizerFacts) -> Manifest:
        """The manifest of a folder to write into, or a new one.

        Errors: `DataError` for a cache of another tokenizer, `CheckpointError` for one of another maximum length,
        naming both.
        """
        if not (out / MANIFEST).exists():
            return Manifest(tokenizer)
        before = Manifest.load(out)
        before.tokenizer.refuse_other(tokenizer, out)
        if before.tokenizer.max_length != tokenizer.max_length:
            raise CheckpointError(
                f"the cache was cut at {before.tokenizer.max_length} tokens, not at {tokenizer.max_length}",
                where=out,
                fix="choose another folder, or the same --max-length",
            )
        return before
