"""Representations of texts kept on disk, under a hash of everything they depend on, read memory-mapped.

Nothing here goes stale: a file's name holds a hash of the weights, the settings and prompts, the role, the task and
the texts, so another checkpoint or another text is another file. Old files only take space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from embedsmith.core.encoder import Encoder, Role, fingerprint, main_head, represent
from embedsmith.core.errors import SearchError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.core.reps import Cosine, Dense, Euclidean, Manhattan, MaxSim, MultiVector, Representation, Reps, Sparse

_KINDS: dict[str, type[Representation]] = {
    kind.__name__: kind for kind in (Dense, Sparse, MultiVector, Cosine, Euclidean, Manhattan, MaxSim)
}


@dataclass(frozen=True)
class CachedEncoder:
    """An encoder whose representations are kept, one file a list of texts and head.

    Give it the same pieces of a corpus again (another process, another run, another task) and they are read instead
    of computed; work that was stopped goes on behind the pieces that are there. Tokens are stored without padding. A
    file that is not whole counts as none.
    """

    encoder: Encoder
    folder: Path
    key: str

    @staticmethod
    def of(encoder: Encoder, folder: str | Path) -> CachedEncoder:
        """Errors: `ModelError` for an encoder without a fingerprint."""
        return CachedEncoder(encoder, Path(folder), fingerprint(encoder))

    def represent(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        task: str | None = None,
        outputs: Sequence[str] = ("dense",),
        instruction: Sequence[str | None] | None = None,
    ) -> Reps:
        paths = {name: self.path(texts, role, task, name, instruction) for name in outputs}
        found = {name: rep for name, path in paths.items() if (rep := self.read(path, len(texts))) is not None}
        missing = [name for name in outputs if name not in found]
        if missing:
            made = represent(self.encoder, texts, role=role, task=task, outputs=missing, instruction=instruction)
            for name in missing:
                self.write(paths[name], made[name])
            found |= made
        return {name: found[name] for name in outputs}

    def path(
        self,
        texts: Sequence[str],
        role: Role,
        task: str | None,
        head: str,
        instruction: Sequence[str | None] | None = None,
    ) -> Path:
        """Where the representations of these texts are, or will be."""
        asked = [role, task, head, list(texts), *([] if instruction is None else [list(instruction)])]
        content = json.dumps(asked, ensure_ascii=False)
        name = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.folder / self.key / f"{name}.safetensors"

    def fingerprint(self) -> str:
        return self.key

    @property
    def main_head(self) -> str:
        return main_head(self.encoder)

    @staticmethod
    def write(path: Path, rep: Representation) -> None:
        """Keep one representation.

        Errors: `SearchError` for values that are not finite; `CheckpointError` (full disk).
        """
        if type(rep).__name__ not in _KINDS:
            raise SearchError(f"a {type(rep).__name__} cannot be kept", expected=", ".join(_KINDS))
        if not all(bool(tensor.isfinite().all()) for tensor in rep.floating()):
            raise SearchError(
                "the model gave values that are not finite", fix="check the weights: did its run diverge?"
            )
        used_NT: Tensor | None = None  # the tokens that say something; None for a representation without tokens
        if isinstance(rep, MultiVector):
            used_NT = rep.mask_NT
        elif isinstance(rep, Sparse):
            used_NT = rep.weight_NT != 0
        tensors: dict[str, Tensor] = {} if used_NT is None else {"length_N": used_NT.sum(1)}
        for f in fields(rep):
            value: Tensor = getattr(rep, f.name)
            tensors[f.name] = (value if used_NT is None else value[used_NT]).contiguous()
        with atomic_file(path, "wb") as file:
            file.write(save(tensors, metadata={"kind": type(rep).__name__}))

    @staticmethod
    def read(path: Path, count: int | None = None) -> Representation | None:
        """What is kept there; `None` where there is nothing, a file that is not whole, or not that of `count` texts."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                kind = _KINDS[file.metadata()["kind"]]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            rep = _unpacked(kind, tensors)
            if count not in (None, len(rep)):
                raise ValueError(f"{len(rep)} rows of {count} texts")
            return rep
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            log.warning("%s: cannot be read (%s); the texts are encoded again", path, error)
            return None


def _unpacked(kind: type[Representation], tensors: dict[str, Tensor]) -> Representation:
    length_N = tensors.pop("length_N", None)
    if length_N is None:
        return kind(**tensors)
    place_NT = torch.arange(max(int(length_N.max()), 1) if len(length_N) else 1)[None, :] < length_N[:, None]

    def padded(name: str, pad: float) -> Tensor:
        packed = tensors[name]
        full = torch.full((*place_NT.shape, *packed.shape[1:]), pad, dtype=packed.dtype)
        full[place_NT] = packed
        return full

    return kind(**{f.name: padded(f.name, f.metadata["pad"]) for f in fields(kind)})
