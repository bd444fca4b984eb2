"""The shape of a stock form: which widths its class takes, and how many columns and neurons a size leaves."""

import math
from collections.abc import Callable, Sequence

from slicegpt.conversion.stock import keeps_width
from slicegpt.errors import SliceGPTError
from slicegpt.modeling import SlicedConfig

# No columns are deleted before this fraction of the MLP neurons is (docs/quality.md).
NEURONS_FIRST = 0.5


def check_stock_widths(fields: dict, widths: Sequence[int]) -> None:
    """One clear error for widths that no class of a dense model takes."""
    if fields.get("num_experts"):
        raise SliceGPTError("the stock form has no mixtures of experts; slice without it", "form")
    if fields.get("kv_lora_rank") is not None:
        raise SliceGPTError(
            f"{fields['source_model_type']} has latent attention, and no stock form here", "form"
        )
    reason, heads = keeps_width(fields), fields["num_attention_heads"]
    if len(set(widths)) > 1:
        raise SliceGPTError(f"the stock form has one width, got {min(widths)} to {max(widths)}", "widths")
    if widths[0] == fields["dense_hidden_size"]:
        return
    if reason is not None:
        advice = "" if "LayerNorm" in reason else ", or untie it"
        raise SliceGPTError(
            f"the stock form of this {fields['source_model_type']} model keeps its {fields['dense_hidden_size']}"
            f" columns ({reason}), got {widths[0]}; delete neurons{advice}",
            "widths",
        )
    if widths[0] % heads:
        raise SliceGPTError(
            f"the stock form's width must be a multiple of its {heads} attention heads, got {widths[0]}",
            "widths",
        )


def with_own_head(fields: dict) -> dict:
    """The same model with its head stored apart: it then absorbs the final norm."""
    return fields | {
        "tie_word_embeddings": False,
        "lm_head_bias": fields["lm_head_bias"] or fields["final_norm_bias"],
        "final_norm_bias": False,
    }


def untied(fields: dict) -> dict:
    """Fields of the model with a head of its own in place of a tied one.

    Raises:
        SliceGPTError: it has one, or must keep its width for another reason.
    """
    kind = fields["source_model_type"]
    if not fields["tie_word_embeddings"]:
        raise SliceGPTError(f"the head of this {kind} model is not tied", "untie")
    separate = with_own_head(fields)
    if (reason := keeps_width(separate)) is not None:
        raise SliceGPTError(f"this {kind} model keeps its width all the same: {reason}", "untie")
    return separate


def stock_for_parameters(
    fields: dict,
    target: int,
    widths: Sequence[int],
    at: Callable[[int, int], SlicedConfig],
    count: Callable[[SlicedConfig], int],
    step: int,
) -> SlicedConfig:
    """The widest stock form that fits, and of it the one with the most neurons, `NEURONS_FIRST` deleted at most.

    Args:
        at: of a width and a number of neurons, the config.
        count: what is counted of a config.
        step: neurons come in multiples of it.
    """

    def fits(config: SlicedConfig) -> bool:
        return count(config) <= target

    dense = fields["intermediate_size"]
    few = step if len(widths) == 1 else max(step, math.ceil((1 - NEURONS_FIRST) * dense / step) * step)
    choices = [*range(min(few, dense), dense, step), dense]
    if not fits(smallest := at(widths[0], choices[0])):
        reason = keeps_width(fields)
        why = "" if reason is None else f"the model keeps its width ({reason}); "
        raise SliceGPTError(
            f"{target} elements cannot be reached: {why}at width {widths[0]} with {choices[0]} neurons it stores"
            f" {count(smallest)}",
            "target",
        )
    width = widths[last_that(lambda index: fits(at(widths[index], choices[0])), len(widths))]
    return at(width, choices[last_that(lambda index: fits(at(width, choices[index])), len(choices))])


def last_that(holds: Callable[[int], bool], end: int) -> int:
    """The largest index below `end` for which a condition holds that holds up to some index, 0 included."""
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
