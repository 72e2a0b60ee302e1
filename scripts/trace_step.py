#!/usr/bin/env python3
"""How far a training step goes through the code, beside the frozen commit and the targets of the redesign.

    python scripts/trace_step.py         three numbers
    python scripts/trace_step.py --list  and the functions and forms behind them, in order

A tiny random model is trained by the command line on a small retrieval source (InfoNCE, a hard negative a query, 8
queries a batch). Nothing here names a module of the package, so that the numbers of any layout can be compared.

- Functions: the distinct `def`s of modules and classes that one steady step passes, from the end of one optimizer step
  to the end of the next: on the thread that trains, and on the one that meanwhile draws a batch ahead. What is written
  inside a function (closures, lambdas, comprehensions) is part of it.
- Changes of file: the functions of a thread in the order of their calls; one counts where it and the one called before
  it stand in different files. A function that is called for every row counts every time.
- Forms: the kinds of value that carry one marked query from its line in a file to the first backward pass, seen among
  the arguments and results of such functions:
    - a class of the package; one that has a length counts once for every number of texts it holds (the tokens of a
      side, of the whole step and of a chunk are three forms);
    - outside of any class: a text, a row of texts (a dict), token ids (in a list, an array or a tensor), vectors (in a
      floating tensor).
  Lists, tuples and other dicts count as what they hold. An object that holds every row of the file, as texts or as
  tokens, is a store, not a form of one example; models and objects of other libraries are not looked into.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import random
import re
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "embedsmith"
ROWS, BATCH, STEPS, TRACED = 48, 8, 12, 6
"""Rows of the file and of a batch, steps of the run, and how many are done before the one that is traced."""
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "by", "mat", "tree", "red", "blue", "big", "old", "new", "far"]
NAMES = [f"row{number}" for number in range(ROWS)]
"""One word for each row, in its query alone. The last one marks the example that is followed: when it is read, a store
holds all the others already."""
FIRST_ID = 1000
"""The token id of the first of them: no count or place in such a run is as large, so a number tells a token."""
TOKEN_OF_MARK = FIRST_ID + ROWS - 1
WIDTH = 20
"""Of the model, whose layers do next to nothing: the last coordinate of a vector is about 0 where the mark is not in
its text, so that a vector tells its text."""

# At 69c5e05, by this script on a checkout of that commit. The redesign's own count, of which the targets are parts, was
# 141 functions, 185 changes of file and 17 forms. Closures and lambdas counted too, it would be 162 and 204 here.
FROZEN = {"functions": 149, "changes of file": 189, "forms of an example": 17}
TARGETS = {"functions": 90, "changes of file": 110, "forms of an example": 11}


def write_model(folder: Path) -> None:
    """A random BERT of two layers, which shows the mark (see `WIDTH`), with a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    unused = [f"[unused{number}]" for number in range(FIRST_ID - len(special) - len(WORDS))]
    vocabulary = {token: place for place, token in enumerate([*special, *WORDS, *unused, *NAMES])}
    assert vocabulary[NAMES[-1]] == TOKEN_OF_MARK
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=1e-4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        word_VH = model.embeddings.word_embeddings.weight.normal_()
        word_VH[:, -1] = word_VH[:, :-1].mean(1)  # 0 after layer normalisation
        word_VH[TOKEN_OF_MARK] = 10.0 * torch.eye(WIDTH)[-1]
    model.save_pretrained(folder)


def write_recipe(folder: Path) -> Path:
    """The model, `ROWS` rows with a positive and two negatives each, and a recipe that trains the one on the other."""
    chance = random.Random(0)

    def text() -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(2, 9)))

    rows = [{"query": f"{name} {text()}", "pos": [text()], "neg": [text(), text()]} for name in NAMES]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(folder / "model")
    tree = {
        "model": {"path": str(folder / "model"), "pooling": "mean"},
        "data": [{"path": str(folder / "pairs.jsonl"), "batch_size": BATCH, "negatives": 1}],
        "train": {"steps": STEPS, "learning_rate": 1e-3, "checkpoint_every": STEPS, "precision": "fp32"},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return folder / "recipe.yaml"


@dataclass(frozen=True)
class Function:
    """A `def` of a module or a class."""

    file: str
    name: str
    line: int

    @staticmethod
    def of(code: CodeType) -> Function | None:
        """`None` for code outside of the package or inside a function."""
        path = Path(code.co_filename)
        if "<locals>" in code.co_qualname or not path.is_relative_to(PACKAGE):
            return None
        return Function(str(path.relative_to(PACKAGE)), code.co_qualname, code.co_firstlineno)


@dataclass
class Steps:
    """The calls of one step, thread by thread, between the ends of two optimizer steps."""

    calls: dict[str, list[Function]] = field(default_factory=dict)
    done: int = 0
    last: float = field(default_factory=time.monotonic)  # when the package did anything, on any thread
    _known: dict[CodeType, Function | None] = field(default_factory=dict)

    def known(self, code: CodeType) -> Function | None:
        self.last = time.monotonic()
        if code not in self._known:
            self._known[code] = Function.of(code)
        return self._known[code]

    def note(self, function: Function) -> None:
        if self.done == TRACED:
            self.calls.setdefault(threading.current_thread().name, []).append(function)

    def end_of_step(self) -> None:
        """Before and after the traced step the other threads come to rest, so that it has all of one drawn batch."""
        if self.done in (TRACED - 1, TRACED):
            time.sleep(0.1)
            while time.monotonic() - self.last < 0.3:
                time.sleep(0.05)
        self.done += 1

    @property
    def functions(self) -> set[Function]:
        return {function for calls in self.calls.values() for function in calls}

    @property
    def changes(self) -> int:
        pairs = [pair for calls in self.calls.values() for pair in pairwise(calls)]
        return sum(before.file != after.file for before, after in pairs)


@dataclass
class Journey:
    """The forms of the marked query, each with the first place where it was seen."""

    forms: dict[str, str] = field(default_factory=dict)
    trains: int | None = None  # the thread in which the query has reached the model
    ended: bool = False

    def reach(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Before any module's forward pass."""
        if self.trains is None and any(_has_token(value) for value in inputs):
            self.trains = threading.get_ident()

    def end(self) -> None:
        self.ended = self.trains is not None

    def look(self, value: Any, where: str) -> None:
        for form in self.forms_of(value):
            self.forms.setdefault(form, where)

    def forms_of(self, value: Any) -> Iterator[str]:
        if isinstance(value, str | bytes):
            if self.carries(value):
                yield "text"
        elif _has_token(value):
            yield "token ids"
        elif self._is_vectors(value):
            yield "vectors"
        elif isinstance(value, Mapping) and _names_in(value):
            if NAMES[-1] in _names_in(value):
                yield "row of texts"
        elif (members := _members(value)) is not None:
            for member in members:
                yield from self.forms_of(member)
        elif _is_ours(value) and self.carries(value) and len(_names_in(value) | _marks_in(value)) < ROWS:
            length = getattr(type(value), "__len__", None)
            yield type(value).__name__ if length is None else f"{type(value).__name__} of {len(value)} texts"

    def carries(self, value: Any) -> bool:
        return any(
            NAMES[-1] in _words(part) if isinstance(part, str | bytes) else _has_token(part) or self._is_vectors(part)
            for part in _parts(value)
        )

    def _is_vectors(self, value: Any) -> bool:
        """Whether a vector in it shows the mark. Before the query reaches the model, only its weights would."""
        import torch

        if self.trains != threading.get_ident() or not isinstance(value, torch.Tensor):
            return False
        if isinstance(value, torch.nn.Parameter) or not value.is_floating_point() or value.shape[-1:] != (WIDTH,):
            return False
        return bool((value[..., -1].abs() > 0.05 * value.abs().amax(-1)).any())


def _words(text: str | bytes) -> set[str]:
    return set(re.findall(r"\brow\d+\b", text.decode(errors="replace") if isinstance(text, bytes) else text))


def _names_in(value: Any) -> set[str]:
    """The rows of the file whose text is in a value."""
    return {word for part in _parts(value) if isinstance(part, str | bytes) for word in _words(part)} & set(NAMES)


def _marks_in(value: Any) -> set[str]:
    """The rows of the file whose token is in a value."""
    import numpy as np
    import torch

    numbers: set[int] = set()
    for part in _parts(value):
        if isinstance(part, torch.Tensor) and part.dtype in (torch.int32, torch.int64):
            numbers.update(part.unique().tolist())
        elif isinstance(part, np.ndarray) and part.dtype in (np.int32, np.int64):
            numbers.update(np.unique(part).tolist())
    return {NAMES[number - FIRST_ID] for number in numbers if FIRST_ID <= number < FIRST_ID + ROWS}


def _has_token(value: Any) -> bool:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value.dtype in (torch.int32, torch.int64) and bool((value == TOKEN_OF_MARK).any())
    if isinstance(value, np.ndarray):
        return value.dtype in (np.int32, np.int64) and bool((value == TOKEN_OF_MARK).any())
    return isinstance(value, list | tuple) and TOKEN_OF_MARK in [one for one in value if type(one) is int]


def _is_ours(value: Any) -> bool:
    import torch

    kind = type(value)
    return kind.__module__.partition(".")[0] == PACKAGE.name and not isinstance(value, torch.nn.Module | type)


def _members(value: Any) -> Iterable[Any] | None:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set | frozenset) else None


def _parts(value: Any) -> Iterator[Any]:
    """The value and all that it holds, each object once."""
    waiting: list[Any] = [value]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if (members := _members(one)) is not None:
            waiting += members
        elif _is_ours(one):
            waiting += [getattr(one, name) for name in getattr(type(one), "__slots__", ()) if hasattr(one, name)]
            waiting += list(getattr(one, "__dict__", {}).values())


def _parameters(code: CodeType) -> tuple[str, ...]:
    several = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + several]


def trace(folder: Path) -> tuple[Steps, Journey]:
    """Train in this process and watch. Errors: `RuntimeError` with what the run printed where it fails."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps, journey = Steps(), Journey()

    def profile(frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(PACKAGE)):
            return
        function = steps.known(code)
        if function is None:
            return
        if event == "call":
            steps.note(function)
        if not journey.ended:
            where = f"{function.file} {function.name}"
            if event == "call":
                for name in _parameters(code):
                    journey.look(frame.f_locals.get(name), f"{where}({name})")
            else:
                journey.look(result, f"{where} ->")

    backward = torch.autograd.backward

    def first_backward(*arguments: Any, **options: Any) -> None:
        journey.end()
        backward(*arguments, **options)

    printed = io.StringIO()
    with redirect_stderr(printed):
        recipe = write_recipe(folder)
    hooks = (
        register_module_forward_pre_hook(journey.reach),
        register_optimizer_step_post_hook(lambda *_: steps.end_of_step()),
    )
    torch.autograd.backward, sys.argv = first_backward, [PACKAGE.name, "train", str(recipe)]
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            runpy.run_module(PACKAGE.name, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"the training run failed:\n{printed.getvalue()}") from end
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        torch.autograd.backward = backward
        for hook in hooks:
            hook.remove()
    return steps, journey


def report(steps: Steps, journey: Journey, everything: bool) -> str:
    found = {
        "functions": len(steps.functions),
        "changes of file": steps.changes,
        "forms of an example": len(journey.forms),
    }
    lines = [f"{'number':24}{'at 69c5e05':>12}{'now':>8}{'target':>14}  met"]
    for name, value in found.items():
        met = "yes" if value <= TARGETS[name] else "no"
        lines.append(f"{name:24}{FROZEN[name]:>12}{value:>8}{f'at most {TARGETS[name]}':>14}  {met}")
    if everything:
        for thread, calls in steps.calls.items():
            lines.append(f"\nfunctions of {thread}, in the order of their first calls (how often)")
            lines += [f"  {one.file}:{one.line} {one.name} ({calls.count(one)})" for one in dict.fromkeys(calls)]
        lines.append("\nforms of the marked query (where first seen)")
        lines += [f"  {form}  ({where})" for form, where in journey.forms.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="also print the functions and the forms, in order")
    everything = parser.parse_args().list
    sys.path.insert(0, str(SOURCE))  # this tree's package, whatever is installed
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ |= {"XDG_CACHE_HOME": folder, **quiet}
        steps, journey = trace(Path(folder))
    sys.stdout.write(report(steps, journey, everything) + "\n")


if __name__ == "__main__":
    main()
