"""A causal language model on this machine, through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.registry import generators
from embedsmith.core.seeds import derive_seed
from embedsmith.data.curate.ask import Accept, Answer, Refusal, Spending


@generators.register("local", formula="transformers' generate")
@dataclass(frozen=True)
class LocalModel:
    """A causal language model from a folder or a hub id, run here.

    With a chat template the prompt is a user's message. `temperature: 0` takes the most probable token each time;
    above, tokens are drawn with a seed made of `seed` and the batch. `max_prompt` tokens of a prompt are read: the end
    is kept. `dtype: None` is what the checkpoint was saved in on a GPU, and fp32 on a CPU.
    """

    path: str
    max_tokens: int = 96
    max_prompt: int = 2048
    temperature: float = 0.0
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.max_prompt, self.batch_size) < 1 or self.temperature < 0:
            raise RecipeError("max_tokens, max_prompt and batch_size must be 1 or more, temperature 0 or more")

    @property
    def window(self) -> int:
        return self.batch_size

    def identity(self) -> object:
        folder = Path(self.path)
        files = sorted(folder.glob("*")) if folder.is_dir() else []
        state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
        return [self.path, state, self.max_tokens, self.max_prompt, self.temperature, self.seed]

    def answers(
        self, prompts: Sequence[str], accept: Accept, spent: Spending
    ) -> Iterator[tuple[int, Answer | Refusal]]:
        import torch

        if not prompts:
            return
        model, tokenizer = _load(self.path, self.device, self.dtype)
        texts = [_chat(tokenizer, prompt) for prompt in prompts]
        inputs = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.max_prompt,
            add_special_tokens=tokenizer.chat_template is None,
        ).to(model.device)
        with torch.random.fork_rng(enabled=self.temperature > 0), torch.inference_mode():
            torch.manual_seed(derive_seed(self.seed, *prompts)) if self.temperature > 0 else None
            out_NT = model.generate(**inputs, **self._sampling(), pad_token_id=tokenizer.pad_token_id)
        width = inputs["input_ids"].shape[1]
        for place, said in enumerate(tokenizer.batch_decode(out_NT[:, width:], skip_special_tokens=True)):
            read = int(inputs["attention_mask"][place].sum())
            written = int((out_NT[place, width:] != tokenizer.pad_token_id).sum())
            yield place, Answer(said, accept(said), 0, read, written)

    def _sampling(self) -> dict[str, Any]:
        common = {"max_new_tokens": self.max_tokens}
        if self.temperature == 0:
            return common | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return common | {"do_sample": True, "temperature": self.temperature}


@lru_cache(maxsize=1)
def _load(path: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")
        kind = dtype or ("float32" if chosen == "cpu" else "auto")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a causal language model ({str(error).splitlines()[0]})",
            where=path,
            expected="a folder with a model and its tokenizer, or a hub id",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(chosen).eval(), tokenizer


def _chat(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
