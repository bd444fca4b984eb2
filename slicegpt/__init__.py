"""SliceGPT: compress language models by deleting rows and columns (Ashkboos et al., ICLR 2024).

`import slicegpt` registers the sliced architecture with transformers, so that
`AutoModelForCausalLM.from_pretrained(folder)` loads what `slicegpt slice` wrote. It imports neither torch nor
transformers; the names below do, when they are first used.
"""

from typing import TYPE_CHECKING

from slicegpt.errors import SliceGPTError
from slicegpt.lazy import lazy_exports
from slicegpt.registration import watch

if TYPE_CHECKING:
    from slicegpt.api import evaluate, load, slice
    from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
    from slicegpt.recipe import Recipe
    from slicegpt.runtime import Runtime

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "Runtime",
    "SliceGPTError",
    "SlicedConfig",
    "SlicedForCausalLM",
    "__version__",
    "evaluate",
    "load",
    "slice",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Recipe": "slicegpt.recipe",
        "Runtime": "slicegpt.runtime",
        "SlicedConfig": "slicegpt.modeling",
        "SlicedForCausalLM": "slicegpt.modeling",
        "evaluate": "slicegpt.api",
        "load": "slicegpt.api",
        "modeling": "slicegpt.modeling",
        "slice": "slicegpt.api",
    },
)

watch()
