"""Networks of a configuration with random weights, at memory bandwidth: speed depends on shapes, not on values."""

import torch
from torch import nn

from slicegpt.modeling.configuration import SlicedConfig
from slicegpt.modeling.layers import CompactShortcut
from slicegpt.modeling.network import SlicedForCausalLM

# Large tensors are filled with copies of so many random values: drawing a billion takes a CPU half a minute. Odd, so
# that rows whose length is a power of two differ.
_BLOCK = (1 << 20) + 7


class NormalValues:
    """Fills tensors with normally distributed values at memory bandwidth."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.values = torch.randn(_BLOCK, device=device, generator=generator).to(dtype)

    def fill(self, tensor: torch.Tensor, deviation: float) -> None:
        """Overwrite a contiguous tensor with values of this standard deviation."""
        scaled = self.values * deviation
        for piece in tensor.view(-1).split(_BLOCK):
            piece.copy_(scaled[: len(piece)])


@torch.no_grad()
def random_model(
    config: SlicedConfig,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> SlicedForCausalLM:
    """A model of this configuration with random weights, made on `device` at its sliced size: no dense model is made.

    Weights are normal with variance 1 / inputs, so that activations stay in the range of half precision; compact
    factors have orthogonal directions and random angles, as after slicing.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = SlicedForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    normal = NormalValues(dtype, device, seed)
    # A QR factorisation is slow: one set of directions for each shape.
    directions: dict[tuple[int, int], torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, CompactShortcut):
            rank, width = module.factor.shape
            if (width, rank) not in directions:
                start = torch.randn(width, rank, device=device, generator=generator)
                directions[width, rank] = torch.linalg.qr(start)[0] if rank else start
            angles = torch.rand(rank, device=device, generator=generator)
            module.factor.copy_((directions[width, rank] * (1 - angles.cos()).sqrt()).mT)
        elif isinstance(module, nn.Linear):
            normal.fill(module.weight, module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            normal.fill(module.weight, 1)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                parameter.fill_(0 if name == "bias" else 1)
    if model.model.rotary_emb is not None:
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if config.tie_word_embeddings:
        # The head shares the embedding's rows: keep the logits near unit variance.
        model.model.embed_tokens.weight.mul_(config.dense_hidden_size**-0.5)
        model.tie_weights()
    return model.eval()
