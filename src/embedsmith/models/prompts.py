"""Instruction templates: how a role, a task and an instruction become the text in front of a text.

A template is one string a role, with `{instruction}` where the instruction goes. Templates and the instructions of
tasks are turned into plain prompts by `task-role` and role when a model is loaded, so that training, evaluation and
every program that reads the saved folder put the same characters in front of a text. The templates are kept too: an
instruction that comes with a single record is put into them.
"""

from __future__ import annotations

from collections.abc import Mapping

from embedsmith.core.errors import ModelError
from embedsmith.core.progress import log
from embedsmith.core.registry import did_you_mean

PLACE = "{instruction}"
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""What Qwen3-Embedding and E5-mistral say where nothing else is said."""

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
    """A published template by name, or one's own by role. Errors: `ModelError` naming the nearest known."""
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
    r"""A backslash and an n, as a shell hands them over, are a line break. Said once, here, and visibly."""
    plain = text.replace("\\n", "\n").replace("\\t", "\t")
    if plain != text:
        log.info("a prompt was given with escapes and is read as %r", plain)
    return plain
