"""Why an architecture of transformers is refused: the part of it that the canonical network does not have.

Where several parts stand in the way, the one that is furthest from the network is named.
"""

from transformers import PreTrainedConfig

_RECURRENT = (
    "some of its layers are recurrent, convolutional or state-space mixers, which are no softmax attention"
)
_LATENT = (
    "its latent attention has parts that nobody has written (a choice among tokens, norms behind it, factors)"
)
_NORMS_BEHIND = "its blocks normalise what they write, by a length that a sliced stream does not have"
_EXPERTS = (
    "its MLPs are mixtures of experts whose file nobody has written yet (docs/contributing/add-a-family.md)"
)
_OTHER_INPUTS = "it takes images or sound beside text (a multimodal model, or the text part of one)"
_ENCODER_DECODER = "it is an encoder-decoder, or the decoder of one, which attends to another stream"
_ENCODER = (
    "it is an encoder that is asked to decode: its norms stand behind the additions, or its head has layers"
)
_NORMS_ON_STREAM = "its norms stand behind the additions, on the stream itself"
_ALIBI = "its scores depend on distances by ALiBi"
_CAPPED = "its scores or logits are capped by a tanh"
_SINUSOIDAL = "its positions are computed sines, no table of learned ones and no rotations"
_UNWRITTEN = "nobody has written its file yet (docs/contributing/add-a-family.md)"

# By what transformers calls `model_type`.
_KINDS = {
    _RECURRENT: """bailing_hybrid bamba falcon_h1 falcon_mamba inkling2_loop_text inkling2_text inkling_text jamba
        kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5_moe_text
        qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya""",
    _LATENT: """axk1 axk2 deepseek_v32 deepseek_v4 dots3_note_text glm_moe_dsa hy_v4 longcat_flash minicpm3""",
    _NORMS_BEHIND: """afmoe beam dory flex_olmo gemma3n_text gemma4_text gemma4_unified_text hyperclovax kolibri1""",
    _EXPERTS: """aria_text cohere2_moe dbrx dots1 ernie4_5_moe exaone_moe flint granitemoe
        granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 jetmoe laguna llama4 llama4_text mellum mimo_v2_flash
        minimax_m2 minimax_m3_vl_text sarvam_moe solar_open""",
    _OTHER_INPUTS: """apertus1p5_text cohere_compass_text dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified git
        got_ocr2 mllama moshi moss_transcribe_diarize phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp""",
    _ENCODER_DECODER: """bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp
        pegasus plbart prophetnet trocr whisper""",
    _ENCODER: """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod""",
    _NORMS_ON_STREAM: "openai-gpt xlm xlnet",
    _ALIBI: "bloom mpt",
    _CAPPED: "nanochat vaultgemma",
    _SINUSOIDAL: "ctrl xglm",
    _UNWRITTEN: "biogpt codegen gpt_bigcode gpt_neo gpt_neox_japanese gptj",
}
REASONS = {name: reason for reason, names in _KINDS.items() for name in names.split()} | {
    "bitnet": "norms stand inside its blocks, before what they write",
    "blt": "it reads bytes in patches, with several networks",
    "cpmant": "its scores have a learned bias for every distance",
    "diffllama": "its attention is the difference of two softmaxes",
    "doge": "its blocks multiply the stream by a learned vector",
    "gemma4_assistant": "it continues the states of another model",
    "gemma4_unified_assistant": "it continues the states of another model",
    "hrm_text": "it runs its layers several times over",
    "modernbert-decoder": "its embedding is normalised, and its head has layers",
    "persimmon": "it normalises every head by a LayerNorm of its own",
    "reformer": "its layers are reversible, and its attention hashes",
}


def reason_for(config: PreTrainedConfig) -> str | None:
    """What stands in the way of a config's architecture; None where nobody has looked at it.

    An architecture that is not in the table is known by what its config says of its parts.
    """
    reason = REASONS.get(config.model_type)
    if reason is None and getattr(config, "is_encoder_decoder", False):
        return _ENCODER_DECODER
    if reason is None and config.sub_configs:
        return _OTHER_INPUTS
    return reason
