"""PEFT's prompt learning on a sliced model: its prompts have the embedding's width, which `token_dim` names."""

import pytest
import torch
from support.sliced_models import sliced
from support.tiny_models import tiny_model, token_ids

peft = pytest.importorskip("peft")

METHODS = {
    "prompt": peft.PromptTuningConfig,
    "p-tuning": peft.PromptEncoderConfig,
    "prefix": peft.PrefixTuningConfig,
}


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("case", ["llama", "llama-tied"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_prompts_train_and_generate(method, case, slice_head):
    model = sliced(tiny_model(case, torch.float32), 36, dtype=torch.float32, slice_head=slice_head)[0]
    width = {} if method == "prefix" else {"token_dim": model.get_input_embeddings().embedding_dim}
    tuned = peft.get_peft_model(model, METHODS[method](task_type="CAUSAL_LM", num_virtual_tokens=3, **width))
    ids, losses = token_ids(), []
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if method == "prefix":
        return  # peft 0.21's generate differs from its own forward pass, for dense models as well
    # Without a cache, for the same reason.
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": False}
    tokens = tuned.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert tokens.shape == (3, 16)
    with torch.no_grad():
        seen = tokens[:, :-1]
        logits = tuned(input_ids=seen, attention_mask=torch.ones_like(seen)).logits
    logits[..., model.config.eos_token_id] = -torch.inf  # as min_new_tokens has it
    assert torch.equal(logits[:, -4:].argmax(-1), tokens[:, -4:])


def test_peft_takes_hidden_size_where_no_width_is_named():
    """It reads no other field: right where the embedding keeps D columns as the head does, an error elsewhere."""
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    for case, fits in (("llama-tied", True), ("llama", False)):
        model = sliced(tiny_model(case, torch.float32), 36, dtype=torch.float32)[0]
        assert (model.get_input_embeddings().embedding_dim == model.config.hidden_size) == fits
        tuned = peft.get_peft_model(model, peft.PromptTuningConfig(**settings))
        ids = token_ids()
        if fits:
            assert tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                tuned(input_ids=ids, attention_mask=torch.ones_like(ids))
