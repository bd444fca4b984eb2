"""Recipes: what a choice may be, files that hold them, and the choices that follow from others."""

import dataclasses
import importlib.util
import re
import string
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slicegpt.errors import SliceGPTError
from slicegpt.recipe import ALLOCATIONS, AUTO, DTYPES, NAMES, ORIENTATIONS, SIGNALS, SIZES, Recipe
from slicegpt.step_times import StepTimes

below_one = st.floats(0, 1, exclude_max=True)
above_zero = st.floats(0, 1, exclude_min=True)
whole = st.integers(1, 2**40)
# Whatever a path may hold, quotes, control characters and other scripts among it; no lone surrogates.
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
SIZE_VALUES = {
    "keep": above_zero,
    "slice": below_one,
    "target_bytes": st.floats(1, 1e18, exclude_max=True),
    "target_speedup": st.floats(1, 100, exclude_max=True),
    "widths": st.lists(whole, min_size=1, max_size=5).map(tuple),
}


@st.composite
def recipes(draw) -> Recipe:
    choices = {
        "model": draw(st.none() | text),
        "round_to": draw(whole | st.just(AUTO)),
        "slice_head": draw(st.booleans()),
        "allocate": draw(st.sampled_from(ALLOCATIONS)),
        "signal": draw(st.sampled_from(SIGNALS)),
        "calibration": draw(text),
        "vocabulary_prior": draw(st.floats(0, 1e300)),
        "text_column": draw(st.none() | text),
        "nsamples": draw(whole),
        "seqlen": draw(whole),
        "batch_size": draw(whole),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "varied_seqlen": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "orientation": draw(st.sampled_from(ORIENTATIONS)),
        "refit": draw(st.booleans()),
    }
    choices["shortcut"] = draw(
        st.sampled_from([None, "dense", *(["compact"] if choices["orientation"] == "aligned" else [])])
    )
    if choices["refit"]:
        choices["neurons"] = draw(st.none() | below_one | st.just(AUTO))
        choices["kv_groups"] = draw(st.none() | whole | st.lists(whole, min_size=1))
        choices["group_heads"] = draw(st.none() | whole | st.lists(whole, min_size=1))
        choices["ridge"] = draw(st.just(AUTO) | st.floats(1e-300, 1e300))
        choices["refit_share"] = draw(above_zero)
    size = draw(st.sampled_from([None, *SIZES]))
    if size is not None:
        choices[size] = draw(SIZE_VALUES[size])
    if size == "target_speedup":
        choices["decode_batch"] = draw(st.none() | whole)
        choices["step_times"] = draw(st.none() | st.builds(StepTimes, *[st.floats(1e-12, 1)] * 5).map(str))
    return Recipe(**choices)


@given(recipe=recipes())
@example(recipe=Recipe(model="1e100", calibration="\x7f\x85\r\n'\"", text_column="no"))
@settings(deadline=None, max_examples=50)
def test_files_give_back_what_was_written(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("recipe.toml", "recipe.yaml"):
        recipe.write(folder / name)
        assert Recipe.read(folder / name) == recipe
    assert Recipe.read(folder) == recipe  # the TOML file's name in a sliced folder


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
@given(recipe=recipes())
@settings(deadline=None, max_examples=50)
def test_other_readers_take_the_same_from_them(recipe):
    import tomllib

    assert tomllib.loads(recipe.to_toml()) == recipe.choices()
    assert yaml.safe_load(recipe.to_yaml()) == recipe.choices()  # YAML 1.1


@given(recipe=recipes())
@settings(deadline=None, max_examples=50)
def test_resolving_leaves_nothing_to_defaults(recipe):
    resolved = recipe.resolved()
    assert resolved.shortcut is not None
    assert resolved.neurons is not None
    assert resolved.resolved() == resolved
    given = {name: value for name, value in recipe.choices().items() if name not in ("shortcut", "neurons")}
    assert given.items() <= resolved.choices().items()


@pytest.mark.parametrize(
    ("choices", "shortcut", "neurons"),
    [
        ({"slice": 0.25}, "compact", 0),
        ({"widths": [48]}, "compact", 0),
        ({"keep": 0.9}, "compact", AUTO),
        ({"target_bytes": 1e6}, "compact", AUTO),
        ({"keep": 0.9, "refit": False}, "compact", 0),
        ({"keep": 0.9, "neurons": 0.1}, "compact", 0.1),
        ({"slice": 0.25, "orientation": "pca"}, "dense", 0),
        ({"slice": 0.25, "shortcut": "dense"}, "dense", 0),
    ],
)
def test_what_follows_from_other_choices(choices, shortcut, neurons):
    resolved = Recipe(**choices).resolved()
    assert (resolved.shortcut, resolved.neurons) == (shortcut, neurons)


def test_a_size_takes_the_place_of_another():
    recipe = Recipe(keep=0.9, nsamples=3)
    assert recipe.override(slice=0.25).choices() == Recipe(slice=0.25, nsamples=3).choices()
    assert recipe.override(seed=1).params == 0.9
    assert recipe.size == "keep"
    assert recipe.keep == 0.9  # frozen: the first is as it was
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.keep = 0.8


def test_the_former_name_of_keep(tmp_path):
    """`params` in scripts and in recipes on disk: taken, readable, written under the present name."""
    recipe = Recipe(params=0.9)
    assert recipe == Recipe(keep=0.9) == Recipe().override(params=0.9)
    assert recipe.params == recipe.keep == 0.9
    assert recipe.size == "keep"
    assert "params" not in recipe.choices()
    assert recipe.override(params=0.8).keep == 0.8
    assert Recipe(slice=0.25).override(params=0.8).choices() == Recipe(keep=0.8).choices()
    assert recipe.override(params=None, seed=1).keep is None
    (tmp_path / "old.toml").write_text("params = 0.9\nround_to = 64\n")
    assert Recipe.read(tmp_path / "old.toml") == Recipe(keep=0.9, round_to=64)


def test_both_names_are_one_too_many(tmp_path):
    message = "params: is the former name of keep; only one of them can be given, got params=0.9 and keep=0.8"
    for make in (Recipe, Recipe().override):
        with pytest.raises(SliceGPTError, match=message):
            make(keep=0.8, params=0.9)
    (tmp_path / "both.toml").write_text("params = 0.9\nkeep = 0.8\n")
    with pytest.raises(SliceGPTError, match=f"recipe: .*both.toml: {message}"):
        Recipe.read(tmp_path / "both.toml")


def test_bytes_as_people_write_them():
    assert Recipe(target_bytes="400MB").target_bytes == 400e6
    assert Recipe(target_bytes="1.5 GiB") == Recipe(target_bytes=1.5 * 2**30)
    for wrong in ("400 XB", "many", "0", "nan"):
        with pytest.raises(
            SliceGPTError, match="target_bytes: must be a number of bytes such as 400e6 or 400MB"
        ):
            Recipe(target_bytes=wrong)
    with pytest.raises(SliceGPTError, match=r"target_bytes: must lie in \[1, 1e18\), got 0.5"):
        Recipe(target_bytes="0.5")


def test_plain_values():
    recipe = Recipe(keep=1, widths=None, neurons=0)
    assert (recipe.keep, type(recipe.keep)) == (1.0, float)
    assert recipe.choices().keys() <= set(NAMES)
    assert Recipe(widths=[40, 48]).choices()["widths"] == [40, 48]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"keep": 1.5}, "keep: must lie in (0, 1], got 1.5"),
        ({"keep": 0}, "keep: must lie in (0, 1], got 0.0"),
        ({"keep": "0.9"}, "keep: must be a number, got '0.9'"),
        ({"keep": True}, "keep: must be a number, got True"),
        ({"slice": 1}, "slice: must lie in [0, 1), got 1.0"),
        ({"slice": float("nan")}, "slice: must lie in [0, 1), got nan"),
        ({"target_bytes": 0.5}, "target_bytes: must lie in [1, 1e18), got 0.5"),
        ({"widths": [4, 4.5]}, "widths: must be a list of whole numbers, got [4, 4.5]"),
        ({"widths": "444"}, "widths: must be a list of whole numbers, got '444'"),
        ({"widths": []}, "widths: must hold one at least, got ()"),
        ({"keep": 0.9, "slice": 0.1}, "size: only one size can be asked for, got keep and slice"),
        ({"round_to": 0}, "round_to: must be at least 1, got 0"),
        ({"round_to": 8.0}, "round_to: must be a whole number or auto, got 8.0"),
        ({"shortcut": "short"}, "shortcut: must be one of compact, dense, got 'short'"),
        ({"orientation": None}, "orientation: must be one of aligned, random, pca, got None"),
        ({"neurons": 1}, "neurons: must lie in [0, 1) or be auto, got 1.0"),
        ({"neurons": "some"}, "neurons: must be a number or auto, got 'some'"),
        ({"group_heads": [1, 0]}, "group_heads: must be at least 1, got (1, 0)"),
        ({"kv_groups": 0}, "kv_groups: must be at least 0, and above 0 in one layer, got 0"),
        ({"kv_groups": [2, -1]}, "kv_groups: must be at least 0, and above 0 in one layer, got (2, -1)"),
        ({"kv_groups": 1.5}, "kv_groups: must be a whole number or a list of them, got 1.5"),
        ({"kv_groups": True}, "kv_groups: must be a whole number or a list of them, got True"),
        ({"allocate": 1}, "allocate: must be one of prices, objective, uniform, got 1"),
        ({"ridge": 0}, "ridge: must be above 0 or auto, got 0.0"),
        ({"calibration": ""}, "calibration: must name a text, got ''"),
        ({"calibration": ["a"]}, "calibration: must be text, got ['a']"),
        ({"seed": 1 << 63}, f"seed: must lie in [-2^63, 2^63), got {1 << 63}"),
        ({"dtype": "int8"}, "dtype: must be one of auto, float32, float16, bfloat16, float64, got 'int8'"),
        (
            {"orientation": "pca", "shortcut": "compact"},
            "orientation: compact shortcuts need 'aligned' bases, got 'pca'; dense ones take it",
        ),
        (
            {"refit": False, "neurons": 0.1},
            "neurons: which of them to delete is decided by the refit, got 0.1 without it",
        ),
        (
            {"refit": False, "kv_groups": 2},
            "kv_groups: which of them to delete is decided by the refit, got 2 without it",
        ),
        ({"refit": False, "ridge": 0.1}, "ridge: needs the output refit, got 0.1 without it"),
        ({"refit": False, "refit_share": 0.5}, "refit_share: needs the output refit, got 0.5 without it"),
        ({"sed": 3}, "sed: is no choice of a recipe, got 3; did you mean seed?"),
        ({"zzz": 3}, "zzz: is no choice of a recipe, got 3; the choices are model, keep, "),
    ],
)
def test_errors_name_key_value_and_what_was_expected(choices, message, tmp_path):
    with pytest.raises(SliceGPTError) as error:
        Recipe().override(**choices)
    assert str(error.value).startswith(message)
    assert error.value.argument == message.split(":")[0]
    # The same from a file, which is named as well. TOML and YAML have no value for some of these.
    if all(value is None or isinstance(value, int | str | list) for value in choices.values()):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(choices))
        with pytest.raises(SliceGPTError, match=re.escape(f"recipe: {tmp_path / 'r.yaml'}: {message}")):
            Recipe.read(tmp_path / "r.yaml")


def test_no_size():
    with pytest.raises(
        SliceGPTError, match="size: one of keep, slice, target_bytes, target_speedup, widths is needed"
    ):
        Recipe().size  # noqa: B018


def test_numbers_of_yaml(tmp_path):
    (tmp_path / "r.yml").write_text("target_bytes: 1.5e9\nridge: 1e-1\nneurons: auto\nseed: 7\n")
    assert Recipe.read(tmp_path / "r.yml") == Recipe(target_bytes=1.5e9, ridge=0.1, neurons=AUTO, seed=7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.toml", "params = ", "is not TOML"),
        ("r.toml", "params = 0.9\nparams = 0.8", "is not TOML"),
        ("r.toml", "[calibration]\nseed = 1", "calibration: must be text, got {'seed': 1}"),
        ("r.yaml", "params: [", "is not YAML"),
        ("r.yaml", "- params", "must hold names with a value each, got list"),
        ("r.yaml", "3: 4", "must hold names with a value each"),
        ("r.yaml", "when: 2026-01-01", "when: is no choice of a recipe"),
        ("r.json", "{}", "must be a .toml or .yaml file, got"),
        ("r.toml", b"\xff\xfe", "it is not UTF-8 text"),
        ("r.toml", None, "cannot read .*No such file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SliceGPTError, match=message if ".*" in message else re.escape(message)) as error:
        Recipe.read(file)
    assert error.value.argument == "recipe"
    assert len(str(error.value).splitlines()) == 1


def test_unwritable(tmp_path):
    with pytest.raises(SliceGPTError, match=r"recipe: must be a \.toml or \.yaml file"):
        Recipe().write(tmp_path / "recipe.json")
    with pytest.raises(SliceGPTError, match=r"recipe: cannot write .*: No such file"):
        Recipe().write(tmp_path / "no" / "recipe.toml")


def test_every_choice_is_documented():
    documented = re.findall(r"^        (\w+): ", Recipe.__doc__, re.MULTILINE)
    assert [name for name in documented if name in NAMES] == list(NAMES)
    assert all(set(name) <= set(string.ascii_lowercase + "_") for name in NAMES)


def test_nothing_heavy_is_imported(tmp_path):
    """A wrong choice is told before torch is loaded; the package around it is left out, which may import it."""
    package = importlib.util.find_spec("slicegpt").submodule_search_locations[0]
    script = f"""
import sys, types
sys.modules["slicegpt"] = types.ModuleType("slicegpt")
sys.modules["slicegpt"].__path__ = [{package!r}]
from slicegpt.recipe import Recipe
from slicegpt.checkpoint import folders
Recipe.read(sys.argv[1])
print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)))
"""
    file = tmp_path / "recipe.toml"
    Recipe(keep=0.9).write(file)
    command = [sys.executable, "-c", script, str(file)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


TIMES = "step 1e-3 layer 2e-4 mlp 4e-10 attention 5e-10 shortcut 6e-10"


def test_what_belongs_to_a_speedup():
    recipe = Recipe(target_speedup=1.3, decode_batch=4, step_times=TIMES)
    assert StepTimes.parse(recipe.step_times) == StepTimes.parse(TIMES)
    assert recipe.resolved().neurons == AUTO
    assert recipe.override(target_speedup=1.5).step_times == recipe.step_times
    assert recipe.override(decode_batch=4).step_times == recipe.step_times
    assert recipe.override(decode_batch=8).step_times is None
    smaller = recipe.override(keep=0.8)
    assert (smaller.target_speedup, smaller.decode_batch, smaller.step_times) == (None, None, None)
    for choices, message in (
        ({"decode_batch": 2}, "decode_batch: is of target_speedup, got 2 without it"),
        ({"step_times": TIMES, "keep": 0.9}, "step_times: is of target_speedup"),
        (
            {"target_speedup": 1.2, "step_times": "fast"},
            "step_times: must be what a run with target_speedup wrote",
        ),
        ({"target_speedup": 0.5}, r"target_speedup: must lie in \[1, 100\), got 0.5"),
        ({"target_speedup": 1.2, "form": "stock"}, "target_speedup: is of the form 'sliced'"),
        (
            {"target_speedup": 1.2, "quantize": "int8"},
            "target_speedup: is timed with the weights in their dtype",
        ),
    ):
        with pytest.raises(SliceGPTError, match=message):
            Recipe(**choices)
