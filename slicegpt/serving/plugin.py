"""The entry point in the group `vllm.general_plugins`: vLLM calls `register` in every process it starts."""

ARCHITECTURE = "SlicedForCausalLM"
VLLM_CLASS = "slicegpt.serving.vllm_model:SlicedForVLLM"


def register() -> None:
    """Make `model_type: slicegpt` known to vLLM. May be called any number of times."""
    from vllm import ModelRegistry

    # The network itself, and with it the Auto classes' real entries: vLLM looks into the classes that they name.
    from slicegpt.modeling import SlicedConfig, SlicedForCausalLM  # noqa: F401

    # By name: a class would import vLLM's model code, which must not touch CUDA before vLLM forks its workers.
    ModelRegistry.register_model(ARCHITECTURE, VLLM_CLASS)
