"""One rank of test_hugging_face.py's tensor-parallel model, started by torchrun with the folders to load."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import slicegpt  # noqa: F401  registers the architecture


def check(folder: str) -> None:
    """Load by the plan, look at what this rank holds, and compare the logits with those of the whole model."""
    ids, expected, gradients = torch.load(f"{folder}/expected.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    config, layer = model.config, model.model.layers[0]

    def held(parameter: torch.Tensor) -> tuple[int, ...]:
        return tuple(parameter.to_local().shape if hasattr(parameter, "to_local") else parameter.shape)

    heads, widths = config.num_attention_heads * config.head_dim, config.boundary_widths
    assert held(layer.self_attn.q_proj.weight) == (heads // 2, widths[0])
    assert held(layer.self_attn.o_proj.weight) == (widths[1], heads // 2)
    assert held(layer.mlp.down_proj.weight)[1] == config.intermediate_size // 2
    shortcut = layer.shortcut if config.parallel_blocks else layer.attention_shortcut
    for parameter in shortcut.parameters():  # replicated: every rank carries the whole stream
        assert held(parameter) in [(config.shortcut_rank(0), widths[0]), (widths[1], widths[0])]
    model(ids, labels=ids).loss.backward()
    # What every rank holds whole must learn from all heads: shortcuts, and norms within the heads.
    for name, parameter in model.named_parameters():
        if name in gradients:
            gradient = (
                parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            )
            error = ((gradient - gradients[name]).norm() / gradients[name].norm()).item()
            assert error < 1e-4, f"{folder}: {name}: relative error {error} of the gradient"
    with torch.no_grad():
        logits = model(ids).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    # Sums over halves in another order: float32 rounding (6e-8) through three layers.
    error = ((logits - expected).norm() / expected.norm()).item()
    assert error < 1e-5, f"{folder}: relative error {error}"
    if dist.get_rank() == 0:
        print(f"{folder}: equal", flush=True)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        check(each)
    dist.destroy_process_group()
