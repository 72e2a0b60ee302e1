"""Texts to token ids: prompts, truncation, and where the body starts. The only place where a prompt meets a text.

A template says how an instruction becomes the text in front of a text: one string a role, with `{instruction}` where
the instruction goes. Templates and the instructions of tasks are turned into plain prompts by `task-role` and role when
a model is loaded, so that training, evaluation and every program that reads the saved folder put the same characters in
front of a text. The templates are kept too: an instruction that comes with a single record is put into them.

Special tokens (an end token for last-token pooling, a first token for cls pooling) are put into the tokenizer's own
post-processing, so that truncation leaves room for them, nothing appends them twice, and a saved tokenizer adds them in
every program.

MCLS puts many CLS tokens into one long text, for encoders that were trained on short ones: a CLS stands before every
block of content tokens, the text is encoded once with full attention, and the vector is the mean of the states of all
CLS. Source: M3-Embedding (Chen et al., 2024), section 3.4; the exact sequence, `[CLS] t1..t256 [CLS] t257.. [SEP]`, is
reconstructed. A text of one block has its ordinary CLS vector.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.processors import Sequence as Steps

from embedsmith.core.encoder import Role
from embedsmith.core.errors import DataError, ModelError
from embedsmith.core.progress import log
from embedsmith.core.settings import did_you_mean
from embedsmith.core.tokens import TokenBatch
from embedsmith.models.config import Settings

PLACE = "{instruction}"
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""What Qwen3-Embedding and E5-mistral use where no instruction is given."""

TEMPLATES: Mapping[str, Mapping[str, str]] = {
    "qwen3": {"query": "Instruct: {instruction}\nQuery:", "document": ""},
    "f2llm": {"query": "Instruct: {instruction}\nQuery: ", "document": ""},
    "e5": {"query": "query: ", "document": "passage: "},
    "e5-instruct": {"query": "Instruct: {instruction}\nQuery: ", "document": ""},
    "bge": {"query": "Represent this sentence for searching relevant passages: ", "document": ""},
    "bge-zh": {"query": "为这个句子生成表示以用于检索相关文章：", "document": ""},
    "none": {"query": "", "document": ""},
}
"""Published ones. Qwen3-Embedding has no space behind `Query:`, F2LLM has one; they tokenise differently."""

SYMMETRIC = ("sts", "clustering", "classification")
"""Tasks in which neither side is a document to be found: both get the query's template."""


def template_named(name: str | Mapping[str, str]) -> dict[str, str]:
    """A published template by name, or your own by role. Errors: `ModelError` naming the nearest known."""
    if isinstance(name, Mapping):
        if unknown := sorted(name.keys() - {"query", "document"}):
            raise ModelError(f"a template for the role {unknown[0]!r}", expected="query, document")
        return {"query": "", "document": "", **{role: unescaped(text) for role, text in name.items()}}
    if name not in TEMPLATES:
        raise ModelError(
            f"unknown template {name!r}{did_you_mean(name, list(TEMPLATES))}",
            expected=f"one of {', '.join(TEMPLATES)}, or a text a role",
        )
    return dict(TEMPLATES[name])


def compiled(templates: Mapping[str, str], instructions: Mapping[str, str]) -> dict[str, str]:
    """Prompts by role, and by `task-role` for every task that has an instruction. `default` names the instruction of
    texts without a task."""
    plain = instructions.get("default", DEFAULT_INSTRUCTION)
    prompts = {role: filled(template, plain) for role, template in templates.items()}
    for task, instruction in instructions.items():
        if task == "default":
            continue
        for role in ("query", "document"):
            side = "query" if task in SYMMETRIC else role
            prompts[f"{task}-{role}"] = filled(templates[side], instruction)
    return prompts


def filled(template: str, instruction: str) -> str:
    return template.replace(PLACE, unescaped(instruction))


def unescaped(text: str) -> str:
    r"""A backslash and an n, as a shell hands them over, are a line break; the log says so."""
    plain = text.replace("\\n", "\n").replace("\\t", "\t")
    if plain != text:
        log.info("a prompt was given with escapes and is read as %r", plain)
    return plain


Instruction = str | Sequence[str | None] | None


class TextTokenizer:
    """A fast tokenizer with the settings of one model. Every list of texts is one call into its native code.

    `rows`: of the embedding table, where some of the tokenizer's ids lie beyond it.
    Errors: `ModelError` for a tokenizer without a fast (Rust) form: character offsets come only from there.
    """

    rows: int | None = None

    def __init__(self, tokenizer: Any, name: str = "tokenizer") -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer",
                where=name,
                expected="a fast tokenizer, with a tokenizer.json",
                fix="convert it once with transformers and save it beside the model",
            )
        self.tokenizer = tokenizer
        self._native = tokenizer.backend_tokenizer
        ids = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        self.filler_id: int = next((number for number in ids if number is not None), 0)
        self.pad_id: int = next((number for number in (tokenizer.pad_token_id, ids[0]) if number is not None), 0)

    def __call__(
        self,
        texts: Sequence[str],
        settings: Settings,
        role: Role | Sequence[Role],
        task: str | None = None,
        instruction: Instruction = None,
    ) -> TokenBatch:
        """Token ids of N texts, of one role or each of its own. Errors: `DataError` for broken Unicode, naming the
        text."""
        roles = [role] * len(texts) if isinstance(role, str) else role
        prompt_of = {each: settings.prompt_for(each, task) for each in dict.fromkeys(roles)}
        prompts = [prompt_of[each] for each in roles]
        if instruction is not None:
            prompts = _instructed(prompts, instruction, [settings.templates.get(each) for each in roles])
        if settings.echo is not None:
            prompts, texts = self._twice(prompts, texts, settings)
        with_prompts = any(prompts)
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)] if with_prompts else list(texts)
        try:
            encodings = self._encoded(whole, [settings.length_for(each) for each in roles], with_prompts)
        except TypeError:  # broken Unicode, which the native code refuses without saying where it is
            for number, text in enumerate(whole):
                if text.encode("utf-8", "replace").decode() != text:
                    raise DataError(
                        f"broken Unicode in text {number}", expected="text without lone surrogates"
                    ) from None
            raise
        starts = [0] * len(texts)
        if with_prompts:
            starts = [_body_start(encoding, len(prompt)) for encoding, prompt in zip(encodings, prompts, strict=True)]
        rows: Iterable[list[int]] = (encoding.ids or [self.filler_id] for encoding in encodings)
        if settings.expansion is not None:
            filled, number = settings.expansion.length, self.tokenizer.convert_tokens_to_ids(settings.expansion.token)
            rows = [
                [*ids, *[number] * (filled - len(ids))] if each == "query" else ids
                for ids, each in zip(rows, roles, strict=True)
            ]
        tokens = TokenBatch.from_rows(rows, starts, [each == "query" for each in roles])
        if self.rows is not None and (beyond := np.flatnonzero(tokens.id_S >= self.rows)).size:
            number = int(np.searchsorted(tokens.offset_P, beyond[0], side="right")) - 1
            token = self.tokenizer.convert_ids_to_tokens(int(tokens.id_S[beyond[0]]))
            raise DataError(f"text {number} has the mark {token!r}, for which the model has no embedding")
        return tokens

    def _encoded(self, texts: list[str], lengths: list[int], with_offsets: bool) -> list[Any]:
        """Every text, cut to its length."""
        encode = self._native.encode_batch if with_offsets else self._native.encode_batch_fast
        if len(set(lengths)) <= 1:
            self._set_up(next(iter(lengths), None))
            whole: list[Any] = encode(texts)
            return whole
        found: list[Any] = [None] * len(texts)
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            self._set_up(length)
            for row, encoding in zip(rows, encode([texts[row] for row in rows]), strict=True):
                found[row] = encoding
        return found

    def _twice(
        self, prompts: Sequence[str], texts: Sequence[str], settings: Settings
    ) -> tuple[list[str], Sequence[str]]:
        """Every text put in twice, the first time as part of the prompt, both cut to the same half of the room."""
        assert settings.echo is not None
        before, between = settings.echo.split("{text}")[:2]
        self._set_up(None)
        around = {prompt: len(self._native.encode(prompt + before + between).ids) for prompt in set(prompts)}
        encodings = self._native.encode_batch(list(texts), add_special_tokens=False)
        cut: list[str] = []
        for prompt, text, encoding in zip(prompts, texts, encodings, strict=True):
            room = max((settings.max_length - around[prompt] - 2) // 2, 1)  # 2: a token may split at either seam
            cut.append(text if len(encoding.ids) <= room else text[: encoding.offsets[room - 1][1]])
        return [prompt + before + text + between for prompt, text in zip(prompts, cut, strict=True)], cut

    def _set_up(self, max_length: int | None) -> None:
        """Change the native tokenizer only where it differs: changing it while another thread uses it is an error, and
        training tokenizes ahead in a thread of its own."""
        if self._native.padding is not None:
            self._native.no_padding()
        truncation = self._native.truncation
        if max_length is None:
            if truncation is not None:
                self._native.no_truncation()
        elif truncation is None or truncation["max_length"] != max_length:
            self._native.enable_truncation(max_length=max_length)


def _instructed(
    prompts: list[str], instruction: str | Sequence[str | None], templates: Sequence[str | None]
) -> list[str]:
    """An instruction goes into the role's template; without one it stands in the prompt's place, word for word."""
    given = [instruction] * len(prompts) if isinstance(instruction, str) else instruction
    if len(given) != len(prompts):
        raise ModelError(f"{len(given)} instructions for {len(prompts)} texts", expected="one a text")
    return [
        prompt if own is None else own if template is None else filled(template, own)
        for prompt, own, template in zip(prompts, given, templates, strict=True)
    ]


def _body_start(encoding: Any, prompt_length: int) -> int:
    """Tokens before the first one that reaches beyond the prompt (found by characters: a tokenizer may merge across
    the seam). Where truncation left no body, the special tokens at the end remain."""
    if prompt_length == 0:
        return 0
    after_prompt = 0
    for place, (_, end) in enumerate(encoding.offsets):
        if end > prompt_length:
            return place
        after_prompt = place + 1 if end > 0 else after_prompt
    return after_prompt


def room_for(max_length: int, block: int, ends: int) -> int:
    """Tokens that a text may have before the CLS tokens between its blocks are put in, so that it then has at most
    `max_length`: 1 + n + ends for the largest n with n + ceil(n / block) + ends <= max_length."""
    room = max_length - ends
    content = room - -(-room // (block + 1))
    return 1 + content + ends


def with_cls_blocks(tokens: TokenBatch, block: int, ends: int) -> TokenBatch:
    """Every row `[CLS] content end` with its CLS also before each further block of content."""
    rows: list[list[int]] = []
    body: list[int] = []
    for number, start in enumerate(tokens.offset_P[:-1]):
        ids = tokens.id_S[start : tokens.offset_P[number + 1]]
        stop = max(len(ids) - ends, 1)
        places = np.arange(1 + block, stop, block)
        rows.append(np.insert(ids, places, ids[0]).tolist())
        before = int(tokens.body_N[number])
        body.append(before + int((places < before).sum()))
    made = TokenBatch.from_rows(rows, body, is_query=False)
    return TokenBatch(made.id_S, made.offset_P, made.body_N, tokens.is_query_N)


def put_end_token(tokenizer: Any, wanted: str | None) -> int:
    """The id of the token behind every text, put there if the tokenizer does not put one there by itself.

    `wanted`: its text; `None` takes what the tokenizer appends, else its eos token.
    Errors: `ModelError` when there is no such token.
    """
    front, tail = added_tokens(tokenizer)
    if wanted is None and tail:
        return tail[-1]
    token = wanted or tokenizer.eos_token
    number = None if token is None else tokenizer.convert_tokens_to_ids(token)
    if number is None or (wanted is not None and number == tokenizer.unk_token_id):
        raise ModelError(
            "the tokenizer has no end token" if token is None else f"the tokenizer does not know {token!r}",
            where=getattr(tokenizer, "name_or_path", None) or "tokenizer",
            expected="a token to put behind every text, whose state is then the vector",
            fix="name one that the vocabulary has with model.eos_token=..., or use model.pooling=mean",
        )
    if tail[-1:] != [number]:
        _surround(tokenizer, front, [*tail, int(number)])
    return int(number)


def put_first_token(tokenizer: Any, backbone: Any, token: str) -> None:
    """`token` in front of every text; a new one gets the mean of all embeddings as its own."""
    if token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"cls_token": token})
    number = int(tokenizer.convert_tokens_to_ids(token))
    table = backbone.get_input_embeddings()
    if number >= table.num_embeddings:
        mean_H = table.weight.detach().float().mean(0)
        backbone.resize_token_embeddings(number + 1, mean_resizing=False)
        with torch.no_grad():
            backbone.get_input_embeddings().weight[number] = mean_H
    front, tail = added_tokens(tokenizer)
    if front[:1] != [number]:
        _surround(tokenizer, [number, *front], tail)


def put_single_tokens(tokenizer: Any, texts: Sequence[str]) -> None:
    """Texts that the vocabulary has, such as ColBERT's `[Q] `, become one token each wherever they stand; what it has
    not stays text."""
    vocabulary = tokenizer.get_vocab()
    for text in texts:
        known = next((one for one in (text, *text.split(None, 1)[:1]) if one in vocabulary), None)
        if known is not None and tokenizer.tokenize(known) != [known]:
            token = AddedToken(known, normalized=False, special=True)
            tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)


def check_vocabulary(tokenizer: Any, backbone: Any) -> int | None:
    """The rows of the embedding table, where some token ids lie beyond it, all of them special tokens that no text gets
    by itself (as in EmbeddingGemma, whose tokenizer knows a mark for pictures); else `None`.

    Errors: `ModelError` where words of a text, or tokens around every text, have none.
    """
    rows = len(backbone.get_input_embeddings().weight)
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    always = [number for ids in added_tokens(tokenizer) for number in ids] + [tokenizer.pad_token_id]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond |= {number: "around every text" for number in always if number is not None and number >= rows}
    if wrong := sorted(beyond.keys() - special | beyond.keys() & set(always)):
        raise ModelError(
            f"the tokenizer has {max(beyond) + 1:,} tokens and the embedding table {rows:,} rows: token {wrong[0]} "
            f"({beyond[wrong[0]]}) and {len(wrong) - 1} more have no row",
            where=getattr(tokenizer, "name_or_path", None) or "tokenizer",
            fix="put back the tokenizer that belongs to these weights; or give the table more rows with transformers "
            f"(model.resize_token_embeddings({max(beyond) + 1})), save both, and train",
        )
    return rows if beyond else None


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts in front of a text and behind it."""
    native = tokenizer.backend_tokenizer
    plain = native.encode("a", add_special_tokens=False).ids
    whole = native.encode("a").ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _surround(tokenizer: Any, front: list[int], end: list[int]) -> None:
    """One template for everything around a text: templates in a row would mistake each other's pieces for texts."""
    native = tokenizer.backend_tokenizer
    before, behind = (tokenizer.convert_ids_to_tokens(ids) for ids in (front, end))
    named = [*zip(before, front, strict=True), *zip(behind, end, strict=True)]
    template = TemplateProcessing(
        single=[*before, "$A", *behind], pair=[*before, "$A", "$B", *behind], special_tokens=named
    )
    offsets = _byte_level(json.loads(native.to_str())["post_processor"])
    native.post_processor = template if offsets is None else Steps([offsets, template])


def _byte_level(processing: Any) -> ByteLevel | None:
    """The step that says where tokens of bytes lie in the text, wherever it is in a tokenizer's processing."""
    if processing is None:
        return None
    if processing["type"] == "ByteLevel":
        return ByteLevel(**{key: value for key, value in processing.items() if key != "type"})
    found = (_byte_level(step) for step in processing.get("processors", ()))
    return next((step for step in found if step is not None), None)
