"""SliceGPT: compress language models by deleting rows and columns (Ashkboos et al., ICLR 2024).

`import slicegpt` registers the sliced architecture with transformers, so that
`AutoModelForCausalLM.from_pretrained(folder)` loads what `slicegpt slice` wrote.
"""

__version__ = "0.1.0"

__all__ = ["SliceGPTError", "SlicedConfig", "SlicedForCausalLM", "__version__"]

from slicegpt.errors import SliceGPTError
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
