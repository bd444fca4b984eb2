"""The entry point in the group `vllm.general_plugins`: vLLM calls `register` in every process it starts."""

ARCHITECTURE = "SlicedForCausalLM"
VLLM_CLASS = "slicegpt.serving.vllm_model:SlicedForVLLM"


def register() -> None:
    """Make `model_type: slicegpt` known to vLLM. May be called any number of times."""
    from vllm import ModelRegistry

    import slicegpt  # noqa: F401  registers SlicedConfig and the network with transformers

    # By name: a class would import vLLM's model code, which must not touch CUDA before vLLM forks its workers.
    ModelRegistry.register_model(ARCHITECTURE, VLLM_CLASS)
