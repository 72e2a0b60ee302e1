"""Texts to token ids: prompts, truncation, and where the body starts. The only place where a prompt meets a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from embedsmith.core.encoder import Role
from embedsmith.core.errors import DataError, ModelError
from embedsmith.core.tokens import TokenBatch
from embedsmith.models.config import Settings
from embedsmith.models.prompts import filled

ROLE_NAMES: Mapping[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names under which folders keep the prompt of a role."""

Instruction = str | Sequence[str | None] | None


def prompt_for(settings: Settings, role: Role, task: str | None = None) -> str:
    """The prompt of a text: the first of `task-role`, `task`, role (for documents also `passage` and `corpus`), the
    default prompt; else none. An empty prompt that was set on purpose counts."""
    if role not in ROLE_NAMES:
        raise ModelError(f"unknown role {role!r}", expected="query or document")
    keys = [f"{task}-{name}" for name in ROLE_NAMES[role]] + [task] if task is not None else []
    for key in (*keys, *ROLE_NAMES[role], settings.default_prompt):
        if key is not None and key in settings.prompts:
            return settings.prompts[key]
    return ""


class TextTokenizer:
    """A fast tokenizer with the settings of one model. Every list of texts is one call into its native code.

    Errors: `ModelError` for a tokenizer without a fast (Rust) form: character offsets come only from there.
    """

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
        self.pad_id = _first_id(tokenizer.pad_token_id, tokenizer.eos_token_id)
        self._filler_id = _first_id(tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)

    def __call__(
        self,
        texts: Sequence[str],
        settings: Settings,
        role: Role,
        task: str | None = None,
        instruction: Instruction = None,
    ) -> TokenBatch:
        prompts = _prompts(texts, prompt_for(settings, role, task), instruction, settings.templates.get(role))
        is_query = role == "query"
        if settings.echo is not None:
            prompts, texts = self._twice(prompts, texts, settings)
        self._set_up(settings.max_length)
        if not any(prompts):
            encodings = _read(self._native.encode_batch_fast, texts)
            rows = [encoding.ids or [self._filler_id] for encoding in encodings]
            return TokenBatch.from_rows(rows, np.zeros(len(rows), np.int64).tolist(), is_query)
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        encodings = _read(self._native.encode_batch, whole)
        rows = [encoding.ids or [self._filler_id] for encoding in encodings]
        starts = [_body_start(encoding, len(prompt)) for encoding, prompt in zip(encodings, prompts, strict=True)]
        return TokenBatch.from_rows(rows, starts, is_query)

    def _twice(
        self, prompts: Sequence[str], texts: Sequence[str], settings: Settings
    ) -> tuple[list[str], Sequence[str]]:
        """Every text said twice, the first time as part of the prompt, both cut to the same half of the room."""
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


def _read(encode: Callable[[list[str]], list[Any]], texts: Sequence[str]) -> list[Any]:
    """Errors: `DataError` for broken Unicode, which the native code refuses without saying where it is."""
    try:
        return encode(list(texts))
    except TypeError:
        broken = (number for number, text in enumerate(texts) if text.encode("utf-8", "replace").decode() != text)
        number = next(broken, None)
        if number is None:
            raise
        raise DataError(f"broken Unicode in text {number}", expected="text without lone surrogates") from None


def _prompts(texts: Sequence[str], prompt: str, instruction: Instruction, template: str | None) -> list[str]:
    """One prompt a text. An instruction goes into the role's template; without one it stands in the prompt's place,
    word for word."""
    if instruction is None:
        return [prompt] * len(texts)
    if template is not None:
        given = [instruction] * len(texts) if isinstance(instruction, str) else instruction
        instruction = [None if own is None else filled(template, own) for own in given]
    if isinstance(instruction, str):
        return [instruction] * len(texts)
    if len(instruction) != len(texts):
        raise ModelError(f"{len(instruction)} instructions for {len(texts)} texts", expected="one a text")
    return [prompt if own is None else own for own in instruction]


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


def _first_id(*candidates: int | None) -> int:
    return next((candidate for candidate in candidates if candidate is not None), 0)
