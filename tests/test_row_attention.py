"""One kernel for a whole row of tokens: what it sees, and that padded blocks give the same.

Run here without its compiler, which makes the kernel for GPUs from the same definition.
"""

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask

from postgrad.models import packing, row_attention
from postgrad.models.attention import AttentionForm
from postgrad.models.packing import SharedPrefixes

FORMS = [
    AttentionForm(),
    AttentionForm(scale=0.3),
    AttentionForm(window=50),
    AttentionForm(window=50, softcap=2.0),
]


@pytest.fixture
def gradients(monkeypatch):
    """PyTorch defines the gradient on CPUs, and refuses it there all the same."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)


def layout():
    return SharedPrefixes(
        [torch.zeros(size, dtype=torch.long) for size in (140, 20, 7)],
        [torch.zeros(size, dtype=torch.long) for size in (150, 3, 0, 60, 140)],
        [0, 0, 1, 2, 2],
    )


def inputs(row, heads=4, key_heads=2, width=16):
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(len(row.tokens), count, width, generator=random).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key_heads", [2, 4])
def test_the_row_gives_what_padded_blocks_give(form, key_heads):
    row = layout()
    given = inputs(row, key_heads=key_heads)
    slope = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    found = []
    for attend in (row.attend_in_row, row.attend_in_blocks):
        output = attend(*given, form)
        found.append([output, *torch.autograd.grad(output, given, slope)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 2**26])
@pytest.mark.parametrize("window", [None, 130])
def test_the_tiles_are_those_that_pytorch_counts(window, at_once, monkeypatch):
    monkeypatch.setattr(row_attention, "_AT_ONCE", at_once)
    # rows [0, 300) of one prompt, [300, 420) and [420, 700) continue it, [700, 900) is another
    lengths = torch.tensor([300, 120, 280, 200])
    sequences = torch.tensor([0, 1, 2, 3]).repeat_interleave(lengths)
    prompts = torch.tensor([0, 0, 0, 3]).repeat_interleave(lengths)
    starts = torch.tensor([0, 300, 300, 0])
    positions = torch.cat(
        [start + torch.arange(n) for start, n in zip(starts, lengths, strict=True)]
    )
    mask = row_attention.row_mask(sequences, prompts, positions, window)

    def sees(batch, head, query, key):
        return mask.mask_mod(batch, head, query, key)

    expected = create_block_mask(sees, 1, 1, 900, 900, device="cpu")
    for kind in ("kv", "full_kv"):
        counts, places = (
            [getattr(one, f"{kind}_{what}")[0, 0] for one in (mask, expected)]
            for what in ("num_blocks", "indices")
        )
        assert torch.equal(*counts)
        for count, ours, theirs in zip(counts[0], *places, strict=True):
            assert ours[:count].tolist() == theirs[:count].tolist()
    assert mask.seq_lengths == expected.seq_lengths
    assert bool(mask.full_kv_num_blocks.sum() > 0) == (window is None)


def test_what_a_token_sees_by_hand():
    # a prompt of two tokens, continued twice; a prompt of its own
    sequences, prompts = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([0, 0, 0, 0, 0, 3])
    positions = torch.tensor([0, 1, 2, 3, 2, 0])
    every = torch.arange(6)
    for window, expected in (
        (None, ["0", "01", "012", "0123", "014", "5"]),
        (2, ["0", "01", "12", "23", "14", "5"]),
    ):
        sees = row_attention.row_mask(sequences, prompts, positions, window).mask_mod
        seen = sees(0, 0, every[:, None], every)
        assert ["".join(str(int(k)) for k in row.nonzero()) for row in seen] == expected


@pytest.fixture
def works():
    packing._row_attention_works.cache_clear()
    yield lambda dtype, form=FORMS[0]: packing._row_attention_works(
        torch.device("cpu"), dtype, 4, 2, 16, form
    )
    packing._row_attention_works.cache_clear()


@pytest.mark.usefixtures("gradients")
def test_the_kernel_is_used_where_it_agrees_in_half_precision(works, monkeypatch):
    for form in FORMS:
        assert works(torch.bfloat16, form)
    assert not works(torch.float32)
    packing._row_attention_works.cache_clear()
    honest = packing.row_attention
    monkeypatch.setattr(packing, "row_attention", lambda *given: 1.1 * honest(*given))
    assert not works(torch.bfloat16)


def test_where_it_cannot_be_had_a_warning_says_why(works):
    with pytest.warns(UserWarning, match="no kernel for whole rows of tokens here: .*backward"):
        assert not works(torch.bfloat16)
