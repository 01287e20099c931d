"""The recipe: which experts are merged, how their channels are grouped and how a group becomes one row.

A recipe is a YAML file; mergekit's names keep mergekit's meaning. Nothing here reads a model. A recipe says only what
its author wrote; `Recipe.resolved()` fills in the preset and the defaults of the merge method.
"""

import difflib
import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from conversion.io.foreign_files import read_yaml
from conversion.io.model_files import check_file_name, same_file

if TYPE_CHECKING:  # slow to load, and most errors of a recipe need none of it
    from conversion.channels.merge_methods import MergeMethod

# What a merge method does with its group, and so which parameters it reads; the values are mergekit's defaults.
METHOD_DEFAULTS: dict[str, dict[str, float | bool]] = {
    "linear": {"normalize": True},
    "task_arithmetic": {"lambda": 1.0, "normalize": False},
    "ties": {"density": 1.0, "lambda": 1.0, "normalize": True},
    "dare_linear": {"density": 1.0, "lambda": 1.0, "normalize": False},
    "dare_ties": {"density": 1.0, "lambda": 1.0, "normalize": False},
    "regmean": {},
}

NO_PRESET: dict[str, Any] = {
    "grouping": {"num_groups": 2, "similarity": "l2"},
    "merge_method": "linear",
    "parameters": {},
}

PRESETS: dict[str, dict[str, Any]] = {
    # The settings of Zhang et al., arXiv 2412.15283.
    "paper-ties": {
        "grouping": {"num_groups": 2, "similarity": "cosine"},
        "merge_method": "ties",
        "parameters": {"density": 0.7, "lambda": 0.5, "normalize": False},
    },
    "paper-dare": {
        "grouping": {"num_groups": 2, "similarity": "cosine"},
        "merge_method": "dare_linear",
        "parameters": {"density": 0.7, "lambda": 0.5, "normalize": False},
    },
    # Rows where they pay off, and merged for what they do on calibration texts; without these, plain means.
    "recommended": {
        "grouping": {"budget": 0.5, "similarity": "l2"},
        "merge_method": "regmean",
        "parameters": {},
    },
}

# One row per channel is half of two experts already.
BUDGET_OF_TWO = 0.75

EXPERT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def nearest(word: str, choices: list[str]) -> str:
    """A hint for a misspelt word: the nearest choice if there is one, else all of them."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(choices)}"


class StrictModel(BaseModel):
    """A mapping of the recipe: a key that does not exist is refused with the nearest one that does."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in data:
            if key not in known and key not in cls.model_fields:
                raise ValueError(f"unknown key {reprlib.repr(key)}: {nearest(str(key), known)}")
        return data


class ExpertSpec(StrictModel):
    """One expert: its name in the merged model, where its checkpoint is and its weight in a merge."""

    name: str
    model: str = Field(min_length=1)
    weight: float = 1.0

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if not EXPERT_NAME.fullmatch(name):
            raise ValueError(f"expert name {name!r} must be letters, digits, '_' or '-' and not begin with a digit")
        check_file_name(name, "expert name")
        return name

    @field_validator("weight")
    @classmethod
    def check_weight(cls, weight: float) -> float:
        if not math.isfinite(weight):
            raise ValueError(f"weight must be a finite number, got {weight}")
        return weight


class RowBounds(StrictModel):
    """How many rows a channel of some modules keeps under a budget."""

    modules: str = Field(min_length=1)  # a glob pattern of module paths, such as "*.mlp.*"
    min_rows: int = Field(default=1, ge=1)
    max_rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def check_order(self) -> "RowBounds":
        if self.max_rows is not None and self.max_rows < self.min_rows:
            raise ValueError(f"max_rows is {self.max_rows}, expected at least min_rows, {self.min_rows}")
        return self


class Grouping(StrictModel):
    """How the experts' rows of a channel are clustered."""

    num_groups: int | None = Field(default=None, ge=1)
    similarity: Literal["cosine", "l2"] | None = None
    budget: float | None = Field(default=None, gt=0, le=1)
    bounds: tuple[RowBounds, ...] | None = None

    @model_validator(mode="after")
    def check_combination(self) -> "Grouping":
        if self.budget is not None and self.num_groups is not None:
            raise ValueError("budget and num_groups exclude each other: both say how many rows are kept")
        if self.budget is not None and self.similarity == "cosine":
            raise ValueError("similarity 'cosine' does not compare channels, as a budget must: use 'l2'")
        if self.bounds is not None and self.num_groups is not None:
            raise ValueError("bounds apply to a budget, not to num_groups")
        return self


class CalibrationSource(StrictModel):
    """Texts to calibrate on, or the file that an earlier calibration of the same experts wrote."""

    data: str | None = Field(default=None, min_length=1)  # JSONL, JSON, Parquet, CSV or a Hub dataset
    file: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def check_one(self) -> "CalibrationSource":
        if (self.data is None) == (self.file is None):
            raise ValueError("give either data (calibration texts) or file (written by channel-merge calibrate)")
        return self


class MergeParameters(StrictModel):
    """Parameters of the merge method, with mergekit's names and meanings."""

    density: float | None = Field(default=None, gt=0, le=1)
    lambda_: float | None = Field(default=None, alias="lambda", allow_inf_nan=False)
    normalize: bool | None = None

    def given(self) -> dict[str, float | bool]:
        """The parameters that were written down, under mergekit's names."""
        return self.model_dump(by_alias=True, exclude_none=True)


class Recipe(StrictModel):
    """The whole recipe. `None` means: not written down, take the preset's or the method's default."""

    base_model: str = Field(min_length=1)
    experts: tuple[ExpertSpec, ...]
    preset: str | None = None
    grouping: Grouping = Grouping()
    calibration: CalibrationSource | None = None
    refine: dict[str, JsonValue] | None = None  # options of channel-merge refine, which checks them
    merge_method: str | None = None
    parameters: MergeParameters = MergeParameters()
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    tokenizer_source: Literal["base", "union"] = "base"
    seed: int = Field(default=0, ge=0, lt=2**63)

    _folder: Path = PrivateAttr(default_factory=Path)

    @property
    def folder(self) -> Path:
        """Relative paths of models are looked up here: the recipe file's folder."""
        return self._folder

    @field_validator("preset")
    @classmethod
    def check_preset(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: {nearest(preset, list(PRESETS))}")
        return preset

    @field_validator("merge_method")
    @classmethod
    def check_merge_method(cls, method: str | None) -> str | None:
        if method is not None and method not in METHOD_DEFAULTS:
            raise ValueError(f"unknown merge_method {method!r}: {nearest(method, list(METHOD_DEFAULTS))}")
        return method

    @model_validator(mode="after")
    def check_experts(self) -> "Recipe":
        names = [expert.name for expert in self.experts]
        if len(names) < 2:
            raise ValueError(f"experts: at least two are needed to merge, got {len(names)}")
        if len(names) > 62:
            raise ValueError(f"experts: at most 62 are possible, got {len(names)}")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"experts: the name {name!r} is given to {names.count(name)} experts, names are unique"
                )
            if (other := same_file(name, names)) not in (None, name):
                raise ValueError(
                    f"experts: {other!r} and {name!r} differ only in case, and their files would be the same on some "
                    "systems: give one another name"
                )
        return self

    @model_validator(mode="after")
    def check_parameters(self) -> "Recipe":
        method = self.merge_method or self._preset()["merge_method"]
        known = METHOD_DEFAULTS[method]
        for key in self.parameters.given():
            if key not in known:
                reads = ", ".join(known) or "none"
                raise ValueError(f"parameters.{key} does not apply to merge_method {method!r}, which reads {reads}")
        if method == "regmean" and self.calibration is None:
            raise ValueError("merge_method 'regmean' needs calibration: {data: ...} or {file: ...}")
        if self.grouping.similarity == "cosine" and self.calibration is not None:
            raise ValueError("grouping.similarity 'cosine' does not apply with a calibration, which compares by loss")
        normalize = self.parameters.normalize if self.parameters.normalize is not None else known.get("normalize")
        # A calibration weighs the experts already when it compares them.
        if (method == "linear" and normalize) or self.calibration is not None:
            what = "with a calibration" if self.calibration is not None else "for a normalized linear merge"
            for expert in self.experts:
                if expert.weight <= 0:
                    raise ValueError(f"expert {expert.name!r}: weight must be above 0 {what}, got {expert.weight}")
        return self

    def _preset(self) -> dict[str, Any]:
        """The preset as far as it applies: a mean stands for a merge that there are no calibration texts for."""
        preset = PRESETS[self.preset] if self.preset else NO_PRESET
        grouping = preset["grouping"]
        if "budget" in grouping and len(self.experts) == 2:
            grouping = {**grouping, "budget": BUDGET_OF_TWO}
        if self.grouping.budget is not None:
            grouping = {"similarity": "l2"}
        elif self.grouping.num_groups is not None:
            grouping = {key: value for key, value in grouping.items() if key != "budget"}
        if self.calibration is not None:
            grouping = {**grouping, "similarity": "l2"}
        calibrated = preset["merge_method"] != "regmean" or self.calibration is not None
        return {**preset, "grouping": grouping, "merge_method": preset["merge_method"] if calibrated else "linear"}

    def resolved(self) -> "Recipe":
        """The same recipe with every value written down: as given, else the preset's, else the method's default."""
        preset = self._preset()
        method = self.merge_method or preset["merge_method"]
        from_preset = preset["parameters"] if method == preset["merge_method"] else {}
        parameters = {**METHOD_DEFAULTS[method], **from_preset, **self.parameters.given()}
        grouping = {**preset["grouping"], **self.grouping.model_dump(exclude_none=True)}
        return self._with(merge_method=method, grouping=Grouping(**grouping), parameters=MergeParameters(**parameters))

    def with_dtype(self, dtype: str) -> "Recipe":
        """The same recipe with the dtype written down."""
        return self._with(dtype=dtype)

    def _with(self, **fields: Any) -> "Recipe":
        recipe = self.model_copy(update=fields)
        recipe._folder = self._folder
        return recipe

    def method(self) -> "MergeMethod":
        """The merge method with its parameters, neutral where it does not read one."""
        from conversion.channels.merge_methods import MergeMethod

        recipe = self.resolved()
        parameters = {"density": 1.0, "lambda": 1.0, "normalize": True} | recipe.parameters.given()
        return MergeMethod(
            name=recipe.merge_method,
            density=parameters["density"],
            lambda_=parameters["lambda"],
            normalize=parameters["normalize"],
        )

    def record(self) -> dict[str, Any]:
        """The recipe as plain values for config.json and the report: nothing that was left open."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def parse_recipe(data: Any, folder: Path | str = ".", source: str = "recipe") -> Recipe:
    """Check a recipe that was read from YAML.

    Args:
        data: the YAML document.
        folder: relative model paths are looked up here.
        source: what the errors call the recipe.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{source}: expected a mapping with base_model and experts, got {type(data).__name__}")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{source}: {'; '.join(map(_describe, error.errors()))}") from None
    recipe._folder = Path(folder)
    return recipe


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe file."""
    path = Path(path)
    try:
        data = read_yaml(path)
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from None
    return parse_recipe(data, path.parent, str(path))


def _describe(error: Mapping[str, Any]) -> str:
    """One pydantic error in one line: place, what is wrong, value."""
    place = "".join(f"{part}." for part in error["loc"])[:-1]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] not in ("value_error", "missing"):
        message = f"{message}, got {reprlib.repr(error['input'])}"
    return f"{place}: {message}" if place else message
