"""mergekit's YAML as a recipe of a merge: the same models, weights, gradients and filters give the same numbers.

What it says and a merge here cannot do is an error that names its key. What mergekit has by default is written out, so
the saved recipe shows it: trimming by tensor, sums that are not divided, SLERP of raw weights.

One thing differs on purpose: of several slices, what lies behind the layers (a decoder's last norm) has the first
slice's values, where mergekit takes the last slice's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.inputs import kind_of
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.core.settings import Word, did_you_mean, section
from embedsmith.merge import MergeRecipe
from embedsmith.merge.varying import Varying, Where, varies
from embedsmith.models.backbone import locate
from embedsmith.models.folder import FolderFacts, read_folder_json

Parameters = Mapping[str, Any]
Range = tuple[int, int]


@section
@dataclass(frozen=True, kw_only=True)
class MergekitModel:
    """One model of a merge, or of a slice.

    `model`: a folder or hub id, as `base+adapter` with a LoRA adapter, as `id@revision` with a revision.
    `layer_range`: the first layer and the one after the last, in a slice. `parameters`: its own.
    """

    model: Any
    layer_range: Range | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@section
@dataclass(frozen=True, kw_only=True)
class MergekitSlice:
    """Some layers of the result.

    `sources`: where they come from. `parameters`: of all sources. `base_model`: of this slice.
    """

    sources: tuple[MergekitModel, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    base_model: Any = None


@section
@dataclass(frozen=True, kw_only=True)
class MergekitConfig:
    """The keys of such a file.

    `merge_method`: mergekit's name of it. `models`: what is merged as a whole, or `slices`: layer by layer.
    `base_model`: the ancestor; of slerp the first model. `parameters`: of all models. `dtype`, `out_dtype`: numbers on
    disk. `tokenizer_source`: whose tokenizer the result has; `tokenizer`: the same with more to it. `chat_template`:
    refused, an embedder has none. `modules`: refused, an embedder is one.
    """

    merge_method: Word
    models: tuple[MergekitModel, ...] = ()
    slices: tuple[MergekitSlice, ...] = ()
    base_model: Any = None
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: dict[str, Any] | None = None
    chat_template: str | None = None
    modules: Any = None


_KEYS = {f.name for f in fields(MergekitConfig)}
_BOTH = {"dtype"}
"""Keys of both forms, with one meaning."""


def read_merge(path: str | Path, overrides: Sequence[str] = ()) -> MergeRecipe:
    """The recipe of a merge from YAML or JSON, ours or mergekit's; overrides name keys of either.

    Errors: `RecipeError` naming the file and the key.
    """
    return parse(MergeRecipe, merge_tree(read_tree(path), path, overrides), where=str(path))


def merge_tree(tree: dict[str, Any], where: object, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain tree of the same. A tree of ours is changed by the overrides alone."""
    if is_mergekit(tree):
        theirs = [one for one in overrides if _key(one) in _KEYS - _BOTH]
        overrides = [one for one in overrides if one not in theirs]
        for override in theirs:
            apply_override(tree, override)
        tree = mergekit_tree(tree, where)
        if "output" not in tree and not any(_key(one) == "output" for one in overrides):
            fix = f"embedsmith merge {where} output=runs/merged"
            raise RecipeError("output: mergekit's form has no place for it", where=where, fix=fix)
    for override in overrides:
        apply_override(tree, override)
    return tree


def is_mergekit(tree: Mapping[str, Any]) -> bool:
    """Whether a tree is of mergekit's form: it has some of its keys and no parents."""
    return "parents" not in tree and ("merge_method" in tree or bool({"models", "slices"} & tree.keys()))


def _key(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


def mergekit_tree(tree: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The tree of our recipe for a tree of mergekit's; keys of ours beside them stay. Errors: `RecipeError`."""
    ours = {f.name for f in fields(MergeRecipe)} - _KEYS
    config = parse(MergekitConfig, {key: value for key, value in tree.items() if key not in ours}, where=str(where))
    return _Reading(config, str(where)).tree() | {key: value for key, value in tree.items() if key in ours}


@dataclass(frozen=True)
class _Reading:
    """A file that is being read: what its parameters say, and what the result is made of."""

    config: MergekitConfig
    where: str

    def tree(self) -> dict[str, Any]:
        config = self.config
        if config.modules is not None or bool(config.models) == bool(config.slices):
            what = "modules" if config.modules is not None else "models and slices" if config.models else "no models"
            raise self.error(
                f"{what}: one encoder is merged, once", fix="list the models under models, and nothing else"
            )
        if config.chat_template is not None:
            raise self.error("chat_template: an embedder has none", fix="take chat_template away")
        if config.merge_method not in METHODS:
            raise self.error(
                f"merge_method: {config.merge_method} is not here{did_you_mean(config.merge_method, METHODS)}",
                expected=f"one of {', '.join(METHODS)}",
                fix=_INSTEAD.get(config.merge_method),
            )
        known, make = METHODS[config.merge_method]
        self.check_parameters(known)
        made = make(self)
        numbers = config.out_dtype or config.dtype
        made |= {} if numbers is None else {"dtype": numbers}
        return {**made, "granularity": "tensor", "packaging": self.packaging(made)}

    def error(self, what: str, fix: str | None = None, expected: str | None = None) -> RecipeError:
        return RecipeError(what, where=self.where, expected=expected, fix=fix)

    def check_parameters(self, known: Sequence[str]) -> None:
        """Errors: `RecipeError` for a parameter that the method does not have."""
        for place, parameters in self.sections():
            for name in parameters.keys() - set(known) - _WITHOUT_EFFECT:
                what = f"{place}.{name}: {self.config.merge_method} has no such parameter{did_you_mean(name, known)}"
                raise self.error(what, expected=f"one of {', '.join(known)}", fix="correct it, or take it away")

    def sections(self) -> list[tuple[str, Parameters]]:
        """Every place of parameters, by its path."""
        found: list[tuple[str, Parameters]] = [("parameters", self.config.parameters)]
        found += [(f"models.{place}.parameters", one.parameters) for place, one in enumerate(self.config.models)]
        for place, part in enumerate(self.config.slices):
            found.append((f"slices.{place}.parameters", part.parameters))
            sources = enumerate(part.sources)
            found += [(f"slices.{place}.sources.{own}.parameters", one.parameters) for own, one in sources]
        return found

    @cached_property
    def base(self) -> dict[str, Any] | None:
        return None if self.config.base_model is None else self.model(self.config.base_model, "base_model")

    @cached_property
    def models(self) -> list[dict[str, Any]]:
        """Every model that is merged, in the order of the file. Errors: `RecipeError` for slices that are not all
        layers of the same models, one after the other."""
        if self.config.models:
            for place, one in enumerate(self.config.models):
                if one.layer_range is not None:
                    raise self.error(
                        f"models.{place}.layer_range belongs to slices", fix="write slices: [{sources: ...}]"
                    )
            return [self.model(one.model, f"models.{place}.model") for place, one in enumerate(self.config.models)]
        first = [self.model(one.model, "slices.0.sources") for one in self.config.slices[0].sources]
        begin = 0
        for place, part in enumerate(self.config.slices):
            key = f"slices.{place}"
            if part.base_model not in (None, self.config.base_model):
                raise self.error(f"{key}.base_model differs from base_model", fix="merge from one base")
            if [self.model(one.model, f"{key}.sources") for one in part.sources] != first:
                raise self.error(f"{key}.sources: another choice of models", fix=_WHOLE)
            ranges = {one.layer_range for one in part.sources}
            own = ranges.pop()
            if ranges or own is None or own[0] != begin or own[1] <= own[0]:
                found = [list(one.layer_range or ()) for one in part.sources]
                raise self.error(f"{key}.sources: layer_range {found}, after {begin} layers", fix=_WHOLE)
            begin = own[1]
        layers = _layers_of(first)
        if layers is not None and begin != layers:
            raise self.error(f"slices: they end at layer {begin}, and the models have {layers}", fix=_WHOLE)
        return first

    def model(self, given: Any, key: str) -> dict[str, Any]:
        """A model as one of our parents: path, revision, adapter. Errors: `RecipeError` for an unknown form."""
        if isinstance(given, Mapping):
            one, adapter = given.get("model"), given.get("lora")
            if unknown := given.keys() - {"model", "lora", "path", "revision"}:
                raise self.error(f"{key}.{sorted(unknown)[0]} is not here", fix="take it away")
            one = given if one is None else one
            parts = [one, *([] if adapter is None else [adapter])]
        elif isinstance(given, str):
            parts = list(given.split("+"))
        else:
            raise self.error(f"{key}: {kind_of(given)}", expected="a folder or hub id")
        if not 1 <= len(parts) <= 2:
            raise self.error(f"{key}: {given!r} has more than one +", expected="a model, or a model and its adapter")
        named = [_path_and_revision(part) for part in parts]
        if not all(isinstance(path, str) and path for path, _ in named) or (len(named) > 1 and named[1][1]):
            raise self.error(f"{key}: {given!r}", expected="a folder or hub id, such as org/model or base+adapter")
        found: dict[str, Any] = {"path": named[0][0]}
        found |= {} if named[0][1] is None else {"revision": named[0][1]}
        return found | ({} if len(named) == 1 else {"adapter": named[1][0]})

    def others(self) -> list[int]:
        """Places of the models that are not the base, which methods on task vectors leave out."""
        if self.base is None:
            fix = f"add base_model: the model that the others were trained from; {self.config.merge_method} needs it"
            raise self.error("base_model is missing", fix=fix)
        return [place for place, model in enumerate(self.models) if model != self.base]

    def setting(self, name: str, place: int | None = None) -> Varying | None:
        """What a parameter is for a model (by its place) or for all; `None` where nothing says so."""
        last = ("parameters", self.config.parameters)
        if self.config.models:
            own = () if place is None else ((f"models.{place}.parameters", self.config.models[place].parameters),)
            return self.nearest(name, *own, last)
        parts: list[tuple[Range, Varying | None]] = []
        for number, part in enumerate(self.config.slices):
            source, key = part.sources[place or 0], f"slices.{number}"
            own = () if place is None else ((f"{key}.sources.{place}.parameters", source.parameters),)
            assert source.layer_range is not None, "`models` looked at every slice"
            found = self.nearest(name, *own, (f"{key}.parameters", part.parameters), last)
            parts.append((source.layer_range, found))
        if len(parts) == 1 or all(value == parts[0][1] and not varies(value or 0) for _, value in parts):
            return parts[0][1]
        entries = [entry for layers, value in parts for entry in _within(value, layers)]
        outside = [  # tensors outside the layers: the first number of each entry
            Where(value=one.value if isinstance(one.value, int | float) else one.value[0], filter=one.filter)
            for one in _within(parts[0][1], None)
        ]
        return (*entries, *outside) if entries else None

    def nearest(self, name: str, *places: tuple[str, Parameters]) -> Varying | None:
        """What the first place says that says something; what the filters of its entries leave, the next one says."""
        found: list[Where] = []
        for key, parameters in places:
            if name not in parameters:
                continue
            value: Varying = parse(Varying, parameters[name], where=f"{self.where}: {key}.{name}")  # type: ignore[arg-type]
            entries = _within(value, None)
            if not found and [entry.filter for entry in entries] == [None]:
                return entries[0].value
            found += entries
            if any(entry.filter in (None, "*") for entry in entries):
                break
        return tuple(found) or None

    def weights(self, places: Sequence[int], **more: Sequence[str]) -> list[dict[str, Any]]:
        """The models at these places as parents, with their weights. Errors: `RecipeError` for one without."""
        found = []
        for place in places:
            weight = self.setting("weight", place)
            if weight is None:
                key = f"models.{place}.parameters.weight"
                raise self.error(
                    f"{key} is missing", fix="write parameters: {weight: 1.0} under every model, or for all"
                )
            found.append(self.models[place] | {"weight": _plain(weight)})
        return found

    def number(self, name: str, usual: float) -> float:
        """A parameter that is one number for everything. Errors: `RecipeError` where it is not."""
        values = [self.setting(name, place) for place in [None, *range(len(self.models))]]
        numbers = {usual if value is None else value for value in values[1:]}
        if len(numbers) != 1 or varies(value := next(iter(numbers))):
            fix = "give it one number, under parameters of the whole file"
            raise self.error(f"{name} differs between models or tensors, and is one number here", fix=fix)
        assert isinstance(value, int | float)
        return float(value)

    def flag(self, name: str, usual: bool) -> bool:
        found = self.config.parameters.get(name, usual)
        if not isinstance(found, bool):
            raise self.error(f"parameters.{name} is {found!r}", expected="true or false")
        return found

    def refuse(self, name: str, usual: Any, fix: str) -> None:
        """Errors: `RecipeError` for a parameter that is not as usual, which cannot be honoured."""
        for place, parameters in self.sections():
            if parameters.get(name, usual) != usual:
                raise self.error(f"{place}.{name}: {parameters[name]} is not here", fix=fix)

    def packaging(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Whose tokenizer the result has. Errors: `RecipeError` for what cannot be honoured."""
        source = self.config.tokenizer_source
        if self.config.tokenizer is not None:
            if source is not None:
                raise self.error("tokenizer_source and tokenizer are both given", fix="take one of them away")
            if other := sorted(self.config.tokenizer.keys() - {"source"}):
                raise self.error(f"tokenizer.{other[0]} is not here", fix="leave tokenizer: {source: ...} alone")
            source = self.config.tokenizer.get("source")
        # without a base of ours, the model that mergekit calls so is the first parent
        like = None if "base" in made or self.base is None else self.config.base_model
        if source in (None, "base", "union"):  # a union of equal vocabularies is each of them; others are refused
            return {} if like is None else {"like": _named(made, self.model(like, "base_model"))}
        wanted = self.model(source, "tokenizer_source")
        if "base" in made and wanted == self.base:
            return {"like": "base", "vocabulary": "align"}
        if wanted not in self.models:
            fix = "name one of the models, or base"
            raise self.error(f"tokenizer_source: {source!r} is none of the models", fix=fix)
        return {"like": _named(made, wanted), "vocabulary": "align"}


_WHOLE = "take all layers of all models: one slice with layer_range [0, N], or several that follow one another"
_WITHOUT_EFFECT = {"int8_mask"}
_INSTEAD = {
    "passthrough": "to keep some layers of one model, train or distil with model.layers; layers are not stacked here",
    "nearswap": "use merge_method: slerp, with a small t",
    "arcee_fusion": "use merge_method: ties, with a density",
    "ram": "use merge_method: ties, or sce",
    "ramplus_tl": "use merge_method: ties, or sce",
}


def _path_and_revision(given: Any) -> tuple[Any, str | None]:
    if isinstance(given, Mapping):
        return given.get("path"), given.get("revision")
    if not isinstance(given, str) or given.count("@") != 1:
        return given, None
    path, _, revision = given.partition("@")
    return path, revision


def _layers_of(models: Sequence[Mapping[str, Any]]) -> int | None:
    """How many layers the first model has; `None` where its folder is not here or does not say, which the merge finds
    out."""
    try:
        facts = FolderFacts.read(locate(models[0]["path"], models[0].get("revision")))
        config = read_folder_json(facts.backbone / "config.json")
    except ModelError:
        return None
    return next((config[key] for key in ("num_hidden_layers", "n_layers", "n_layer") if key in config), None)


def _within(value: Varying | None, layers: Range | None) -> list[Where]:
    """A setting as entries, of some layers alone."""
    if value is None:
        return []
    if isinstance(value, int | float):
        return [Where(value=value, layers=layers)]
    if all(isinstance(one, int | float) for one in value):
        return [Where(value=tuple(value), layers=layers)]  # type: ignore[arg-type]  # numbers
    return [Where(value=one.value, filter=_ours(one.filter), layers=layers) for one in value if isinstance(one, Where)]


def _ours(name: str | None) -> str | None:
    """A filter in our names: `backbone.` stands before the encoder's, where theirs have `model.` or `bert.`."""
    head, dot, rest = (name or "").partition(".")
    return f"backbone.{rest}" if dot and head in ("model", "bert", "roberta", "distilbert", "transformer") else name


def _plain(value: Varying) -> Any:
    """A setting as a recipe's tree has it."""
    if isinstance(value, int | float):
        return value
    if all(isinstance(one, int | float) for one in value):
        return list(value)
    entries = [one for one in value if isinstance(one, Where)]
    return [
        {"value": one.value if isinstance(one.value, int | float) else list(one.value)}
        | ({} if one.filter is None else {"filter": _ours(one.filter)})
        | ({} if one.layers is None else {"layers": list(one.layers)})
        for one in entries
    ]


def _named(made: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The id of a parent, which it gets where it has none: the end of its path, or all of it."""
    parent = next(one for one in made["parents"] if model.items() <= one.items())
    paths = [str(one.get("adapter", one["path"])) for one in made["parents"]]
    own = str(parent.get("adapter", parent["path"]))
    short = Path(own).name
    return str(parent.setdefault("id", short if [Path(path).name for path in paths].count(short) == 1 else own))


def _linear(config: _Reading) -> dict[str, Any]:
    if config.base is not None and config.base not in config.models:
        fix = "list it under models with a weight, or take base_model away"
        raise config.error("base_model: linear merges only what is listed under models", fix=fix)
    parents = config.weights(range(len(config.models)))
    plain = [one["weight"] for one in parents if isinstance(one["weight"], int | float)]
    whole = len(plain) == len(parents) and abs(sum(plain) - 1) <= 1e-9
    if not config.flag("normalize", True) and not whole:
        fix = "take normalize away, or use task_arithmetic with a base_model"
        raise config.error("parameters.normalize: false, of raw weights that do not sum to 1", fix=fix)
    return {"parents": parents, "method": {"type": "average"}}


def _slerp(config: _Reading) -> dict[str, Any]:
    base, t = config.base, config.setting("t")
    models = [model for model in config.models if model != base]
    if base is None or len(models) != 1:
        given = f"{len(config.models)} models, base_model {config.config.base_model}"
        raise config.error(f"slerp: {given}", expected="two models, of which base_model is one")
    if t is None:
        raise config.error("parameters.t is missing", fix="write parameters: {t: 0.5}; 0 is the base_model")
    method = {"type": "slerp", "of": "weights", "linear_above": 0.9995, "t": _plain(t)}
    return {"parents": [dict(base), dict(models[0])], "method": method}


def _nuslerp(config: _Reading) -> dict[str, Any]:
    config.refuse("nuslerp_row_wise", False, "take it away: SLERP of single rows turns noise")
    config.refuse("nuslerp_flatten", True, "take it away: a tensor is turned as a whole")
    return _turned(config, {"type": "slerp", "on_antipodal": "linear"}, count=2)


def _multislerp(config: _Reading) -> dict[str, Any]:
    config.refuse("normalize_weights", True, "take it away: weights are divided by their sum")
    return _turned(config, {"type": "normalised_mean"})


def _turned(config: _Reading, method: dict[str, Any], count: int | None = None) -> dict[str, Any]:
    """What turns task vectors where there is a base, else raw weights."""
    places = list(range(len(config.models))) if config.base is None else config.others()
    if count is not None and len(places) != count:
        raise config.error(f"models: {len(places)} beside the base_model", expected=f"{count} of them")
    parents = config.weights(places)
    if config.base is None:
        return {"parents": parents, "method": method | {"of": "weights"}}
    return {"base": config.base, "parents": parents, "method": method}


def _karcher(config: _Reading) -> dict[str, Any]:
    if config.base is not None:
        fix = "take base_model away, and list it under models if it is to be one of them"
        raise config.error("base_model: there it is one more model of the mean", fix=fix)
    return {"parents": [dict(one) for one in config.models], "method": {"type": "karcher", "of": "weights"}}


def _task_arithmetic(config: _Reading) -> dict[str, Any]:
    kind = "average" if config.flag("normalize", False) else "task_arithmetic"
    parents = config.weights(config.others())
    return {"base": config.base, "parents": parents, "method": {"type": kind, "scale": config.number("lambda", 1.0)}}


def _thinned(
    kind: str, normalize: bool, rescale: bool, then: str | None = None
) -> Callable[[_Reading], dict[str, Any]]:
    """A method that sets entries to 0, with mergekit's defaults of it."""

    def make(config: _Reading) -> dict[str, Any]:
        places = config.others()
        divided, l1 = config.flag("normalize", normalize), config.flag("rescale", rescale)
        method: dict[str, Any] = {"type": kind, "scale": config.number("lambda", 1.0)}
        if kind == "breadcrumbs":
            config.refuse("rescale", False, "take it away")
            method["gamma"] = config.number("gamma", 0.01)
        else:
            method["rescale"] = "l1" if l1 else "none"
        method |= {"epsilon": config.number("epsilon", 0.15)} if kind == "della" else {}
        method |= (
            {"normalize": divided} if then is not None else {} if divided else {"normalize": False, "aggregate": "sum"}
        )
        method |= {} if then is None else {"then": then}
        parents = config.weights(places)
        densities = [config.setting("density", place) for place in places]
        plain = [1.0 if density is None else density for density in densities]
        if not varies(plain[0]) and all(density == plain[0] for density in plain):
            method["density"] = plain[0]
        else:
            parents = [one | {"density": _plain(density)} for one, density in zip(parents, plain, strict=True)]
        return {"base": config.base, "parents": parents, "method": method}

    return make


def _sce(config: _Reading) -> dict[str, Any]:
    places = config.others()
    method = {"type": "sce", "density": config.number("select_topk", 1.0)}
    return {"base": config.base, "parents": [dict(config.models[place]) for place in places], "method": method}


def _model_stock(config: _Reading) -> dict[str, Any]:
    config.refuse("filter_wise", False, "take it away: an angle is of a whole tensor")
    parents = [dict(config.models[place]) for place in config.others()]
    return {"base": config.base, "parents": parents, "method": {"type": "model_stock"}}


_SUMS = ("weight", "lambda", "normalize")
_THINNED = (*_SUMS, "density", "rescale")
METHODS: Mapping[str, tuple[Sequence[str], Callable[[_Reading], dict[str, Any]]]] = {
    "linear": (("weight", "normalize"), _linear),
    "slerp": (("t",), _slerp),
    "nuslerp": (("weight", "nuslerp_row_wise", "nuslerp_flatten"), _nuslerp),
    "multislerp": (("weight", "normalize_weights", "eps"), _multislerp),
    "karcher": (("max_iter", "tol"), _karcher),
    "task_arithmetic": (_SUMS, _task_arithmetic),
    "ties": (_THINNED, _thinned("ties", normalize=True, rescale=False)),
    "dare_linear": (_THINNED, _thinned("dare", normalize=False, rescale=True, then="linear")),
    "dare_ties": (_THINNED, _thinned("dare", normalize=False, rescale=True, then="ties")),
    "della_linear": ((*_THINNED, "epsilon"), _thinned("della", normalize=False, rescale=True, then="linear")),
    "della": ((*_THINNED, "epsilon"), _thinned("della", normalize=True, rescale=True, then="ties")),
    "breadcrumbs": ((*_THINNED, "gamma"), _thinned("breadcrumbs", normalize=False, rescale=False, then="linear")),
    "breadcrumbs_ties": ((*_THINNED, "gamma"), _thinned("breadcrumbs", normalize=False, rescale=False, then="ties")),
    "sce": (("select_topk",), _sce),
    "model_stock": (("filter_wise",), _model_stock),
}
"""mergekit's names of methods: the parameters each has, and what it is here."""
