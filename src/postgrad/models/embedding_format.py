"""The files that make a saved causal language model load in sentence-transformers too."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from postgrad.models.language import LanguagePolicy
from postgrad.models.network import base_of


def save_embedding_model(
    policy: LanguagePolicy, folder: str | Path, *, prefix: Tensor, max_text_tokens: int
) -> None:
    """Write `policy` so that `SentenceTransformer(folder)` encodes texts with it.

    `prefix` `[P]` are the ids that come before every text (instruction and chat markup). They are
    the default prompt, which the mean over last hidden states leaves out. Texts are cut to
    `max_text_tokens`. That format has no place for markup after a text, so the mean must not
    need any.
    The folder also loads with `AutoModelForCausalLM.from_pretrained`.
    """
    folder = Path(folder)
    policy.save(folder)
    prompt = _as_text(policy.tokenizer, prefix.tolist())
    module = "sentence_transformers.models"
    _write(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": f"{module}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{module}.Pooling"},
        ],
    )
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            # texts only: chat messages could not leave the prompt out of the mean
            "modality_config": {"text": forward},
            "module_output_name": "token_embeddings",
            "max_seq_length": len(prefix) + max_text_tokens,
        },
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "embedding_dimension": base_of(policy.network).config.get_text_config().hidden_size,
            "pooling_mode": "mean",
            "include_prompt": False,
        },
    )
    _write(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"text": prompt},
            "default_prompt_name": "text",
            "similarity_fn_name": "cosine",
        },
    )


def _as_text(tokenizer: Any, prefix: list[int]) -> str:
    """The string that becomes `prefix` by the tokenizer, which may add a first token itself."""
    first: str = tokenizer.decode(prefix[:1])
    text: str = tokenizer.decode(prefix)
    for candidate in (text, text.removeprefix(first)):
        if tokenizer(candidate + "Hello").input_ids[: len(prefix)] == prefix:
            return candidate
    warnings.warn(
        "this tokenizer does not give the instruction's tokens back from their text: "
        "sentence-transformers will see another prompt than training did",
        stacklevel=3,
    )
    return text


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
