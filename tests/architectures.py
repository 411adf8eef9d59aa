"""Small random networks of several architectures of transformers, for the tests of the engine."""

import torch
import transformers

from postgrad.models.embedded import tiny_tokenizer
from postgrad.models.policy import LanguagePolicy

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    # large weights: a wrong mask must show
    "initializer_range": 0.3,
}

SHARING = {
    "llama": ("Llama", {}),
    "llama-untied-bias": ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "gpt2": ("GPT2", {"n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {"sliding_window": 6, "layer_types": None}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    ),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
}

PLAIN = {
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", {"state_size": 4}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "sliding_window": 6}),
}

CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
}


def network(name: str, seed: int = 0) -> torch.nn.Module:
    """A random network in evaluation mode; the same for the same name and seed."""
    family, changes = {**SHARING, **PLAIN}[name]
    config_name, class_name = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    settings = {**SIZES, **changes}
    if family == "GPT2":
        settings = {key: settings[key] for key in ("vocab_size", "eos_token_id", *changes)}
        settings["initializer_range"] = 0.3
    config = getattr(transformers, config_name)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = getattr(transformers, class_name)(config).eval()
        if family == "Gemma2":
            # some versions of transformers pick a kernel that ignores the soft cap
            made.set_attn_implementation("eager")
        for parameter in made.parameters():
            # norms and biases too: what starts as 0 or 1 hides errors
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def policy(name: str, seed: int = 0) -> LanguagePolicy:
    return LanguagePolicy(network(name, seed), tiny_tokenizer())


def items(seed: int = 0, vocabulary: int = 99) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Nine prompts, of which five are different, and ragged responses, in no order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(2, vocabulary, (length,), generator=generator)

    distinct = [draw(length) for length in (7, 40, 3, 7, 11)]
    prompts = [distinct[i] for i in (0, 1, 0, 2, 3, 1, 0, 4, 3)]
    responses = [draw(length) for length in (9, 4, 1, 30, 12, 4, 10, 2, 12)]
    return prompts, responses
