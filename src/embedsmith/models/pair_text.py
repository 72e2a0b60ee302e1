"""Pairs of a query and a document to token ids: as the two segments of an encoder, or as a question that a language
model answers with yes or no. The only place where a query meets a document.

A language model is asked in a chat template whose messages have the roles `system` (the instruction), `query` and
`document`, as sentence-transformers has it; a published template, or one of your own, is made into such a one. A
pair that is too long loses the end of its document: what the template puts behind the document stays.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedsmith.core.errors import DataError, ModelError
from embedsmith.core.settings import did_you_mean
from embedsmith.core.tokens import TokenBatch
from embedsmith.models.tokenize import DEFAULT_INSTRUCTION, Instruction, unescaped

SIGMOID = "torch.nn.modules.activation.Sigmoid"
_PLACES = re.compile(r"\{(instruction|query|document)\}")
_ROLES = {"instruction": "system", "query": "query", "document": "document"}


@dataclass(frozen=True)
class PairTemplate:
    """How a pair is put to a language model: `text` with `{query}`, `{document}` and perhaps `{instruction}` in it, the
    `instruction` where no other is given, and the tokens whose logits make the score: that of `yes`, less that of `no`
    where there is one."""

    text: str
    instruction: str = DEFAULT_INSTRUCTION
    yes: str = "yes"
    no: str | None = "no"

    def jinja(self) -> str:
        """The same as a chat template of transformers."""
        parts = _PLACES.split(self.text)
        made = []
        for place, part in enumerate(parts):
            if place % 2:
                content = f'messages | selectattr("role", "eq", "{_ROLES[part]}") | map(attribute="content") | first'
                usual = f" | default({_quoted(self.instruction)})" if part == "instruction" else ""
                made.append(f"{{{{- {content}{usual} -}}}}")
            elif part:
                made.append(f"{{{{- {_quoted(part)} -}}}}")
        return "".join(made)


def _quoted(text: str) -> str:
    """A text as jinja has it."""
    return json.dumps(text, ensure_ascii=False)


PAIR_TEMPLATES: Mapping[str, PairTemplate] = {
    "qwen3-reranker": PairTemplate(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "bge-reranker-gemma": PairTemplate(
        "<bos>A: {query}\nB: {document}\n{instruction}",
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'.",
        yes="Yes",
        no=None,
    ),
    "plain": PairTemplate(
        "Instruct: {instruction}\nQuery: {query}\nDocument: {document}\nDoes the document answer? yes or no\n"
    ),
}
"""Those of Qwen3-Reranker and of bge-reranker-v2-gemma, as published, and one for language models without any."""


def pair_template(name: str | Mapping[str, str]) -> PairTemplate:
    """A published template by name, or your own: `pair`, and perhaps `yes` and `no`. Errors: `ModelError`."""
    if isinstance(name, Mapping):
        if unknown := sorted(name.keys() - {"pair", "yes", "no"}):
            raise ModelError(f"{unknown[0]!r} in the template of a reranker", expected="pair, yes, no")
        text = unescaped(name.get("pair", ""))
        if text.count("{query}") != 1 or text.count("{document}") != 1:
            raise ModelError(
                f"the template of a reranker is {text!r}",
                expected="a text with {query} and {document} in it, and perhaps {instruction}",
                fix="set model.template.pair",
            )
        return PairTemplate(text, yes=name.get("yes", "yes"), no=name.get("no", None if "yes" in name else "no"))
    if name not in PAIR_TEMPLATES:
        raise ModelError(
            f"unknown template {name!r} of a reranker{did_you_mean(name, list(PAIR_TEMPLATES))}",
            expected=f"one of {', '.join(PAIR_TEMPLATES)}, or a mapping with `pair`",
        )
    return PAIR_TEMPLATES[name]


def answer_token(tokenizer: Any, word: str) -> int:
    """The id of the token that an answer is. Errors: `ModelError` for a word of several tokens."""
    known = tokenizer.get_vocab().get(word)
    ids = [known] if known is not None else tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ModelError(
            f"the answer {word!r} is {len(ids)} tokens",
            expected="one token of the vocabulary",
            fix="set model.template.yes and model.template.no to words that are",
        )
    return int(ids[0])


@dataclass(frozen=True)
class PairSettings:
    """How a reranker turns pairs into scores, everything decided.

    `prompt`: put before the query of an encoder's pair; of a language model the instruction, `None` for the template's
    own. `activation`: the class of torch that makes a score of the output. `yes_id`, `no_id`: the tokens whose
    logits are the output of a language model, `None` for a model with a head of its own. `structured`: whether the chat
    template wants the content of a message in parts. `chat`: what else the chat template is given.
    """

    max_length: int
    prompt: str | None = None
    activation: str = SIGMOID
    yes_id: int | None = None
    no_id: int | None = None
    structured: bool = False
    chat: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether a language model is asked."""
        return self.yes_id is not None


class PairText:
    """A fast tokenizer with the settings of one reranker. `has_types`: whether it marks the tokens of the document.

    Errors: `ModelError` for a tokenizer without a fast form, and for one that marks segments in a way of its own.
    """

    def __init__(self, tokenizer: Any, settings: PairSettings) -> None:
        if not tokenizer.is_fast:
            raise ModelError(f"{type(tokenizer).__name__} is a slow tokenizer", expected="one with a tokenizer.json")
        self.tokenizer, self.settings = tokenizer, settings
        self._native = tokenizer.backend_tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(number for number in ids if number is not None)
        self._suffixes: dict[str | None, list[int]] = {}
        self._set_up()
        if settings.asks:
            self._suffix(settings.prompt)
        types = self._native.encode("a", "b").type_ids
        self.has_types = not settings.asks and 1 in types and "token_type_ids" in tokenizer.model_input_names
        if (not settings.asks and types != sorted(types)) or max(types) > 1:
            raise ModelError(
                f"{type(tokenizer).__name__} marks the tokens of a pair as {types}",
                expected="0 for the query and what is around it, then 1 for the document",
            )

    def __call__(self, queries: Sequence[str], documents: Sequence[str], instruction: Instruction = None) -> TokenBatch:
        """Token ids of N pairs. An instruction, one for all or one a pair, replaces the prompt. `body_N` of a pair is
        where its document begins, of a question 0. Errors: `DataError` for broken Unicode, naming the pair."""
        if len(queries) != len(documents):
            raise ModelError(f"{len(queries)} queries for {len(documents)} documents", expected="one a pair")
        own = [instruction] * len(queries) if instruction is None or isinstance(instruction, str) else instruction
        prompts = [self.settings.prompt if given is None else given for given in own]
        try:
            if self.settings.asks:
                rows = self._questions(prompts, queries, documents)
                return TokenBatch.from_rows(rows, [0] * len(rows), is_query=False)
            return self._segments(prompts, queries, documents)
        except TypeError:  # broken Unicode, which the native code refuses without saying where it is
            for number, pair in enumerate(zip(queries, documents, strict=True)):
                if any(text.encode("utf-8", "replace").decode() != text for text in pair):
                    raise DataError(
                        f"broken Unicode in pair {number}", expected="text without lone surrogates"
                    ) from None
            raise

    def _segments(self, prompts: Sequence[str | None], queries: Sequence[str], documents: Sequence[str]) -> TokenBatch:
        self._set_up()
        first = [(prompt or "") + query for prompt, query in zip(prompts, queries, strict=True)]
        encodings = self._native.encode_batch_fast(list(zip(first, documents, strict=True)))
        types = [encoding.type_ids for encoding in encodings]
        starts = [row.index(1) if 1 in row else len(row) for row in types]
        return TokenBatch.from_rows([encoding.ids for encoding in encodings], starts, is_query=False)

    def _questions(
        self, prompts: Sequence[str | None], queries: Sequence[str], documents: Sequence[str]
    ) -> list[list[int]]:
        length = self.settings.max_length
        self._set_up()
        texts = [self.question(*each) for each in zip(prompts, queries, documents, strict=True)]
        rows = [encoding.ids for encoding in self._native.encode_batch_fast(texts, add_special_tokens=False)]
        if any(len(row) >= length for row in rows):
            ends = [self._suffix(prompt) if len(row) >= length else [] for row, prompt in zip(rows, prompts)]
            rows = [row[: len(row) - len(end)] + end for row, end in zip(rows, ends, strict=True)]
        return rows

    def question(self, prompt: str | None, query: str, document: str) -> str:
        """What a language model reads of one pair."""
        said = [("query", query), ("document", document)]
        said = said if prompt is None else [("system", prompt), *said]
        content = (lambda text: [{"type": "text", "text": text}]) if self.settings.structured else (lambda text: text)
        messages = [{"role": role, "content": content(text)} for role, text in said]
        rendered: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.settings.chat)
        return rendered

    def _suffix(self, prompt: str | None) -> list[int]:
        """The tokens behind every document: what two questions end with that differ in their texts."""
        if prompt not in self._suffixes:
            first, second = (
                self._native.encode(self.question(prompt, text, text), add_special_tokens=False).ids
                for text in ("0", "1 2 3 4")
            )
            count = next((n for n, (a, b) in enumerate(zip(first[::-1], second[::-1])) if a != b), None)
            if count is None or len(second) >= self.settings.max_length:
                raise ModelError(
                    f"the template and the instruction alone have {len(first):,} tokens",
                    expected=f"fewer than max_length, {self.settings.max_length:,}",
                    fix="raise model.max_length, or shorten the instruction",
                )
            self._suffixes[prompt] = first[len(first) - count :]
        return self._suffixes[prompt]

    def _set_up(self) -> None:
        """Change the native tokenizer only where it differs: another thread may be using it."""
        if self._native.padding is not None:
            self._native.no_padding()
        truncation = self._native.truncation
        if truncation is None or truncation["max_length"] != self.settings.max_length:
            self._native.enable_truncation(self.settings.max_length, direction=self.tokenizer.truncation_side)
