"""The parts of `bench.gpu`: each makes what it needs in its folder, measures, and records every figure as soon as it is
there, so that a part that is stopped leaves what it had."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import embedsmith.train.loop as loop
from bench.gpu_models import body_parameters, save_model, texts, write_pairs
from embedsmith.core.errors import EmbedsmithError
from embedsmith.data import Source
from embedsmith.losses import InfoNCE, M3SelfDistillation
from embedsmith.models import ModelConfig, load
from embedsmith.models.lora import LoraConfig
from embedsmith.models.row_kernels import ROW_KERNELS
from embedsmith.search import exact_top_k
from embedsmith.train import Recipe, TrainConfig
from embedsmith.train.build import make_accelerator

PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}
"""bf16 products a second that a card is sold with, without sparsity."""


@dataclass
class Bench:
    """Where a part works. `record(name, value)` keeps a figure. `tiny`: miniatures on whatever there is. `given`: a
    model folder that takes the place of MiniLM's shape. `around`: wraps one run of a part's main work (a profiler)."""

    folder: Path
    record: Callable[[str, Any], None]
    tiny: bool = False
    given: str | None = None
    around: Callable[[str, Callable[[], Any]], Any] | None = None
    cuda: bool = field(default_factory=torch.cuda.is_available)

    def of(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    @property
    def precision(self) -> Any:
        return "bf16" if self.cuda else "fp32"

    @property
    def longest(self) -> int:
        return self.of(512, 64)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        act()
        self.wait()
        return time.perf_counter() - start

    def forget(self) -> None:
        """Free what was measured, so that the next peak is its own."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.cuda else None

    def main_work(self, name: str, act: Callable[[], Any]) -> None:
        """Once more under the profiler, where one was asked for."""
        if self.around is not None:
            self.around(name, act)

    def mfu(self, parameters: int, tokens_a_second: float) -> float | None:
        """Of real tokens: 6 x parameters outside of embedding tables x tokens a second over the card's bf16 peak."""
        name = torch.cuda.get_device_name() if self.cuda else ""
        peak = next((value for key, value in PEAK.items() if key in name), None)
        return None if peak is None else round(6 * parameters * tokens_a_second / peak, 4)


def waits(bench: Bench, act: Callable[[], Any]) -> int | None:
    """How often the host waits for the card in `act`."""
    if not bench.cuda:
        act()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


WARM, GROUPS = 4, 5


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def trained(
    bench: Bench,
    path: str,
    rows: Path,
    batch: int,
    loss: Any,
    *,
    pooling: str,
    group: int = 3,
    warm: int = WARM,
    groups: int = GROUPS,
    train: dict[str, Any] | None = None,
    **model: Any,
) -> dict[str, Any]:
    """Steps of our trainer: medians of groups of `group` steps, which follow each other without a wait. The first
    steps, in which kernels are loaded, are left out."""
    bench.forget()
    group, warm, groups = bench.of(group, 1), bench.of(warm, 1), bench.of(groups, 2)
    steps = warm + group * groups + 1 + (group if bench.around else 0)
    recipe = Recipe(
        model=ModelConfig(path=path, pooling=pooling, max_length=bench.longest, **model),
        data=(Source(path=str(rows), task="retrieval", loss=loss, batch_size=batch),),
        output=str(bench.folder / "run"),
        train=TrainConfig(steps=steps, precision=bench.precision, log_with=(), **train or {}),
    )
    run = loop.build(recipe, make_accelerator(recipe))
    draws, seconds, outputs = run.draws(), [], []

    def several(count: int) -> None:
        for _ in range(count):
            outputs.append(loop.update(run, next(draws))[0])

    several(warm)
    outputs.clear()
    for _ in range(groups):
        seconds.append(bench.seconds(lambda: several(group)) / group)
    tokens = statistics.mean(output.tokens for output in outputs)
    padded = statistics.mean(output.padded_tokens for output in outputs)
    step = statistics.median(seconds)
    result = {
        "seconds_a_step": round(step, 5),
        "pairs_a_second": round(batch / step, 1),
        "tokens_a_second": round(tokens / step),
        "real_over_computed_tokens": round(tokens / padded, 3),
        "mfu": bench.mfu(body_parameters(run.model.backbone), tokens / step),
        "peak_GiB": bench.peak_gib(),
        "kernel": run.model.packs.kernel if run.model.packing else "none: padded",
        "waits_a_step": waits(bench, lambda: several(1)),
    }
    bench.main_work(Path(path).name, lambda: several(group))
    draws.close()  # type: ignore[attr-defined]  # a generator, whose thread ends with it
    return result


def peer_trained(bench: Bench, path: str, rows: Path, batch: int, **model: Any) -> dict[str, Any] | str:
    """The same by the trainer of sentence-transformers at its defaults; or why not."""
    if not (installed("sentence_transformers") and installed("datasets")):
        return "sentence-transformers or datasets is not installed"
    from accelerate.state import AcceleratorState
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from bench.peer_trainer import build_trainer

    bench.forget()
    AcceleratorState._reset_state(reset_partial_state=True)  # ours said no mixed precision
    group, warm, groups = bench.of(3, 1), bench.of(WARM, 1), bench.of(GROUPS, 2)
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step >= warm and (state.global_step - warm) % group == 0:
                bench.wait()
                ends.append(time.perf_counter())

    peer = SentenceTransformer(path, device="cuda" if bench.cuda else "cpu", model_kwargs=model)
    peer.max_seq_length = bench.longest
    options = {"max_steps": warm + group * groups, "per_device_train_batch_size": batch, "logging_steps": 10_000}
    options |= {"use_cpu": not bench.cuda, "bf16": bench.cuda, "learning_rate": 2e-5}
    trainer = build_trainer(peer, rows, None, bench.folder / "peer", **options)
    trainer.add_callback(Clock())
    trainer.train()
    step = statistics.median(later - sooner for sooner, later in pairwise(ends)) / group
    return {
        "seconds_a_step": round(step, 5),
        "pairs_a_second": round(batch / step, 1),
        "precision": trainer.accelerator.mixed_precision,
        "peak_GiB": bench.peak_gib(),
    }


def ratio(bench: Bench, name: str, ours: dict[str, Any], theirs: dict[str, Any] | str, key: str) -> None:
    """Record how many times faster ours is, where there is a peer to compare with."""
    if isinstance(theirs, dict):
        bench.record(name, round(ours[key] / theirs[key], 3))


def saved_embedder(bench: Bench, name: str, pooling: str) -> str:
    """A folder that both sides load: our own layout is sentence-transformers'."""
    path = save_model(bench.folder, name, bench.longest, bench.tiny)
    folder = str(bench.folder / f"{name}-embedder")
    load(path, pooling=pooling, max_length=bench.longest, device="cpu").save(folder)
    return folder


def decoder(bench: Bench) -> None:
    """Qwen3-0.6B: full fine-tuning and LoRA, batches of 128 pairs."""
    path = save_model(bench.folder, "qwen3", bench.longest, bench.tiny)
    batch = bench.of(128, 4)
    rows = write_pairs(bench.folder / "rows.jsonl", batch * 24)
    full = trained(bench, path, rows, batch, InfoNCE(0.05), pooling="last")
    bench.record("full", full)
    lora = trained(bench, path, rows, batch, InfoNCE(0.05), pooling="last", lora=LoraConfig(r=16))
    bench.record("lora", lora)
    bench.record("lora_over_full", round(lora["tokens_a_second"] / full["tokens_a_second"], 3))


def m3(bench: Bench) -> None:
    """XLM-R-large: dense alone, and three heads with self-distillation."""
    path = save_model(bench.folder, "xlmr", bench.longest, bench.tiny)
    batch = bench.of(64, 4)
    rows = write_pairs(bench.folder / "rows.jsonl", batch * 24)
    dense = trained(bench, path, rows, batch, InfoNCE(0.05), pooling="cls")
    bench.record("dense", dense)
    heads = ("dense", "sparse", "multivector")
    every = trained(bench, path, rows, batch, M3SelfDistillation(), pooling="cls", heads=heads)
    bench.record("three_heads", every)
    bench.record("three_heads_over_dense", round(every["seconds_a_step"] / dense["seconds_a_step"], 3))


def bert(bench: Bench) -> None:
    """BERT-base, batches of 256 pairs, beside sentence-transformers."""
    path, batch = saved_embedder(bench, "bert", "mean"), bench.of(256, 4)
    ours = _beside(bench, path, batch, "")
    if not installed("flash_attn"):
        bench.record("sentence_transformers_flattened", "flash_attn is not installed")
        return
    rows = bench.folder / f"rows{batch}.jsonl"
    flat = peer_trained(bench, path, rows, batch, attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    bench.record("sentence_transformers_flattened", flat)
    ratio(bench, "times_as_fast_as_flattened", ours, flat, "pairs_a_second")


def minilm(bench: Bench) -> None:
    """MiniLM, batches of 64 and 256 pairs, beside sentence-transformers."""
    path = bench.given or saved_embedder(bench, "minilm", "mean")
    for batch in (bench.of(64, 4), bench.of(256, 8)):
        _beside(bench, path, batch, f"_{batch}")


def _beside(bench: Bench, path: str, batch: int, name: str) -> dict[str, Any]:
    rows = write_pairs(bench.folder / f"rows{batch}.jsonl", batch * 24)
    ours = trained(bench, path, rows, batch, InfoNCE(0.05), pooling="mean")
    bench.record(f"embedsmith{name}", ours)
    theirs = peer_trained(bench, path, rows, batch)
    bench.record(f"sentence_transformers{name}", theirs)
    ratio(bench, f"times_as_fast{name}", ours, theirs, "pairs_a_second")
    return ours


def caching(bench: Bench) -> None:
    """MiniLM: a batch of 16,384 pairs in the memory of one of 256."""
    path = bench.given or saved_embedder(bench, "minilm", "mean")
    small, large = bench.of(256, 4), bench.of(16_384, 16)
    plain = trained(
        bench, path, write_pairs(bench.folder / "small.jsonl", small * 24), small, InfoNCE(0.05), pooling="mean"
    )
    bench.record(f"batch_{small}", plain)
    tokens = round(plain["tokens_a_second"] * plain["seconds_a_step"])
    rows = write_pairs(bench.folder / "large.jsonl", large * 3)
    streamed, options = InfoNCE(0.05, block_size=2048), {"token_budget": tokens}
    big = trained(bench, path, rows, large, streamed, pooling="mean", group=1, warm=1, groups=2, train=options)
    bench.record(f"batch_{large}", big)
    if bench.cuda:
        bench.record("memory_ratio", round(big["peak_GiB"] / plain["peak_GiB"], 3))
    bench.record("time_a_text_ratio", round(plain["pairs_a_second"] / big["pairs_a_second"], 3))


def encode(bench: Bench) -> None:
    """Texts a second of `encode` for MiniLM and BERT-base, beside sentence-transformers, both in bf16."""
    documents, few = texts(bench.of(100_000, 60), seed=5), bench.of(10_000, 30)
    for name in ("minilm", "bert"):
        path = (bench.given if name == "minilm" else None) or saved_embedder(bench, name, "mean")
        own = documents if name == "minilm" else documents[: len(documents) // 2]
        ours = _encoded(bench, name, path, own, few)
        theirs = _peer_encoded(bench, path, documents[:few])
        bench.record(f"{name}_sentence_transformers", theirs)
        ratio(bench, f"{name}_times_as_fast", ours, theirs, "texts_a_second")


def _encoded(bench: Bench, name: str, path: str, documents: list[str], few: int) -> dict[str, Any]:
    bench.forget()
    model = load(path, device="cuda" if bench.cuda else "cpu")
    dtype: Any = "bfloat16" if bench.cuda else None
    model.encode(documents[:few], dtype=dtype)
    rate = len(documents) / bench.seconds(lambda: model.encode(documents, dtype=dtype))
    result = {"texts": len(documents), "texts_a_second": round(rate, 1), "peak_GiB": bench.peak_gib()}
    if bench.cuda:
        share = _busy(lambda: model.encode(documents[: 2 * few], dtype=dtype))
        result["share_of_time_the_card_computes"] = share
    bench.record(name, result)
    bench.main_work(name, lambda: model.encode(documents[:few], dtype=dtype))
    return result


def _peer_encoded(bench: Bench, path: str, documents: list[str]) -> dict[str, Any] | str:
    if not installed("sentence_transformers"):
        return "sentence-transformers is not installed"
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(path, device="cuda" if bench.cuda else "cpu")
    peer.max_seq_length = bench.longest
    if bench.cuda:
        peer.bfloat16()
    best: dict[str, Any] = {"texts": len(documents), "texts_a_second": 0.0}
    for size in (32, 256):  # its default, and one that fills a card better
        peer.encode(documents[:64], batch_size=size)
        rate = round(len(documents) / bench.seconds(lambda size=size: peer.encode(documents, batch_size=size)), 1)
        best[f"texts_a_second_in_batches_of_{size}"] = rate
        best["texts_a_second"] = max(best["texts_a_second"], rate)
    return best


def _busy(act: Callable[[], Any]) -> float:
    """The share of the time of `act` in which the card runs a kernel or a copy, by the profiler's times of kernels."""
    activity = torch.profiler.ProfilerActivity.CUDA
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity]) as profiler:
        start = time.perf_counter()
        act()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    events = [event for event in profiler.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached = 0.0, float("-inf")
    for start_us, end_us in spans:  # of overlapping spans the union
        busy += max(end_us - max(start_us, reached), 0)
        reached = max(reached, end_us)
    return round(busy / 1e6 / elapsed, 3)


def search(bench: Bench) -> None:
    """The best 100 of 1,000,000 vectors for 10,000 queries, beside torch's own product and topk."""
    device = "cuda" if bench.cuda else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((bench.of(10_000, 40), 384), (bench.of(1_000_000, 900), 384))
    query, document = (F.normalize(torch.randn(*s, device=device, generator=generator), dim=-1) for s in shapes)
    k, found = bench.of(100, 10), {}

    def own() -> None:
        found["own"] = exact_top_k(query, document, k)[1]

    def plain() -> None:
        parts = [(part @ document.T).topk(k) for part in query.split(512)]
        found["torch"] = torch.cat([part.indices for part in parts]).cpu().numpy()

    def from_host() -> None:
        exact_top_k(query, host, k)

    host = document.cpu().numpy()
    times: dict[str, list[float]] = {"own": [], "torch": [], "from_host": []}
    for number in range(bench.of(6, 3)):
        for name, act in (("own", own), ("torch", plain), ("from_host", from_host)):
            seconds = bench.seconds(act)
            times[name] += [seconds] if number else []
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    bench.record("medians", medians)
    bench.record("own_over_torch", round(medians["own"] / medians["torch"], 3))
    bench.record("same_documents", round(float((found["own"] == found["torch"]).mean()), 6))
    bench.main_work("search", own)


GRADIENT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bidirectional (BERT)": ("bert", {"pooling": "mean"}),
    "bidirectional, positions from 2 (XLM-R)": ("xlmr", {"pooling": "cls"}),
    "causal, grouped queries (Qwen3)": ("qwen3", {"pooling": "last"}),
    "bidirectional decoder (Qwen3)": ("qwen3", {"pooling": "mean", "attention": "bidirectional"}),
    "causal with windows (Gemma3)": ("gemma", {"pooling": "last"}),
}


def gradients(bench: Bench) -> None:
    """The gradient of a packed chunk against the padded one, in every attention mode, as a cosine and as the largest
    difference over the largest entry; then through every kernel that is here, the one that is compiled last."""
    for label in GRADIENT_CASES:
        for dtype in ("float32", "bfloat16"):
            _compared(bench, label, dtype, None)
    for kernel in ROW_KERNELS:
        for label in ("bidirectional (BERT)", "causal with windows (Gemma3)"):
            _compared(bench, label, "bfloat16", kernel)


def _compared(bench: Bench, label: str, dtype: str, kernel: str | None) -> None:
    """The one figure, by the kernel that the model chose, or by one of them; nothing where that is not here."""
    (name, options), documents = GRADIENT_CASES[label], texts(8, seed=9)
    path, key = save_model(bench.folder, name, 64, tiny=True), f"{label}, {dtype}" + (f", {kernel}" if kernel else "")
    try:
        padded, packed = (load(path, max_length=64, packing=packing, **options) for packing in (False, True))
        if kernel is not None:
            if (lacking := ROW_KERNELS[kernel].lacks(packed.backbone)) is not None:
                bench.record(key, f"not here: {lacking}")
                return
            packed.packs = replace(packed.packs, kernel=kernel)
        wanted, found = (_gradient(model, documents, dtype) for model in (padded, packed))
    except (EmbedsmithError, RuntimeError) as error:
        bench.record(key, {"error": str(error).splitlines()[0]})
        return
    cosine = float(F.cosine_similarity(wanted, found, dim=0))
    difference = float((wanted - found).abs().max() / wanted.abs().max())
    through = packed.packs.kernel or str(packed.packs)
    bench.record(key, {"cosine": cosine, "largest_difference": difference, "kernel": through})


def _gradient(model: Any, documents: list[str], dtype: str) -> Tensor:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.backbone.config.attention_dropout = model.backbone.config.attention_probs_dropout_prob = 0.0
    padded = model.tokenize(documents).pad(model.pad_id, model.device, model.padding_left)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        vector_ND = model(padded)["dense"].vector_ND
    target_ND = torch.randn(vector_ND.shape, generator=torch.Generator().manual_seed(0)).to(vector_ND)
    (vector_ND * target_ND).sum().backward()
    grads = (p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)
    return torch.cat([gradient.flatten().double() for gradient in grads])


PARTS: dict[str, Callable[[Bench], None]] = {
    "gradients": gradients,
    "search": search,
    "minilm": minilm,
    "bert": bert,
    "decoder": decoder,
    "m3": m3,
    "caching": caching,
    "encode": encode,
}


def costs(events: Iterable[Any], cuda: bool) -> Iterator[tuple[str, float, int, str]]:
    """Kind of kernel, milliseconds, launches and the costliest name, largest kind first."""
    kinds: dict[str, list[tuple[float, int, str]]] = {}
    for event in events:
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue  # what an operation launched is counted as the kernel
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0:
            kinds.setdefault(kind_of(event.key), []).append((spent / 1e3, event.count, event.key))
    for kind, rows in sorted(kinds.items(), key=lambda item: -sum(row[0] for row in item[1])):
        yield kind, sum(row[0] for row in rows), sum(row[1] for row in rows), max(rows)[2]


_KINDS = {
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "addmm", "::mm", "bmm", "matmul", "linear"),
    "attention": ("flash", "fmha", "attention", "softmax"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "copies and casts": ("memcpy", "copy", "_to_copy", "cast"),
    "norms": ("norm",),
    "sort and choose": ("sort", "topk", "radix", "gather", "index", "scatter"),
    "sums and maxima": ("reduce", "sum", "max"),
    "fill": ("memset", "fill", "zero"),
    "element by element": ("elementwise", "mul", "add", "gelu", "silu", "where", "sigmoid"),
}


def kind_of(kernel: str) -> str:
    """By the first kind one of whose marks stands in its name."""
    name = kernel.lower()
    return next((kind for kind, marks in _KINDS.items() if any(mark in name for mark in marks)), "other")


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none: a CPU"


def profiled(name: str, act: Callable[[], Any]) -> Any:
    """One run of `act` under torch's profiler; prints its costs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        made = act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    print(f"{name}: milliseconds, calls, kind, the costliest of it")
    for kind, spent, count, costliest in costs(profiler.key_averages(), torch.cuda.is_available()):
        print(f"{spent:10.2f} {count:8d}  {kind:20} {costliest[:80]}", flush=True)
    return made
