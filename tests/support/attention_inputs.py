"""Inputs of `decode_attention_`, and what it must do with them, in float64 and written out."""

from dataclasses import dataclass

import torch

CAPACITY = 200
# Relative error (Frobenius): float32 rounds sums of some hundred products; 16-bit formats round the query, the new key,
# the weights and the result, 2^-11 (2^-8) each, and scores of some units see the first two.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-13}


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    key_heads: int
    head_dim: int
    rotary: int | None
    norm: bool = False
    rotate_first: bool = False

    @property
    def columns(self) -> int:
        """Of v, k and q."""
        return (2 * self.key_heads + self.heads) * self.head_dim


def arguments(
    shape: Shape, slot: int, dtype, window: int | None = None, device="cpu", size: float = 1.0
) -> tuple:
    """Rows with 5 columns behind q, in a wider matrix; NaN in the cache where nothing may be read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    rows = (size * normal(shape.batch, shape.columns + 8)).to(dtype).to(device)[:, : shape.columns + 5]
    cache = normal(2, shape.batch, shape.key_heads, CAPACITY, shape.head_dim)
    cache[:, :, :, slot:] = torch.nan
    keys, values = cache.to(dtype).to(device)
    valid = torch.ones(shape.batch, CAPACITY, dtype=torch.bool, device=device)
    valid[0, : min(slot, 70)] = False  # more than a block of padding
    cos = sin = norm = None
    if shape.rotary is not None:
        angles = 3 * normal(shape.batch, 1, shape.rotary // 2)
        cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype).to(device)
        sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype).to(device)
    if shape.norm:
        norm = (1 + 0.3 * normal(shape.key_heads + shape.heads, shape.head_dim)).to(dtype).to(device)
    place = torch.tensor([slot], device=device)
    return rows, keys, values, valid, place, cos, sin, norm, shape.heads, window, 1e-5, shape.rotate_first


def expected(inputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, heads, head_dim], what is attended, and [batch, key heads, head_dim], the new keys; float64."""
    rows, keys, values, valid, place, cos, sin, norm, heads, window, eps, rotate_first = inputs
    rows, keys, values = rows.cpu().double(), keys.cpu().double(), values.cpu().double()
    batch, key_heads, _, size = keys.shape
    slot = int(place)
    new_values = rows[:, : key_heads * size].view(batch, key_heads, size)
    states = rows[:, key_heads * size : (2 * key_heads + heads) * size].view(batch, -1, size)

    def normed(states):
        return states * (states.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.cpu().double()

    if norm is not None and not rotate_first:
        states = normed(states)
    if cos is not None:
        cos, sin, states = cos.cpu().double(), sin.cpu().double(), states.clone()
        half = cos.shape[-1] // 2
        first, second = states[..., :half].clone(), states[..., half : 2 * half].clone()
        states[..., :half] = first * cos[..., :half] + second * sin[..., :half]
        states[..., half : 2 * half] = second * cos[..., half:] + first * sin[..., half:]
    if norm is not None and rotate_first:
        states = normed(states)
    attended = torch.empty(batch, heads, size, dtype=torch.float64)
    for row in range(batch):
        first = 0 if window is None else max(0, slot - window + 1)
        seen = [token for token in range(first, slot) if valid[row, token]]
        for head in range(heads):
            group = head // (heads // key_heads)
            k = torch.cat((keys[row, group, seen], states[row, group][None]))
            v = torch.cat((values[row, group, seen], new_values[row, group][None]))
            weights = torch.softmax(k @ states[row, key_heads + head] / size**0.5, dim=0)
            attended[row, head] = weights @ v
    return attended, states[:, :key_heads]


def assert_attended(outputs: tuple, inputs: tuple) -> None:
    """outputs: the arguments as the operator left them; inputs: as they were."""
    rows, keys, values, *_ = outputs
    before_rows, before_keys, before_values, _, place, *_ = inputs
    batch, key_heads, _, size = keys.shape
    heads, slot, tolerance = inputs[8], int(place), TOLERANCE[rows.dtype]
    attended, new_keys = expected(inputs)
    first, end = 2 * key_heads * size, (2 * key_heads + heads) * size
    actual = rows[:, first:end].reshape(batch, heads, size).cpu().double()
    assert (actual - attended).norm() <= tolerance * attended.norm()
    assert torch.equal(rows[:, :first], before_rows[:, :first])
    assert torch.equal(rows[:, end:], before_rows[:, end:])
    assert (keys[:, :, slot].cpu().double() - new_keys).norm() <= tolerance * new_keys.norm()
    assert torch.equal(values[:, :, slot], before_rows[:, : key_heads * size].view(batch, key_heads, size))
    others = torch.arange(keys.shape[2], device=keys.device) != slot
    for after, before in ((keys, before_keys), (values, before_values)):
        assert torch.equal(after[:, :, others].nan_to_num(), before[:, :, others].nan_to_num())
