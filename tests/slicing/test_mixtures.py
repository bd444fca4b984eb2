"""Mixtures of experts: moments and fits of every expert against explicit sums, and whole runs."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from support.saved_models import save_text
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt import api
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.slicing import Objective, SlicingOptions, slice_model
from slicegpt.slicing.blocks import blocks_of, dense_block, dense_writers
from slicegpt.slicing.mixture_moments import JoinedMixture, mixture_moments
from slicegpt.slicing.mixture_refit import fit_mixture
from slicegpt.slicing.objective import Objective as Loss

WIDTH, RIDGE = 48, 0.1


def shape_of(model, width=WIDTH, **shape):
    fields = canonical_fields(model)
    return plan(fields, constant_widths(fields, width), Shape(**shape))


def outcome(model, width, refit=True, **shape):
    config = shape_of(model, width, **shape)
    options = SlicingOptions(dtype=torch.float64, ridge=RIDGE, refit=refit, neuron_multiple=4)
    return slice_model(model, config, batches(), options)


class Explicit:
    """The last block of a tiny model, its tokens, and the refit's sums written out token by token."""

    def __init__(self, case, seed=0):
        self.model = tiny_model(case)
        self.config = shape_of(self.model)
        block, layer = blocks_of(self.config)[-1], checkpoint_of(self.model).layer(2)
        assert block.sparse
        self.writers = dense_writers(self.config, block, layer, torch.device("cpu"))
        self.lifted = dense_block(self.config, block, layer, self.writers, torch.float64, torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        self.stream, self.wanted = (
            torch.randn(3, 20, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        self.weights = torch.rand(3, 20, generator=generator, dtype=torch.float64)
        self.present = torch.rand(3, 20, generator=generator) < 0.8

    def moments(self):
        moments = mixture_moments(self.lifted, WIDTH, 0, None)
        joined = JoinedMixture(moments, self.lifted)
        for row in range(3):
            carried, activations = self.lifted.activations(self.stream[row : row + 1])
            assert torch.equal(carried, self.stream[row : row + 1])
            part = (self.wanted, self.weights, self.present)
            joined.add_batch(activations, *(tensor[row : row + 1] for tensor in part))
        return joined.finish()

    def tokens(self):
        """Of every token that is no padding: its squared error's weight, its error, and `(expert, weight, input)`."""
        module = self.lifted.mixture
        for place in self.present.nonzero().tolist():
            row = self.lifted.norm(self.stream[tuple(place)])[None]
            factors, experts = module.gate(row)
            members = []
            for factor, expert in zip(factors[0], experts[0].tolist(), strict=True):
                gate, up = (module.experts.gate_up_proj[expert] @ row[0]).chunk(2)
                if (bias := module.experts.gate_up_proj_bias) is not None:
                    gate, up = (
                        part + own for part, own in zip((gate, up), bias[expert].chunk(2), strict=True)
                    )
                own = module.experts.apply_gate(torch.cat((gate, up)))
                members.append((f"experts.{expert}", factor, own))
            if module.shared_expert is not None:
                shared = module.shared_expert
                own = torch.nn.functional.silu(shared.gate_proj(row[0])) * shared.up_proj(row[0])
                factor = module.shared_weight(row)
                members.append(("shared_expert", torch.ones(()) if factor is None else factor[0, 0], own))
            written = sum(factor * self.write(self.writers, name, own) for name, factor, own in members)
            yield self.weights[tuple(place)], self.wanted[tuple(place)] - written, members

    def write(self, writers, name, own):
        bias = writers[name].bias
        return writers[name].weight @ own + (0 if bias is None else bias)

    def error(self, writers) -> float:
        """Σ w ‖r - Σ p a Δ‖² with other output weights, biases as they are."""
        total = 0.0
        for weight, error, members in self.tokens():
            moved = [
                factor * ((writers[name].weight - self.writers[name].weight) @ own)
                for name, factor, own in members
            ]
            total += weight * (error - sum(moved)).square().sum()
        return float(total)


@torch.no_grad()
@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe", "glm4-moe", "gpt-oss"])
def test_fits_are_the_regressions_of_single_experts(case):
    """Sums in float64 over 50 tokens in another order, systems of condition below K / λ = 800: 1e-10."""
    explicit = Explicit(case)
    moments, writers = explicit.moments(), explicit.writers
    rows, surrogate = {name: [] for name in writers}, 0.0
    for weight, error, members in explicit.tokens():
        total = sum(factor for _, factor, _ in members)
        for name, factor, own in members:
            share = (weight * factor * total, own, writers[name].weight @ own + error / total)
            rows[name].append(share)
            surrogate += float(share[0] * (error / total).square().sum())
    # Before the fit the bound is the error itself.
    assert surrogate == pytest.approx(explicit.error(writers), rel=1e-12)

    grams = {
        name: sum((w * torch.outer(a, a) for w, a, _ in own), torch.zeros(())) for name, own in rows.items()
    }
    routed = [name for name in writers if name != "shared_expert"]
    scale = sum(grams[name].diagonal().mean() if rows[name] else 0.0 for name in routed) / len(routed)
    fits = fit_mixture(Objective(), moments, writers, [RIDGE])
    for name, own in rows.items():
        own_scale = scale if name in routed else grams[name].diagonal().mean()
        size, before = writers[name].weight.shape[1], writers[name].weight
        system = grams[name] + RIDGE * own_scale * torch.eye(size, dtype=torch.float64)
        right = RIDGE * own_scale * before.mT
        right = right + sum(w * torch.outer(a, t) for w, a, t in own)
        fitted = fits.writers[RIDGE][name]
        assert relative_error(fitted.weight.mT, torch.linalg.solve(system, right)) < 1e-10
        assert fitted.bias is writers[name].bias
    assert moments.tokens.tolist() == [len(rows[name]) for name in writers]
    # The sum of the experts' fits lowers the error of what they write together, by no less than the bound says.
    after = explicit.error(fits.writers[RIDGE])
    assert after <= fits.remaining[RIDGE] * surrogate * (1 + 1e-12) < surrogate


@torch.no_grad()
def test_an_expert_without_tokens_keeps_its_weights():
    explicit = Explicit("mixtral")
    explicit.present[:] = False
    explicit.present[0, 0] = True
    moments = explicit.moments()
    fits = fit_mixture(Loss(), moments, explicit.writers, [RIDGE], neurons=40)
    assert sum(moments.tokens.tolist()) == 2
    assert moments.starved() == [0, 1, 2, 3]
    for number, count in enumerate(moments.tokens.tolist()):
        before, after = (
            explicit.writers[f"experts.{number}"].weight,
            fits.writers[RIDGE][f"experts.{number}"].weight,
        )
        kept = fits.neurons[f"experts.{number}"]
        assert len(kept) == 40
        if not count:  # nothing but the penalty: the smallest columns go
            assert relative_error(after[:, kept], before[:, kept]) < 1e-12
            assert torch.equal(kept, before.norm(dim=0).topk(40).indices.sort().values)
        gone = torch.ones(before.shape[1], dtype=torch.bool)
        gone[kept] = False
        assert not after[:, gone].any()


@torch.no_grad()
@pytest.mark.parametrize("case", ["qwen3-moe", "gpt-oss"])
def test_nothing_is_to_repair_at_full_width(case):
    """Random bases and dense shortcuts, with the refit: the stream goes through the calibration, and comes back."""
    model = tiny_model(case)
    config = shape_of(model, shortcut="dense", orientation="random")
    options = SlicingOptions(dtype=torch.float64, ridge=RIDGE, orientation="random")
    turned, report = slice_model(model, config, batches(), options)
    assert relative_error(turned(token_ids()).logits, model(token_ids()).logits) < 1e-9
    assert not report.refit


@torch.no_grad()
@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe", "qwen3-moe", "phimoe", "glm4-moe", "gpt-oss"])
def test_slices_with_fewer_columns_and_neurons(case, caplog):
    """Narrower in both; the refit brings the logits of calibration tokens nearer to the dense ones."""
    model = tiny_model(case)
    with caplog.at_level(logging.WARNING, "slicegpt"):
        refitted, report = outcome(model, 40, neurons=0.25)
    plain, _ = outcome(model, 40, refit=False)
    config = refitted.config
    assert config.neurons != config.dense_neurons
    assert all(
        n % 4 == 0 for n, whole in zip(config.neurons, config.dense_neurons, strict=True) if n != whole
    )
    assert refitted.num_parameters() < plain.num_parameters()
    for kind, layer, count in zip(config.mlp_layer_types, refitted.model.layers, config.neurons, strict=True):
        if kind == "sparse":
            assert layer.mlp.experts.gate_up_proj.shape == (config.num_experts, 2 * count, 40)
    ids = batches()[0].input_ids
    errors = [relative_error(network(ids).logits, model(ids).logits) for network in (refitted, plain)]
    assert errors[0] < errors[1]
    # Of attention's blocks; what deleting neurons costs is in the others.
    assert all(entry["remaining"] < 1 for entry in report.refit if entry["block"] % 2 == 0)
    few = [entry for entry in report.refit if "few_tokens" in entry]
    assert bool(few) == ("fewer calibration tokens than neurons" in caplog.text)


def test_from_files_as_in_memory(tmp_path, tiny_tokenizer, documents):
    """Read expert by expert, and written as the tensors are final; what comes out loads, and says what it holds."""
    model = tiny_model("qwen2-moe", torch.float32, vocab_size=512)
    model.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    assert any(
        ".experts.3.up_proj." in name
        for file in (tmp_path / "dense").glob("*.safetensors")
        for name in load_file(file)
    )
    text = save_text(tmp_path / "train.txt", documents)
    choices = {"keep": 0.85, "round_to": 4, "nsamples": 8, "seqlen": 32, "batch_size": 4, "device": "cpu"}
    result = api.slice(str(tmp_path / "dense"), calibration=text, output=tmp_path / "out", **choices)
    loaded = SlicedForCausalLM.from_pretrained(tmp_path / "out")
    record = result.report.record
    assert record["size"]["parameters"] == loaded.num_parameters()
    assert record["size"]["active_parameters"] < record["size"]["parameters"]
    idle = 2 * 2 * 3 * 32 * 48  # in two layers, two of four experts
    assert record["size"]["dense_active_parameters"] == model.num_parameters() - idle
    again = api.slice(model, tokenizer=tiny_tokenizer, calibration=text, **choices)
    state = again.model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
