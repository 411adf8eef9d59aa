"""A model that vLLM starts quickly (its kernels want heads of at least 32 numbers), and prompts."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from postgrad.models.embedded import tiny_tokenizer


def write_small_model(folder):
    """A Llama of two layers with random weights and one token for each character, untied."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def long_prompts(count):
    """Different prompts of 90 tokens."""
    random = torch.Generator().manual_seed(0)
    return list(torch.randint(4, 60, (count, 90), generator=random))
