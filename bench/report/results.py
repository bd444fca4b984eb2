"""The JSON files that this package writes, as results of one form: a kind, an environment, and figures.

Benchmarks say what they are. The files of other commands (`--json`, `slicing.json`, `frontier.json`) are known by their
keys.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from slicegpt.errors import SliceGPTError

# Of a file that does not say where it was written.
UNKNOWN = {
    "device": None,
    "driver": None,
    "threads": None,
    "load_average": None,
    "versions": {},
    "commit": None,
    "date": None,
    "command": None,
}
TRAINING = {"loss_before", "loss_after", "trained_parameters"}


def _first_form(content: dict) -> dict:
    """Results of slicing as first written, their stages by name, in the form of today's rows."""
    if content["benchmark"] != "slicing" or "stages" not in content:
        return content
    dense = content["dense_seconds"]
    mean = sum(dense) / len(dense)
    stages = (
        {"one dense forward pass": mean} | content["stages"] | {"slicing in all": content["slicing_seconds"]}
    )
    rows = [{"stage": n, "seconds": s, "of_dense_pass": s / mean} for n, s in stages.items()]
    return content | {"rows": rows, "settings": {"model": content["model"]}}


def _record(content: Mapping) -> dict:
    """`slicing.json` without the eigenvalues, which are thousands of numbers."""
    figures = {name: value for name, value in content.items() if name != "eigenvalues"}
    settings = {"model": content["source"], "dtype": content["dtype"]}
    return {"settings": settings, "environment": {"date": content.get("date")}} | figures


def _evaluation(content: Mapping) -> dict:
    models = [model.get("model", "") for model in content["models"]]
    return {"settings": {"model": models, "data": content.get("data")}, "rows": content["models"]}


def _tuned(content: Mapping) -> dict:
    where = {name: content.get(name) for name in ("device", "date", "commit", "versions")}
    return {"environment": where, "rows": content["entries"]}


def _kernels(content: Mapping) -> dict:
    machine, versions = content["machine_info"], {"python": content["machine_info"].get("python_version")}
    device = (machine.get("cpu") or {}).get("brand_raw") or machine.get("machine")
    commit = (content.get("commit_info") or {}).get("id")
    where = {"device": device, "date": content.get("datetime"), "versions": versions, "commit": commit}
    rows = [
        {
            "name": each["name"],
            "median": 1e3 * each["stats"]["median"],
            "min": 1e3 * each["stats"]["min"],
            "rounds": each["stats"]["rounds"],
        }
        for each in content["benchmarks"]
    ]
    return {"environment": where, "rows": rows}


def _demo(content: Mapping) -> dict:
    """The demo's models; its first form timed plain PyTorch."""
    rows = [
        {"engine": "plain PyTorch", **row}
        | ({"tokens_per_second": 1000 / row["ms per token"]} if row.get("ms per token") else {})
        for row in content["models"]
    ]
    return {"rows": rows, "notes": [f"{content['seconds']:.0f} s in all."]}


def _model(content: Mapping) -> dict:
    return {"settings": {"model": content["model"], "dtype": content["dtype"]}, **content}


def _plan(content: Mapping) -> dict:
    return {"settings": {"model": content["model"], "dtype": content["recipe"]["dtype"]}, **content}


# Kind -> keys that only its files have together, and how its figures are taken from them.
FORMS: dict[str, tuple[set[str], Callable[[Mapping], dict]]] = {
    "plan": ({"recipe", "peak_stage", "parts"}, _plan),
    "frontier": ({"settings", "points"}, lambda content: {**content, "environment": {}}),
    "slicing record": ({"boundaries", "calibration", "size", "source"}, _record),
    "model": ({"boundaries", "family", "removed"}, _model),
    "demo": ({"models", "seconds"}, _demo),
    "evaluation": ({"models", "model"}, _evaluation),
    "finetuning": (TRAINING, dict),
    "generation": ({"prompt", "text", "tokens", "runtime"}, dict),
    "conversation": ({"messages", "runtime"}, dict),
    "environment": ({"versions", "kernels", "extras"}, lambda content: {"facts": content}),
    "tuned": ({"entries", "versions", "device"}, _tuned),
    "kernels": ({"benchmarks", "machine_info"}, _kernels),
}


def recognised(content: object) -> dict | None:
    """A file's content as a result, with "benchmark" and "environment"; None where this package did not write it."""
    if not isinstance(content, dict):
        return None
    if {"benchmark", "environment"} <= set(content):
        return _first_form(content) | {"environment": UNKNOWN | content["environment"]}
    for kind, (keys, figures) in FORMS.items():
        if keys <= set(content):
            # An evaluation has one model's seconds at its top as well.
            if kind == "demo" and "model" in content:
                continue
            found = figures(content)
            where = UNKNOWN | {"versions": content.get("versions") or {}} | found.pop("environment", {})
            return {"benchmark": kind, "complete": True, **found, "environment": where}
    return None


def read_results(folder: str | Path, option: str = "DIR") -> list[tuple[Path, dict]]:
    """Every result below a folder; other JSON files are skipped.

    Raises:
        SliceGPTError: the folder is not there, a file is not JSON, or there is no result at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SliceGPTError(f"{option}: expected a folder of results, got {folder}")
    found = []
    for file in sorted(folder.rglob("*.json")):
        try:
            content = recognised(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise SliceGPTError(f"{option}: {file} is not readable JSON: {error}") from error
        if content is not None:
            found.append((file, content))
    if not found:
        raise SliceGPTError(f"{option}: {folder} holds no results (JSON files that slicegpt wrote)")
    return found
