"""As much of Ray as a curation uses, in this process: what is sent is pickled, tasks end in any order, rows of a
shuffle arrive mixed. The real one is in test_ray.py."""

import pickle
import random
from itertools import count
from types import ModuleType, SimpleNamespace

import numpy as np


def _loaded(content):
    return pickle.loads(content)  # noqa: S301 (our own)


def _sent(value):
    return _loaded(pickle.dumps(value))


_far = {}
"""What is handed on as a reference, by its number. As in Ray no number comes twice, as `id` would of what is gone."""
_numbers = count()


def _handle(number):
    return _far[number]


class _Handle:
    def __init__(self):
        self.number = next(_numbers)

    def __reduce__(self):
        _far[self.number] = self
        return _handle, (self.number,)


class _Ref(_Handle):
    def __init__(self, value):
        super().__init__()
        self.held = pickle.dumps(value)

    def hex(self):
        return str(self.number)


class _Actor(_Handle):
    def __init__(self, actor):
        super().__init__()
        for name in (name for name in dir(actor) if callable(getattr(actor, name)) and not name.startswith("_")):
            call = lambda *given, name=name: _Ref(getattr(actor, name)(*_sent(given)))
            setattr(self, name, SimpleNamespace(remote=call))


class Rows:
    """Blocks of columns, each made by one task."""

    def __init__(self, blocks, chance):
        self.blocks, self.chance = blocks, chance

    def map(self, work, fn_constructor_args=(), compute=None, **more):
        if isinstance(work, type):
            actors = [work(*fn_constructor_args) for _ in range(compute.size)]
            work = lambda row: self.chance.choice(actors)(row)
        made = {}
        for place in self.chance.sample(range(len(self.blocks)), len(self.blocks)):
            made[place] = [_sent(work(row)) for row in self.blocks[place]]
        return Rows([made[place] for place in range(len(self.blocks))], self.chance)

    def map_batches(self, work, **more):
        return Rows([work(_columns(block)) for block in self.blocks], self.chance)

    def groupby(self, name):
        whole = {key: np.concatenate([block[key] for block in self.blocks]) for key in self.blocks[0]}
        order = np.array(self.chance.sample(range(len(whole[name])), len(whole[name])), int)
        mixed = {key: _sent(values)[order] for key, values in whole.items()}
        buckets = [mixed[name] == bucket for bucket in np.unique(mixed[name])]
        groups = [{key: values[mine] for key, values in mixed.items()} for mine in buckets]
        return SimpleNamespace(map_groups=lambda work, **more: Rows([work(one) for one in groups], self.chance))

    def iter_rows(self):
        return (row for block in self.blocks for row in block)

    def iter_batches(self, **more):
        return iter(self.blocks)


def _columns(rows):
    columns = {}
    for key in rows[0]:
        column = np.empty(len(rows), object)
        column[:] = [row[key] for row in rows]
        columns[key] = column
    return columns


def fake_ray(seed=0):
    """A module to put in the place of `ray`."""
    ray, chance = ModuleType("ray"), random.Random(seed)

    class RayError(Exception):
        pass

    def remote(cls):
        return SimpleNamespace(options=lambda **more: SimpleNamespace(remote=lambda *given: _Actor(cls(*given))))

    def from_items(rows, override_num_blocks):
        assert len(rows) == override_num_blocks
        return Rows([[row] for row in rows], chance)

    ray.put = _Ref
    ray.get = lambda ref, timeout=None: _loaded(ref.held)
    ray.kill = lambda actor: None
    ray.remote = remote
    ray.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=type("RayTaskError", (RayError,), {}))
    ray.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "here")
    affinity = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    ray.util = SimpleNamespace(scheduling_strategies=affinity)
    strategy = lambda size: SimpleNamespace(size=size)
    ray.data = SimpleNamespace(from_items=from_items, ActorPoolStrategy=strategy, TaskPoolStrategy=strategy)
    return ray
