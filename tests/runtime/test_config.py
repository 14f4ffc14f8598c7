"""Configs: every one of the package survives JSON exactly; errors name the setting."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dreamteacher
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.runtime.config import changed_keys, describe, from_json, to_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec


def config_classes() -> dict[str, type]:
    found = {}
    for info in pkgutil.walk_packages(dreamteacher.__path__, "dreamteacher."):
        if info.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(info.name)).items():
            wanted = name.endswith(("Config", "DiffusionSpec", "VaeSpec", "Preset"))
            if wanted and dataclasses.is_dataclass(value) and not inspect.isabstract(value):
                found[name] = value
    return found


CLASSES = config_classes()

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def values_of(hint: Any, checked: bool = False) -> st.SearchStrategy[Any]:
    """Values that a field of this type may have: any at all, or those that pass a config's own checks."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return st.lists(values_of(args[0]), max_size=4).map(tuple)
        return st.tuples(*map(values_of, args))
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=4)
    if dataclasses.is_dataclass(hint):
        return configs(hint)
    if checked and hint in (int, float):
        return st.integers(2, 10**6) if hint is int else st.floats(1e-9, 0.4)
    plain = {
        str: st.text(max_size=12),
        int: st.integers(),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
        Path: st.text(max_size=12).map(Path)
        | st.sampled_from([Path("/a/b c"), Path("../ü"), Path("\udcff.png")]),
    }
    return plain[hint]


COUNTS = st.lists(st.integers(2, 10**6), unique=True, max_size=4).map(tuple)
SOME = st.lists(st.integers(2, 10**6), unique=True, min_size=1, max_size=4).map(tuple)
SIDES = st.tuples(*[st.integers(1, 99).map(lambda side: 32 * side)] * 2)
# Fields of which a config checks more than that they are positive.
CHECKED = {
    ("SemanticConfig", "mask_counts"): COUNTS,
    ("ReadoutConfig", "mask_counts"): COUNTS,
    ("ReadoutConfig", "stride"): st.sampled_from((4, 8, 16, 32)),
    ("CropConfig", "size"): SIDES,
    ("EvaluateConfig", "size"): SIDES,
    **dict.fromkeys([("EvaluateConfig", name) for name in ("labels", "mask_counts", "seeds")], SOME),
    ("EvaluateConfig", "tasks"): st.lists(st.sampled_from(("knn", "linear")), max_size=4).map(tuple),
    ("CropConfig", "scale"): st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 9.0)),
    ("PanopticConfig", "width"): st.integers(1, 99).map(lambda n: 8 * n),
}


def configs(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    checked = hasattr(cls, "__post_init__")
    parts = {
        f.name: CHECKED.get((cls.__name__, f.name), values_of(hints[f.name], checked))
        for f in dataclasses.fields(cls)
    }
    return st.builds(cls, **parts)


def test_every_config_of_the_package_was_found() -> None:
    verbs = {
        "Pretrain",
        "TrainTeacher",
        "Evaluate",
        "Demo",
        "Export",
        "Report",
        "List",
        "Doctor",
        "Inspect",
        "GetTeacher",
    }
    assert {f"{name}Config" for name in verbs | {"Finetune", "Segment"}} <= set(CLASSES)
    assert {"DiffusionSpec", "StableDiffusionSpec", "VaeSpec", "DiffusionPreset", "StyleGan2Preset"} <= set(
        CLASSES
    )


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_configs_are_frozen_and_keyword_only(name: str) -> None:
    parameters = CLASSES[name].__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert all(f.kw_only for f in dataclasses.fields(CLASSES[name]))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_round_trip_is_exact(name: str) -> None:
    @settings(max_examples=15)
    @given(configs(CLASSES[name]))
    def check(config: Any) -> None:
        text = json.dumps(to_json(config))
        again = from_json(CLASSES[name], json.loads(text))
        assert again == config
        assert repr(again) == repr(config)  # kinds too: no list for a tuple, no 1 for 1.0, no str for a Path
        assert json.dumps(to_json(again)) == text

    check()


def test_what_is_left_out_takes_its_default() -> None:
    assert from_json(PretrainConfig, {"out": "x", "lr": 1}) == PretrainConfig(out=Path("x"), lr=1.0)
    assert type(from_json(PretrainConfig, {"out": "x", "lr": 1}).lr) is float


def test_lists_of_paths_become_lists_of_paths() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Listed:
        folders: list[Path]

    Listed.__annotations__["folders"] = list[Path]  # a local class: its hints are strings otherwise
    assert from_json(Listed, {"folders": ["a", "b"]}) == Listed(folders=[Path("a"), Path("b")])


@pytest.mark.parametrize(
    ("cls", "values", "said"),
    [
        (PretrainConfig, {"out": "x", "studnet": "y"}, ["'studnet'", "Did you mean 'student'?"]),
        (PretrainConfig, {"out": "x", "qqqqq": 1}, ["PretrainConfig has no setting 'qqqqq'"]),
        (EvaluateConfig, {"finetune": {"stepz": 3}}, ["FinetuneConfig", "'stepz'", "Did you mean 'steps'?"]),
        (PretrainConfig, {"student": "resnet18"}, ["PretrainConfig lacks the setting 'out'"]),
        (DiffusionSpec, {"patch": 2}, ["DiffusionSpec lacks the setting 'unet'"]),
        (DiffusionSpec, [1, 2], ["DiffusionSpec must be a table"]),
        (EvaluateConfig, {"segment": 3}, ["SegmentConfig must be a table"]),
        (PretrainConfig, {"out": "x", "size": 64}, ["'size' cannot be '64'"]),
        (PretrainConfig, {"out": "x", "size": [64]}, ["'size' cannot be '[64]'"]),
        (PretrainConfig, {"out": "x", "lr": "fast"}, ["'lr' cannot be 'fast'"]),
        (PretrainConfig, {"out": 5}, ["'out' cannot be '5'"]),
    ],
)
def test_errors_name_the_setting(cls: type, values: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        from_json(cls, values)
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    for words in said:
        assert words in text


def test_changed_keys_are_listed_with_both_values() -> None:
    old = {"lr": 0.1, "same": [1, 2], "gone": 3, "finetune": {"steps": 5, "flip": True}}
    new = {"lr": 0.2, "same": [1, 2], "new": "x", "finetune": {"steps": 6, "flip": True}}
    assert changed_keys(old, new) == [
        "finetune.steps: 5 -> 6",
        "gone: 3 -> None",
        "lr: 0.1 -> 0.2",
        "new: None -> x",
    ]


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2)), st.sets(st.sampled_from("abcdef")))
def test_changed_keys_are_all_and_only_those_that_differ(old: dict[str, int], touched: set[str]) -> None:
    new = {k: v + 1 if k in touched else v for k, v in old.items()}
    assert [c.split(":")[0] for c in changed_keys(old, new)] == sorted(touched & set(old))
    nested = changed_keys({"in": old}, {"in": new})
    assert nested == [f"in.{c}" for c in changed_keys(old, new)]


def test_describe_says_everything_in_few_lines() -> None:
    config = PretrainConfig(out=Path("runs/x"), size=(64, 96), lr=4e-3)
    text = describe("title", to_json(config))
    first, *rest = text.splitlines()
    assert first == "title"
    assert len(rest) < 25
    assert all(len(line) <= 96 + 2 for line in rest)
    for words in ("out runs/x", "size 64,96", "lr 0.004", "t -", "images -", "flip True"):
        assert words in text
